"""`quantkit inspect`: what a model is, from its headers alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from quantkit.cli.options import OVERRIDE, SOURCE
from quantkit.cli.show import out, size
from quantkit.model import open_model
from quantkit.report import describe


def command(
    model: Annotated[str, typer.Argument(help=SOURCE)],
    override: Annotated[list[str] | None, typer.Option(help=OVERRIDE)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show architecture, tensor types, size, context, tokenizer and licence of a model."""
    record = describe(open_model(model, override or ()))
    if as_json:
        print(json.dumps(record, indent=2))
        return
    table = Table(show_header=False, box=None)
    record["bytes"] = f"{size(record['bytes'])} ({record['bytes']:,} bytes)"
    record["parameters"] = f"{record['parameters']:,}"
    record["types"] = ", ".join(f"{n} {t}" for t, n in record["types"].items())
    record["overrides"] = ", ".join(f"{k}={v}" for k, v in record["overrides"].items()) or "none"
    for key, value in record.items():
        table.add_row(key.replace("_", " "), "not stated" if value is None else str(value))
    out.print(table)
