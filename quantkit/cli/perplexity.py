"""`quantkit perplexity`: one scorer for every format, with or without a reference model."""

from __future__ import annotations

import json
from typing import Annotated

import torch
import typer

from quantkit.cli.options import OVERRIDE, SOURCE
from quantkit.cli.show import Bars, bars, out
from quantkit.corpus import evaluation_chunks, load_text
from quantkit.errors import BadInput
from quantkit.evaluate import Predictions, predict, score
from quantkit.forward import device_of, network
from quantkit.model import Model, open_model


def command(
    model: Annotated[str, typer.Argument(help=SOURCE)],
    text: Annotated[str, typer.Option(help="demo, wikitext2 or a file.")] = "demo",
    ctx: Annotated[int, typer.Option(min=8, help="Tokens to a chunk; the second half is scored.")] = 512,
    chunks: Annotated[int | None, typer.Option(min=1, help="Score the first N chunks.")] = None,
    reference: Annotated[str | None, typer.Option(help="A model to measure KL divergence against.")] = None,
    override: Annotated[list[str] | None, typer.Option(help=OVERRIDE)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity as llama.cpp defines it, on weights dequantized block by block."""
    where = device_of(device)
    scored, other = open_model(model, override or ()), open_model(reference) if reference else None
    tokenizer, words = scored.tokenizer(), load_text(text)
    ids = tokenizer.encode(words.plain())
    if other and other.tokenizer().encode(words.plain()[:20000]) != tokenizer.encode(words.plain()[:20000]):
        raise BadInput("the two models tokenize this text differently", where=reference, hint="KL needs equal tokens")
    rows = evaluation_chunks(ids, ctx, tokenizer, chunks)
    stages = {f"scoring {m.name}": 1.0 for m in (scored, other) if m}
    with bars(stages) as bar:

        def run(m: Model) -> Predictions:
            return _predict(m, rows, where, bar)

        theirs = run(other) if other else None
        result = score(run(scored), rows, theirs)
    record = result.record()
    if as_json:
        print(json.dumps(record, indent=2))
        return
    out.print(f"perplexity {result.perplexity:.4f} ± {result.stderr:.4f}  ({result.chunks} chunks of {ctx} tokens)")
    if result.kl_divergence and result.same_top is not None and result.delta_ln_ppl is not None:
        kl = result.kl_divergence
        out.print(f"ln(PPL/PPL of reference) {result.delta_ln_ppl:+.5f}, same top {100 * result.same_top:.2f}%")
        tail = f"median {kl.median:.6f}, 99% {kl.p99:.4f}, max {kl.max:.4f}"
        out.print(f"KL mean {kl.mean:.6f} ± {kl.stderr:.6f}, {tail}")


def _predict(model: Model, rows: torch.Tensor, device: torch.device, bar: Bars) -> Predictions:
    for step in predict(network(model, device), rows):
        if isinstance(step, Predictions):
            return step
        bar.step(f"scoring {model.name}", step + 1, model.layers)
    raise AssertionError("a network predicts")
