"""`--vram`: what is planned within a limit, and what is refused. No device is needed to plan for one."""

from __future__ import annotations

import pytest
import torch
from test_convert import quantkit
from toy import toy_model, write_toy

from quantkit import Recipe, make_plan, open_model
from quantkit.errors import UsageError

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("vram") / "Toy.F32.gguf", toy_model())


def test_fewer_tokens_go_through_a_block_under_a_limit(source, monkeypatch):
    monkeypatch.setattr("quantkit.plan._flops_per_second", lambda device: 1e12)
    model = open_model(source)
    recipe = Recipe(to=("gptq-4bit-64g",), samples=64, seqlen=128, eval_text=None)
    free = make_plan(model, recipe, CUDA)
    sizes = {n: f"{free.peak_vram * n / 100 / 2**20:.6f}MiB" for n in (110, 85, 70, 10)}
    plans = {n: make_plan(model, recipe.model_copy(update={"vram": sizes[n]}), CUDA) for n in (110, 85, 70)}
    assert plans[110].batch_tokens == free.batch_tokens == 2048
    assert 128 <= plans[70].batch_tokens < plans[85].batch_tokens < 2048
    assert all(p.peak_vram <= free.peak_vram * n / 100 for n, p in plans.items())
    with pytest.raises(UsageError, match=r"--vram: this takes about 0\.\d\d GiB on the device, more than .*MiB"):
        make_plan(model, recipe.model_copy(update={"vram": sizes[10]}), CUDA)


@pytest.mark.parametrize(("size", "says"), [("24GiB", "limits a CUDA device"), ("much", "no size such as")])
def test_a_limit_that_means_nothing_is_one_line(source, tmp_path, size, says):
    command = ("convert", source, "-o", tmp_path / "out", "--to", "gptq", "--device", "cpu", "--vram", size)
    code, _, stderr = quantkit(*command)
    assert code == 2 and says in stderr and stderr.count("\n") == 1 and not (tmp_path / "out").exists()
