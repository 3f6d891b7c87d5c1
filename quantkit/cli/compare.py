"""`quantkit compare`: one table over any set of models and formats, all against one reference on the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.device import own
from quantkit.cli.perplexity import TEXTS
from quantkit.cli.show import bars, empty_table, err, out
from quantkit.compare import HEADINGS, Row, as_csv, as_markdown, candidate, cells, compare, largest, named, read_folder
from quantkit.corpus import Text
from quantkit.errors import UsageError
from quantkit.evaluate import Score
from quantkit.forward import device_of
from quantkit.later import Device, Tensor, torch
from quantkit.model import Model, open_model
from quantkit.page import write_page
from quantkit.plots import draw, write_figure
from quantkit.scoring import Ladder, Passages, Setting, as_run_by_llama_cpp, passages, same_tokens


def command(
    models: Annotated[list[str], typer.Argument(help="Models, or folders that `quantkit convert` filled.")],
    reference: Annotated[
        str | None, typer.Option(help="What all are measured against; else the report's source, or the largest.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help=TEXTS)] = None,
    ctx: Annotated[int, typer.Option(min=8, help="Tokens to a chunk; the second half is scored.")] = 512,
    chunks: Annotated[int | None, typer.Option(min=1, help="Score the first N chunks of each text.")] = None,
    engine: Annotated[
        str, typer.Option(help="quantkit, or llama.cpp to add what its runtime costs GGUFs.")
    ] = "quantkit",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16: what quantkit computes in.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a model card.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="A folder to write report.html, pareto.png and pareto.svg to.")
    ] = None,
) -> None:
    """Compare variants of a model: KL, perplexity and size, the Pareto front, ties and broken files."""
    if as_json + csv + markdown > 1:
        raise UsageError("more than one of --json, --csv and --markdown", hint="choose one")
    if engine not in ("quantkit", "llama.cpp"):
        raise UsageError(f"unknown engine {engine!r}", where="--engine", hint="known: quantkit, llama.cpp")
    setting = Setting.of(own(device_of(device)), dtype)
    opened = {name: open_model(path) for name, path in named(models).items()}
    base, others = chosen_reference(models, reference, opened)
    words = passages(text or [default_text(models)], base.tokenizer(), ctx, chunks)
    rows = scored_rows(others, base, words, setting, engine == "llama.cpp")
    said = f"Against {base.path.name} on {', '.join(t.name for t in words.texts)}"
    said += f": {len(words.rows)} chunks of {words.rows.shape[1]} tokens"
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        folders = [f.report for source in models if (f := read_folder(source))]
        illustrate(rows, base.name, said, report, folders[0] if len(folders) == len(models) == 1 else None)
    record: dict[str, Any] = {"reference": {"name": base.name, "path": str(base.path), "bytes": base.disk_bytes}}
    record |= {"texts": [{"name": t.name, "sha256": t.sha256} for t in words.texts], "rows": [r.record() for r in rows]}
    if as_json:
        print(json.dumps(record, indent=2))
    elif csv:
        print(as_csv(rows), end="")
    elif markdown:
        print(as_markdown(rows), end="")
    else:
        show(rows, said)


def illustrate(rows: list[Row], name: str, said: str, folder: Path, report: dict[str, Any] | None) -> list[Path]:
    """Write the page and the pictures; their paths."""
    write_page(rows, f"Variants of {name}", said, folder / "report.html", report)
    return [folder / "report.html", *write_figure(draw(rows, f"{name}. {said}"), folder, "pareto")]


def illustrate_conversion(
    source: Model,
    report: dict[str, Any],
    folder: Path,
    scores: dict[str, Score],
    text: Text | None,
    chunks: Tensor | None,
    device: Device,
) -> list[Path]:
    """The page and the pictures of a conversion that was scored; what was measured is kept for `compare`."""
    if text is None or chunks is None or not scores:
        return []
    words = Passages((text,), (len(chunks),), chunks)
    ladder = Ladder(words, source, Setting(torch.device(device)), lambda *_: None)
    found = []
    for v in report["variants"]:
        model, score = open_model(folder / v["path"]), scores[v["target"]]
        found.append(candidate(v["target"], model, score, source))
        if score.positions:
            ladder.remember(model, score.positions)
    said = f"Against the source on {text.name}: {len(chunks)} chunks of {chunks.shape[1]} tokens"
    return illustrate(compare(found), source.name, said, folder, report)


def chosen_reference(
    paths: list[str], reference: str | None, opened: dict[str, Model]
) -> tuple[Model, dict[str, Model]]:
    """The reference and the models to measure against it: what is named, else a report's source, else the largest."""
    if reference is not None:
        return open_model(reference), opened
    for path in paths:
        folder = read_folder(path)
        if folder and folder.source.exists():
            return open_model(folder.source), opened
    if len(opened) < 2:
        raise UsageError("nothing to compare with", where="--reference", hint="name a model, or pass two or more")
    name = largest(opened)
    err.print(f"reference: {name}, the largest of those given", soft_wrap=True)
    return opened[name], {n: m for n, m in opened.items() if n != name}


def default_text(paths: list[str]) -> str:
    """The text that a report's variants were scored on, or `demo`."""
    texts = [folder.text for path in paths if (folder := read_folder(path)) and folder.text]
    return texts[0] if texts else "demo"


def scored_rows(
    models: dict[str, Model], base: Model, words: Passages, setting: Setting, runtime: bool = False
) -> list[Row]:
    """Score every model against the reference, or take what was kept, and rank them."""
    for model in models.values():
        same_tokens(model, base.tokenizer(), words)
    found = []
    with bars({f"scoring {m.name}": 1.0 for m in (base, *models.values())}) as bar:
        ladder = Ladder(words, base, setting, bar.step)
        for name, model in models.items():
            score = words.scores(ladder.positions(model))[0]
            extra = _runtime(model, ladder) if runtime and model.gguf else None
            found.append(candidate(name, model, score, base, extra))
    return compare(found)


def _runtime(model: Model, ladder: Ladder) -> dict[str, Any]:
    run = as_run_by_llama_cpp(model, ladder)
    as_run, added = (ladder.text.scores(p)[0].record() for p in (run.positions, run.runtime))
    return {"as_run": as_run, "runtime": added, "tokenizer": run.tokenizer}


def show(rows: list[Row], title: str) -> None:
    """The table; three more columns where llama.cpp ran too."""
    ran = any(r.candidate.extra for r in rows)
    table = empty_table(title)
    for name in HEADINGS[:-1]:
        if name == "variant":  # a long one is folded, and no figure beside it
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for name in ("as run", "runtime KL", "tokens") if ran else ():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        *numbers, _ = cells(row)
        extra = row.candidate.extra
        more = () if not ran else ("", "", "")
        if extra:
            equal = "equal" if extra["tokenizer"]["equal"] else "differ"
            as_run = f"{extra['as_run']['kl_divergence']['mean']:.5f}"
            more = (as_run, f"{extra['runtime']['kl_divergence']['mean']:.5f}", equal)
        table.add_row(*numbers, *more, "BROKEN" if row.broken else "front" if row.front else "")
    out.print(table)
    for row in rows:
        if row.broken or row.ties:
            said = f"BROKEN: {row.broken}" if row.broken else f"a tie with {', '.join(row.ties)}"
            out.print(f"{row.candidate.name}: {said}", soft_wrap=True)
    out.print("front: on the Pareto front; of any other, a smaller file is as good or better.")
