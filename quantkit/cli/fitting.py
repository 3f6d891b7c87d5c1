"""`--target-size`, `--target-bpw` of `quantkit convert`: choose types or bits, show the choice, write a recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml
from rich import box
from rich.table import Table as Shown

from quantkit.cli.show import bars, err, size
from quantkit.corpus import Text, calibration_batch
from quantkit.errors import UsageError
from quantkit.files.atomic import staged
from quantkit.fit import Choice, Fitted, Table, allocate, measure
from quantkit.fit_types import gguf_types, grid_bits, item_of
from quantkit.forward import network
from quantkit.later import Device, torch
from quantkit.model import Model
from quantkit.recipe import GGUF, Layer, Recipe, target_bytes
from quantkit.selfcal import self_calibration
from quantkit.targets import Calibration, compressed, gptq, plan_output
from quantkit.targets.folder import linear
from quantkit.targets.grids import Asked, asked_of
from quantkit.targets.mixtures import kind_of
from quantkit.texts import load_text

SAMPLES = 8  # calibration rows that types are measured on


def calibration_rows(model: Model, settings: Recipe, device: torch.device) -> tuple[Text, torch.Tensor]:
    """The calibration text of a recipe and its rows of token ids (samples, seqlen)."""
    if settings.calibration == "self":
        err.print("the model writes its own calibration text ...")
        return self_calibration(model, settings.samples, settings.seqlen, settings.seed, device)
    assert settings.calibration is not None  # or nothing would be calibrated
    text = load_text(settings.calibration)
    return text, calibration_batch(text, model.tokenizer(), settings.samples, settings.seqlen, settings.seed)


def fitted(model: Model, settings: Recipe, place: Device) -> tuple[Recipe, Choice | None]:
    """`settings` themselves, or where they ask for a size, those that name the type of every tensor and the choice.

    Shows the choice. UsageError where the size cannot be had, or where nothing is calibrated.
    """
    if not (settings.target_size or settings.target_bpw):
        return settings, None
    if len(settings.to) != 1 or settings.layers:
        raise UsageError("a size is for one target alone", where="--to", hint="do without other targets, and layers")
    asked = _asked(model, settings)
    if settings.calibration is None or (settings.target_size and settings.target_bpw):
        raise UsageError(
            "needs a calibration and one size", where="--target-size", hint="give a text and one of the two"
        )
    device = torch.device(place)
    _, rows = calibration_rows(model, settings.model_copy(update={"samples": min(SAMPLES, settings.samples)}), device)
    table: Table = {}
    with bars({"measuring types": 1.0}) as bar:
        choices = grid_bits(model, asked) if asked else gguf_types(model, rows)
        for i, step in enumerate(measure(network(model, device), rows, settings.seed, choices)):
            if isinstance(step, str):
                bar.step("measuring types", i + 1, model.layers + 2)
            else:
                table = step
    found = _of_size(model, settings, table, asked)
    choice = Choice(table, found, {item: _kind(item) for item in table})
    err.print(_shown(choice))
    err.print(f"a further {size(1e6)} would save about {1e6 * found.price:.2g} nats a token", soft_wrap=True)
    return _chosen(model, settings, found, asked), choice


def _asked(model: Model, settings: Recipe) -> Asked | None:
    """The grid that the one target asks for; None for a GGUF. UsageError for a target without either."""
    if settings.to == (GGUF,):
        return None
    for family in (gptq.FAMILY, compressed.FAMILY):
        if match := family.pattern.fullmatch(settings.to[0]):
            return asked_of(match, model, settings.choices())
    hint = f"take {GGUF}, or a GPTQ or compressed-tensors target"
    raise UsageError("this target has nothing to choose for a size", where=settings.to[0], hint=hint)


def _chosen(model: Model, settings: Recipe, found: Fitted, asked: Asked | None) -> Recipe:
    if asked:
        bits = {n: int(found.options[item_of(r)].type) for n, r in linear(model).items()}
        layers = {n.removesuffix(".weight"): Layer.of_bits(b) for n, b in bits.items() if b != asked.bits}
    else:
        layers = {name.removesuffix(".weight"): Layer(type=o.type) for name, o in found.options.items()}
    return settings.model_copy(update={"layers": layers, "target_size": None, "target_bpw": None})


def _of_size(model: Model, settings: Recipe, table: Table, asked_grid: Asked | None) -> Fitted:
    """Types or bits whose output comes to the size; where bits a weight were asked for, whose tensors do."""
    calibration = Calibration(str(settings.calibration), settings.samples, settings.seqlen)
    bits = settings.target_bpw or 0.0
    asked = target_bytes(settings.target_size) if settings.target_size else int(bits * model.parameters / 8)
    budget = asked
    while True:
        found = allocate(table, budget)
        chosen = _chosen(model, settings, found, asked_grid)
        output = plan_output(settings.to[0], model, calibration, chosen.choices())
        nbytes = output.nbytes if settings.target_size else sum(row.nbytes for row in output.rows)
        if nbytes <= asked:
            return found
        budget -= nbytes - asked


def _shown(choice: Choice) -> Shown:
    """The types chosen by kind of tensor, with what they take and what they are expected to cost."""
    shown, found = (
        Shown(title="Types chosen", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)),
        choice.found,
    )
    for name in ("tensors", "types"):
        shown.add_column(name)
    for name in ("size", "predicted KL"):
        shown.add_column(name, justify="right", no_wrap=True)
    for kind in dict.fromkeys(choice.kinds.values()):
        options = [o for name, o in found.options.items() if choice.kinds[name] == kind]
        types = Counter(o.type for o in options)
        words = ", ".join(f"{n} {t}" for t, n in types.most_common())
        shown.add_row(kind, words, size(sum(o.nbytes for o in options)), f"{sum(o.divergence for o in options):.4f}")
    shown.add_row("in all", "", size(found.nbytes), f"{found.divergence:.4f}")
    return shown


def _kind(item: str) -> str:
    """Of a GGUF's tensor, or of the matrices of a layer that read one activation."""
    return kind_of(item) if item.endswith(".weight") else item.partition(" ")[2]


def write_recipe(settings: Recipe, path: Path) -> None:
    """The recipe that repeats a conversion."""
    with staged(path, replace=True) as partial:
        partial.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
