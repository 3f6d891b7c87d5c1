"""`Recipe`: everything a conversion is told, as one checked record; from YAML, from options, or from both.

Every mistake of a file is reported at once. A report holds the recipe it was made with, so it can be run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import BadInput, UsageError
from quantkit.resources import resource


class Recipe(BaseModel):
    """What to make and how to measure it. Field names are those of the command line's options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: Annotated[tuple[str, ...], Field(min_length=1)]
    calibration: str = "default"  # a built-in text, `self`, or a file
    samples: Annotated[int, Field(ge=1)] = 64
    seqlen: Annotated[int, Field(ge=8)] = 512
    seed: int = 0
    eval_text: str | None = "demo"  # a built-in text or a file; None scores nothing
    eval_chunks: Annotated[int, Field(ge=1)] | None = None  # None: all the text gives
    ctx: Annotated[int, Field(ge=8)] = 512
    device: str = "auto"


def load_recipe(name: str | None, options: Mapping[str, Any]) -> Recipe:
    """A recipe from a file or a name in `recipes/` (or from nothing), with `options` that are not None laid over it.

    Raises BadInput where there is no such file, UsageError listing every mistake in one line.
    """
    values: Any = {} if name is None else _read(name)
    if not isinstance(values, dict):
        raise UsageError("a recipe is a mapping of options", where=name, hint="see recipes/demo.yaml")
    if "to" in values and isinstance(values["to"], str):
        values["to"] = [values["to"]]
    merged = values | {k: v for k, v in options.items() if v is not None}
    try:
        recipe = Recipe(**merged)
    except ValidationError as e:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg'].lower()}" for f in e.errors())
        raise UsageError(faults, where=name or "options", hint=f"known: {', '.join(Recipe.model_fields)}") from None
    if doubled := sorted({t for t in recipe.to if [x.lower() for x in recipe.to].count(t.lower()) > 1}):
        raise UsageError(f"the target {doubled[0]} is named twice", where="--to", hint="name each target once")
    return recipe


def _read(name: str) -> Any:
    path = Path(name)
    if not path.is_file() and "/" not in name:
        path = resource("recipes") / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in resource("recipes").glob("*.yaml")))
        raise BadInput("no such recipe", where=name, hint=f"give a YAML file or one of: {known}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        reason = str(e).replace("\n", " ")
        raise UsageError(f"not readable as YAML ({reason})", where=path, hint="see recipes/demo.yaml") from None
