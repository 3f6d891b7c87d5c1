"""`target_size` and `target_bpw` of a recipe: measure what types or bits cost, choose, and name them in a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.events import Progress
from quantkit.fit import Choice, Fitted, Table, allocate, measure
from quantkit.fit_types import gguf_types, grid_bits, item_of
from quantkit.forward import Network
from quantkit.later import Tensor
from quantkit.model import Model
from quantkit.recipe import GGUF, Layer, Recipe, target_bytes
from quantkit.sensitivity import ROWS
from quantkit.targets import Calibration, compressed, gptq, plan_output
from quantkit.targets.folder import linear
from quantkit.targets.grids import Asked, asked_of
from quantkit.targets.mixtures import kind_of

STAGE = "measuring types"


@dataclass(frozen=True)
class Sized:
    """A recipe that names the type or the bits of every tensor, and the choice it was made by."""

    recipe: Recipe
    choice: Choice


def sized(model: Model, recipe: Recipe, net: Network, ids: Tensor) -> Iterator[Progress | Sized]:
    """What a recipe that asks for a size comes to; the last that is yielded is `Sized`.

    `ids` (n, T) are calibration rows, of which the first `sensitivity.ROWS` are taken; `net` is the model's network.
    UsageError where the size cannot be had.
    """
    asked = grid_asked(model, recipe)
    ids = ids[:ROWS]
    table: Table = {}
    for i, step in enumerate(
        measure(net, ids, recipe.seed, grid_bits(model, asked) if asked else gguf_types(model, ids))
    ):
        if isinstance(step, str):
            yield Progress(STAGE, i + 1, model.layers + 2)
        else:
            table = step
    found = _of_size(model, recipe, table, asked)
    yield Sized(_named(model, recipe, found, asked), Choice(table, found, {item: _kind(item) for item in table}))


def grid_asked(model: Model, recipe: Recipe) -> Asked | None:
    """The grid of the one target of a recipe that asks for a size; None for a GGUF.

    UsageError where there is more to it than that, or nothing to choose.
    """
    if len(recipe.to) != 1 or recipe.layers:
        raise UsageError("a size is for one target alone", where="--to", hint="do without other targets, and layers")
    asked = None if recipe.to == (GGUF,) else _grid(model, recipe)
    if recipe.calibration is None or bool(recipe.target_size) == bool(recipe.target_bpw):
        raise UsageError(
            "needs a calibration and one size", where="--target-size", hint="give a text and one of the two"
        )
    return asked


def _grid(model: Model, recipe: Recipe) -> Asked:
    for family in (gptq.FAMILY, compressed.FAMILY):
        if match := family.pattern.fullmatch(recipe.to[0]):
            return asked_of(match, model, recipe.choices())
    hint = f"take {GGUF}, or a GPTQ or compressed-tensors target"
    raise UsageError("this target has nothing to choose for a size", where=recipe.to[0], hint=hint)


def _of_size(model: Model, recipe: Recipe, table: Table, asked: Asked | None) -> Fitted:
    """Types or bits whose output comes to the size; where bits a weight were asked for, whose tensors do."""
    calibration = Calibration(str(recipe.calibration), recipe.samples, recipe.seqlen)
    bits = recipe.target_bpw or 0.0
    limit = target_bytes(recipe.target_size) if recipe.target_size else int(bits * model.parameters / 8)
    budget = limit
    while True:
        found = allocate(table, budget)
        choices = _named(model, recipe, found, asked).choices()
        output = plan_output(recipe.to[0], model, calibration, choices)
        nbytes = output.nbytes if recipe.target_size else sum(row.nbytes for row in output.rows)
        if nbytes <= limit:
            return found
        budget -= nbytes - limit


def _named(model: Model, recipe: Recipe, found: Fitted, asked: Asked | None) -> Recipe:
    """The recipe with what was chosen in place of the size."""
    if asked:
        bits = {n: int(found.options[item_of(r)].type) for n, r in linear(model).items()}
        layers = {n.removesuffix(".weight"): Layer.of_bits(b) for n, b in bits.items() if b != asked.bits}
    else:
        layers = {name.removesuffix(".weight"): Layer(type=o.type) for name, o in found.options.items()}
    return recipe.model_copy(update={"layers": layers, "target_size": None, "target_bpw": None})


def _kind(item: str) -> str:
    """Of a GGUF's tensor, or of the matrices of a layer that read one activation."""
    return kind_of(item) if item.endswith(".weight") else item.partition(" ")[2]
