"""`quantkit perplexity`: one scorer for every format, with or without a reference model, on one text or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.device import own
from quantkit.cli.options import OVERRIDE, SOURCE
from quantkit.cli.show import bars, out
from quantkit.errors import UsageError
from quantkit.evaluate import Positions, Score
from quantkit.files.logprobs import LogProbs, is_logprobs, read_logprobs
from quantkit.forward import device_of
from quantkit.model import Model, open_model
from quantkit.scoring import AsRun, Ladder, Passages, Setting, as_run_by_llama_cpp, passages, same_chunks, same_tokens
from quantkit.tasks import evaluate_tasks

REFERENCE = "A model to measure KL divergence against, or a file of llama-perplexity's --kl-divergence-base."
TEXTS = "demo, wikitext2, c4, or a file: .txt, .jsonl, .parquet. (again)"


def command(
    model: Annotated[str, typer.Argument(help=SOURCE)],
    text: Annotated[list[str] | None, typer.Option(help=TEXTS)] = None,
    ctx: Annotated[int, typer.Option(min=8, help="Tokens to a chunk; the second half is scored.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Score every N tokens, each with a chunk before it, as --ppl-stride.")
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=1, help="Score the first N chunks of each text.")] = None,
    reference: Annotated[str | None, typer.Option(help=REFERENCE)] = None,
    override: Annotated[list[str] | None, typer.Option(help=OVERRIDE)] = None,
    engine: Annotated[str, typer.Option(help="quantkit, or llama.cpp to see what its runtime adds.")] = "quantkit",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16: what quantkit computes in.")] = "fp32",
    tasks: Annotated[str | None, typer.Option(help="Score lm-eval's tasks instead: eq_bench,hellaswag.")] = None,
    task_folder: Annotated[list[Path] | None, typer.Option(help="A folder of task YAMLs of your own. (again)")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of each task, the first N documents.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity as llama.cpp defines it, on weights dequantized block by block."""
    if engine not in ("quantkit", "llama.cpp"):
        raise UsageError(f"unknown engine {engine!r}", where="--engine", hint="known: quantkit, llama.cpp")
    of_texts = {"--text": text, "--reference": reference, "--stride": stride, "--chunks": chunks}
    of_tasks = {"--limit": limit, "--task-folder": task_folder}
    if given := [name for name, value in (of_tasks if tasks is None else of_texts).items() if value]:
        hint = "leave it out, or " + ("leave out --tasks" if tasks is not None else "name some with --tasks")
        raise UsageError("has no part in what is scored", where=given[0], hint=hint)
    setting = Setting.of(own(device_of(device)), dtype)
    if tasks is not None:
        _run_tasks(open_model(model, override or ()), tasks.split(","), setting, task_folder or [], limit, as_json)
        return
    scored, other = open_model(model, override or ()), _reference(reference)
    tokenizer = scored.tokenizer()
    words = passages(text or ["demo"], tokenizer, ctx, chunks, stride)
    if isinstance(other, LogProbs):
        same_chunks(other, words, tokenizer)
    elif other:
        same_tokens(other, tokenizer, words)
    stages = {f"scoring {m.name}": 1.0 for m in (other, scored) if isinstance(m, Model)}
    with bars(stages) as bar:
        ladder = Ladder(words, other, setting, bar.step)
        positions = ladder.positions(scored)
        run = as_run_by_llama_cpp(scored, ladder) if engine == "llama.cpp" else None
    if as_json:
        record = _record(words, positions) if run is None else _record_of_run(words, positions, run)
        print(json.dumps(record, indent=2))
        return
    for name, score in _named(words, run.positions if run else positions):
        _show(name, score)
    if run:
        _show_run(words, positions, run)


def _reference(name: str | None) -> Model | LogProbs | None:
    if name is None:
        return None
    return read_logprobs(name) if is_logprobs(name) else open_model(name)


def _run_tasks(
    model: Model, tasks: list[str], setting: Setting, folders: list[Path], limit: int | None, as_json: bool
) -> None:
    found = evaluate_tasks(model, tasks, setting, folders, limit)
    if as_json:
        print(json.dumps({"tasks": found}, indent=2))
        return
    for name, numbers in found.items():
        out.print(name + ": " + ", ".join(f"{metric} {value:.4f}" for metric, value in numbers.items()), soft_wrap=True)


def _named(words: Passages, positions: Positions) -> list[tuple[str, Score]]:
    """Each text's score, and where there are several, that of all together."""
    together, each = words.scores(positions)
    named = [(t.name, s) for t, s in zip(words.texts, each, strict=True)]
    return named if len(named) == 1 else [*named, ("together", together)]


def _record(words: Passages, positions: Positions) -> dict[str, Any]:
    """The score of all texts together; of each where there are several."""
    together, each = words.scores(positions)
    texts = [
        {"name": t.name, "source": t.source, "sha256": t.sha256} | s.record()
        for t, s in zip(words.texts, each, strict=True)
    ]
    return together.record() | {"texts": texts}


def _record_of_run(words: Passages, weights: Positions, run: AsRun) -> dict[str, Any]:
    """The score as llama.cpp runs the file; apart from it, that of the weights, of the runtime, and the tokens."""
    apart = {"weights": _record(words, weights), "runtime": _record(words, run.runtime), "tokenizer": run.tokenizer}
    return {"engine": "llama.cpp"} | _record(words, run.positions) | apart


def _show(name: str, score: Score) -> None:
    said = f"({name}: {score.chunks} chunks of {score.ctx} tokens)"
    out.print(f"perplexity {score.perplexity:.4f} ± {score.stderr:.4f}  {said}", soft_wrap=True)
    kl, p = score.kl_divergence, score.delta_p
    if not kl or not p or score.same_top is None or score.delta_ln_ppl is None:
        return
    top = f"same top {100 * score.same_top:.2f} ± {100 * (score.same_top_stderr or 0):.2f}%"
    out.print(f"  ln(PPL/PPL of reference) {score.delta_ln_ppl:+.5f} ± {score.delta_ln_ppl_stderr:.5f}, {top}")
    out.print(f"  KL mean {kl.mean:.6f} ± {kl.stderr:.6f}, median {kl.median:.6f}, max {kl.max:.4f}")
    shares = {"99.9": kl.p999, "99": kl.p99, "95": kl.p95, "90": kl.p90, "10": kl.p10, "5": kl.p05, "1": kl.p01}
    out.print("  KL " + ", ".join(f"{share}% {value:.4g}" for share, value in shares.items()))
    out.print(
        f"  Δp mean {100 * p.mean:+.3f} ± {100 * p.stderr:.3f}%, RMS {100 * p.rms:.3f} ± {100 * p.rms_stderr:.3f}%"
    )


def _show_run(words: Passages, weights: Positions, run: AsRun) -> None:
    dequantized, runtime = words.scores(weights)[0], words.scores(run.runtime)[0]
    out.print(f"as llama.cpp runs it, above; the same weights dequantized: {dequantized.perplexity:.4f}", end="")
    out.print(f", KL to the reference {dequantized.kl_divergence.mean:.6f}" if dequantized.kl_divergence else "")
    if kl := runtime.kl_divergence:
        change = f"ln ratio {runtime.delta_ln_ppl:+.5f} ± {runtime.delta_ln_ppl_stderr:.5f}"
        out.print(f"added by its runtime: {change}, KL mean {kl.mean:.6f} ± {kl.stderr:.6f}")
    t = run.tokenizer
    differ = "equal" if t["equal"] else f"{t['llama_cpp_tokens']:,} others from token {t['first_difference']} on"
    out.print(f"its tokenizer: {t['tokens']:,} tokens here, {differ} there")
