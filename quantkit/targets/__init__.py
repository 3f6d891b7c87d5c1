"""Output formats. Adding one is adding a file with a `FAMILY` to this folder; there is no list to edit."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from quantkit.errors import UsageError
from quantkit.model import Model
from quantkit.targets.layers import LayerRule
from quantkit.targets.target import Calibration, Choices, Family, Output, Piece, Row, Solved


@cache
def families() -> tuple[Family, ...]:
    """Every kind of target, in the order of their files' names."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return tuple(m.FAMILY for m in modules if hasattr(m, "FAMILY"))


def plan_output(name: str, model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """Plan the target called `name`; UsageError where no family answers to it."""
    for family in families():
        if match := family.pattern.fullmatch(name):
            return family.plan(match, model, calibration, choices)
    known = "; ".join(f.usage for f in families())
    raise UsageError(f"unknown target {name!r}", where="--to", hint=f"known: {known}")


__all__ = [
    "Calibration",
    "Choices",
    "Family",
    "LayerRule",
    "Output",
    "Piece",
    "Row",
    "Solved",
    "families",
    "plan_output",
]
