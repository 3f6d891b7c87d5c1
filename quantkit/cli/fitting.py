"""`--target-size`, `--target-bpw` of `quantkit convert`: show what is chosen for a size, write a recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml
from rich.table import Table

from quantkit.cli.device import own
from quantkit.cli.show import bars, empty_table, err, size
from quantkit.corpus import Text, calibration_batch
from quantkit.events import Progress
from quantkit.files.atomic import staged
from quantkit.fit import Choice
from quantkit.forward import network
from quantkit.later import Device, torch
from quantkit.model import Model
from quantkit.recipe import Recipe
from quantkit.selfcal import self_calibration
from quantkit.sensitivity import ROWS
from quantkit.sizing import STAGE, grid_asked, sized
from quantkit.texts import load_text


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
    grid_asked(model, settings)  # before anything is calibrated
    device, few = own(torch.device(place)), settings.model_copy(update={"samples": min(ROWS, settings.samples)})
    _, rows = calibration_rows(model, few, device)
    choice = None
    with bars({STAGE: 1.0}) as bar:
        for event in sized(model, settings, network(model, device), rows):
            if isinstance(event, Progress):
                bar.step(event.stage, event.done, event.total)
            else:
                settings, choice = event.recipe, event.choice
    assert choice is not None  # it comes last
    err.print(_shown(choice))
    err.print(f"a further {size(1e6)} would save about {1e6 * choice.found.price:.2g} nats a token", soft_wrap=True)
    return settings, choice


def _shown(choice: Choice) -> Table:
    """The types chosen by kind of tensor, with what they take and what they are expected to cost."""
    found = choice.found
    shown = empty_table("Types chosen")
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


def write_recipe(settings: Recipe, path: Path) -> None:
    """The recipe that repeats a conversion."""
    with staged(path, replace=True) as partial:
        dumped = yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
        partial.write_text(dumped, encoding="utf-8")
