"""`quantkit imatrix`: compute llama.cpp's importance matrix of a model, show one, or merge several."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.device import own
from quantkit.cli.options import CHAT_TEMPLATE, OVERRIDE
from quantkit.cli.show import bars, empty_table, err, out
from quantkit.corpus import calibration_batch
from quantkit.errors import UsageError
from quantkit.files.imatrix import Imatrix, merge, read_imatrix, spread, write_imatrix
from quantkit.forward import device_of, network
from quantkit.importance import measure
from quantkit.model import Model, open_model
from quantkit.texts import load_text


def command(
    sources: Annotated[list[str], typer.Argument(help="A model; with --show or --merge, importance matrices.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to write, as GGUF.")] = None,
    text: Annotated[str, typer.Option(help="default, or a file to calibrate on.")] = "default",
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows.")] = 64,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens to a calibration row.")] = 512,
    seed: Annotated[int, typer.Option(help="Of what is drawn from the text.")] = 0,
    override: Annotated[list[str] | None, typer.Option(help=OVERRIDE)] = None,
    chat_template: Annotated[str | None, typer.Option(help=CHAT_TEMPLATE)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    show: Annotated[bool, typer.Option("--show", help="Show what importance matrices hold.")] = False,
    merge_them: Annotated[bool, typer.Option("--merge", help="Add importance matrices up in one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --show, print JSON.")] = False,
) -> None:
    """Compute a model's importance matrix for GGUF targets; show and merge those of quantkit and llama.cpp."""
    if show and (merge_them or output):
        other = "--merge" if merge_them else "-o"
        raise UsageError("shows what there is and writes nothing", where="--show", hint=f"leave it out, or {other}")
    if show:
        for path in map(Path, sources):
            _show(path, read_imatrix(path), as_json)
        return
    if output is None:
        raise UsageError("no output file", where="-o", hint="name one, such as -o imatrix.gguf")
    if not output.parent.is_dir():
        raise UsageError("there is no such folder to write in", where=output.parent, hint="make it first")
    if output.exists():
        raise UsageError("it exists already", where=output, hint="choose another name, or remove it")
    if merge_them:
        imatrix = merge([read_imatrix(Path(path)) for path in sources])
    elif len(sources) == 1:
        imatrix = _measure(open_model(sources[0], override or (), chat_template), text, samples, seqlen, seed, device)
    else:
        raise UsageError(f"{len(sources)} models at once", hint="name one, or pass --merge to add importance matrices")
    write_imatrix(output, imatrix)
    out.print(f"{output}: {_summary(imatrix)}", soft_wrap=True)


def _measure(model: Model, name: str, samples: int, seqlen: int, seed: int, device: str) -> Imatrix:
    where, text = own(device_of(device)), load_text(name)
    rows = calibration_batch(text, model.tokenizer(), samples, seqlen, seed)
    if len(rows) < samples:
        err.print(f"warning: the text {name} gives {len(rows)} of {samples} samples", soft_wrap=True)
    with bars({"calibrating": 1.0}) as bar:
        for step in measure(network(model, where), rows, text.name):
            if isinstance(step, Imatrix):
                return step
            bar.step("calibrating", step + 1, model.layers)
    raise AssertionError("a model has an importance matrix")


def _summary(imatrix: Imatrix) -> str:
    texts = ", ".join(imatrix.datasets) or "a text that is not named"
    return f"{len(imatrix.sums)} entries from {imatrix.chunks} chunks of {imatrix.chunk_size} tokens of {texts}"


def _show(path: Path, imatrix: Imatrix, as_json: bool) -> None:
    entries = {name: spread(imatrix, name) for name in imatrix.sums}
    if as_json:
        head = {"datasets": imatrix.datasets, "chunks": imatrix.chunks, "chunk_size": imatrix.chunk_size}
        print(json.dumps(head | {"entries": {name: asdict(s) for name, s in entries.items()}}, indent=2))
        return
    table = empty_table(f"{path}: {_summary(imatrix)}")
    table.add_column("weight", no_wrap=True)
    for heading in ("rows", "columns", "mean x²", "largest", "deviation", "active", "evenness"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, s in entries.items():
        even = s.entropy / math.log2(s.columns) if s.columns > 1 else 1.0
        numbers = f"{s.mean:.4g}", f"{s.max:.4g}", f"{s.stddev:.4g}", f"{100 * s.active:.1f}%", f"{100 * even:.1f}%"
        table.add_row(name, f"{s.rows:,}", f"{s.columns:,}", *numbers)
    out.print(table)
