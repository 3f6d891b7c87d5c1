"""The same work on a CUDA device: the same codes, statistics and scores as on the processor."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from test_convert import quantkit
from toy import toy_model, write_toy

from quantkit.codecs.grid import Grid
from quantkit.solvers.gptq import _columns, gptq
from quantkit.solvers.replay import replayed
from quantkit.stats import Stats

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mixed", [False, True])
def test_statistics_and_codes_agree(mixed):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2000, 256, generator=g), torch.randn(96, 256, generator=g)
    x = x.bfloat16().float() if mixed else x
    here, there = Stats.zeros(256).add(x), Stats.zeros(256, "cuda", mixed).add(x.cuda())
    assert torch.allclose(here.gram, there.gram.cpu(), rtol=1e-4, atol=1e-1)
    same = gptq(w, here, Grid(4, 64)).quantized.codes == gptq(w.cuda(), there, Grid(4, 64)).quantized.codes.cpu()
    assert same.float().mean() > 0.98  # sums come in another order: a code at a border may fall to either side


def test_a_recorded_loop_gives_what_the_loop_gives():
    """The columns of one group, on numbers that are not those it was recorded on."""
    g = torch.Generator().manual_seed(1)
    work = partial(_columns, Grid(4, 32))
    given = [(torch.randn(32, 64, generator=g), torch.eye(32).triu() + 0.1 * torch.randn(32, 32, generator=g).triu())]
    given += [(torch.randn(32, 64, generator=g), given[0][1]) for _ in range(2)]
    scale, zero = torch.full((64,), 0.3), torch.full((64,), 8.0)
    recorded = replayed(work, given[0][0].cuda(), given[0][1].cuda(), scale.cuda(), zero.cuda())
    for w, upper in given:
        ours = recorded(w.cuda(), upper.cuda(), scale.cuda(), zero.cuda())
        for here, there in zip(work(w.clone(), upper, scale, zero), ours, strict=True):
            assert torch.allclose(here, there.cpu(), atol=1e-4)


def test_a_conversion_scores_as_it_does_on_the_processor(tmp_path):
    source = write_toy(tmp_path / "Toy.F32.gguf", toy_model())
    targets = [f"--to={t}" for t in ("fp16", "gptq", "awq", "Q4_K_M")]
    made = {}
    for device in ("cpu", "cuda"):
        options = ("--samples", 8, "--seqlen", 64, "--eval-chunks", 2, "--device", device, "--json")
        code, stdout, stderr = quantkit("convert", source, "-o", tmp_path / device, *targets, *options)
        assert code == 0, stderr
        made[device] = {v["target"]: v["kl_divergence"]["mean"] for v in json.loads(stdout)["variants"]}
    assert made["cuda"] == pytest.approx(made["cpu"], rel=0.1, abs=1e-5)
