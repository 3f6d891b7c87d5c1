"""`report.html`: one self-contained page of a comparison: table, picture, errors by layer, recipe; nothing is fetched.

Names come from files and are escaped; a content policy in the page forbids every request.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantkit.compare import HEADINGS, Row, cells, recommended
from quantkit.files.atomic import staged
from quantkit.plots import draw, rendered

TEMPLATE = Path(__file__).with_name("page.html.j2")
MADE_WITH = ("recipe", "source", "evaluation", "calibration", "lineage", "warnings", "device", "versions")


def page(rows: Sequence[Row], title: str, subtitle: str, report: Mapping[str, Any] | None = None) -> str:
    """The page as text; `report` is a conversion's, for errors by layer and the recipe."""
    from jinja2 import Environment

    choice = recommended(rows)
    name = choice[0].candidate.name if choice else None
    pictures = {
        shade: base64.b64encode(rendered(draw(rows, "", shade == "dark"), "svg")).decode()
        for shade in ("light", "dark")
    }
    made = {key: report[key] for key in MADE_WITH if key in report} if report else {"compared": subtitle}
    return (
        Environment(autoescape=True)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            title=title,
            subtitle=subtitle,
            recommended=name,
            reason=choice[1] if choice else None,
            columns=[(heading or ("rank", "note")[i > 0], i) for i, heading in enumerate(HEADINGS)],
            rows=[_row(row, row.candidate.name == name) for row in rows],
            layers=[_layers(v) for v in report["variants"]] if report else [],
            recipe=yaml.safe_dump(made, sort_keys=False, allow_unicode=True),
            **pictures,
        )
    )


def write_page(rows: Sequence[Row], title: str, subtitle: str, path: Path, report: Mapping[str, Any] | None) -> None:
    """Write the page at `path`."""
    with staged(path, replace=True) as partial:
        partial.write_text(page(rows, title, subtitle, report), encoding="utf-8")


def _row(row: Row, chosen: bool) -> dict[str, Any]:
    """A row's texts, and beside each what it is sorted by; empty for what is not known."""
    c, score, kl = row.candidate, row.candidate.score, row.candidate.score.kl_divergence
    note = cells(row)[-1]
    values = (
        row.rank,
        c.name,
        c.bits_per_weight,
        c.nbytes,
        kl and kl.mean,
        score.perplexity,
        score.delta_ln_ppl,
        score.same_top,
        note,
    )
    kind = "broken" if row.broken else "recommended" if chosen else ""
    known = ["" if v is None or (isinstance(v, float) and not math.isfinite(v)) else v for v in values]
    return {"kind": kind, "cells": list(zip(cells(row), known, strict=True))}


def _layers(variant: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's errors, a row for each layer and a column for each kind of tensor that lost anything."""
    table: dict[int, dict[str, float]] = {}
    for tensor in variant["tensors"]:
        layer, kind = _place(tensor["name"])
        if layer is not None and tensor["loss"]:
            table.setdefault(layer, {})[kind] = max(tensor["loss"], table.get(layer, {}).get(kind, 0.0))
    kinds = list(dict.fromkeys(kind for errors in table.values() for kind in errors))
    most = max((e for errors in table.values() for e in errors.values()), default=1.0)
    heat = lambda e: round(math.sqrt(e / most), 3)  # noqa: E731  (small errors stay visible beside the largest)
    found = [
        (layer, [(f"{e:.1e}", heat(e)) if (e := errors.get(kind)) else ("", 0) for kind in kinds])
        for layer, errors in sorted(table.items())
    ]
    return {"name": variant["target"], "kinds": kinds, "rows": found}


def _place(name: str) -> tuple[int | None, str]:
    """Layer and kind of a tensor by either of its names: `blk.3.ffn_up.weight`, `model.layers.3.mlp.up_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (None, name) if at is None else (int(parts[at]), ".".join(p for p in parts[at + 1 :] if not p.isdigit()))
