"""Conversions on a stand-in for a CUDA card: no tensor is left behind, outcome and memory are as expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from card import CARD, MEMORY
from toy import toy_model, write_toy

from quantkit import Recipe, calibration_batch, convert, load_text, make_plan, open_model
from quantkit.events import Failed, TensorDone
from quantkit.forward import device_of
from quantkit.stats import Stats

WORK = [
    (("gptq-4bit-64g", "awq-4bit-64g"), {}),
    (("gptq-3bit-64g-desc",), {"inputs": "source"}),
    (("Q4_K_M",), {}),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("card") / "Toy.F32.gguf", toy_model())


def losses(source: Path, out: Path, device: torch.device, targets: tuple[str, ...], options: dict[str, str]):
    """The loss of every tensor, the most bytes on the card, and how many were planned."""
    model = open_model(source)
    recipe = Recipe(to=targets, samples=4, seqlen=64, eval_text=None, **options)
    plan = make_plan(model, recipe, device)
    rows = calibration_batch(load_text("default"), model.tokenizer(), 4, 64)
    before = MEMORY.peak = MEMORY.now
    events = list(convert(model, plan, out, device, rows if plan.calibrated else None, None, None))
    assert not [e for e in events if isinstance(e, Failed)]
    made = {e.row.name: e.loss for e in events if isinstance(e, TensorDone)}
    return made, MEMORY.peak - before, plan.peak_vram


@pytest.mark.parametrize(("targets", "options"), WORK)
def test_a_card_makes_what_the_processor_makes(source, tmp_path, monkeypatch, targets, options):
    monkeypatch.setattr("quantkit.forward.multiplies_bf16", lambda device: False)
    here, _, _ = losses(source, tmp_path / "cpu", device_of("cpu"), targets, options)
    there, peak, planned = losses(source, tmp_path / "card", CARD, targets, options)
    assert there == pytest.approx(here, rel=0.1, abs=1e-6) and 0 < peak <= planned


def test_mixed_statistics_are_float32_sums_of_bf16_factors():
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 100, 320, generator=g) for _ in range(3)]
    there = Stats.zeros(320, CARD, mixed=True)
    for x, source, wanted in batches:
        there = there.add(x.to(CARD), source.to(CARD)).add(x.to(CARD), wanted=wanted.to(CARD))
    x, source, wanted = (torch.cat(parts) for parts in zip(*batches, strict=True))
    factor = x.bfloat16().double()
    gram = 2 * factor.T @ factor
    gram.diagonal().copy_(2 * x.double().square().sum(0))
    drift, y = (source - x).bfloat16().double(), wanted.bfloat16().double()
    for found, right in ((there.gram, gram), (there.drift, drift.T @ factor), (there.wanted, y.T @ factor)):
        torch.testing.assert_close(found.cpu().double(), right, rtol=1e-4, atol=1e-3)


def test_tensors_of_two_devices_do_not_meet():
    with pytest.raises(RuntimeError, match="on the card and elsewhere"):
        torch.ones(3, device=CARD) + torch.ones(3)
