"""How float32 is multiplied on the CPU: whole, whoever multiplies it."""

from __future__ import annotations

import pytest
import torch
from toy import toy_model, write_toy

from quantkit.cli.device import own
from quantkit.forward import network
from quantkit.hardware import multiply_at_full_width
from quantkit.model import open_model

MATMUL = torch.backends.mkldnn.matmul
AMD, INTEL = ({"avx512_f": True, "cpu_name": name} for name in ("AMD EPYC", "Intel(R) Xeon(R)"))


@pytest.fixture(autouse=True)
def as_torch_begins(monkeypatch):
    """As a new process has it, and as this one had it afterwards."""
    before, MATMUL.fp32_precision = MATMUL.fp32_precision, "none"
    yield
    MATMUL.fp32_precision = before


def test_products_stay_float32():
    multiply_at_full_width()  # whatever this machine makes of it
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 500, generator=g), torch.randn(500, 200, generator=g)
    exact = a.double() @ b.double()
    for made in (a @ b, torch.bmm(a[None], b[None])[0], torch.nn.functional.linear(a, b.T)):
        assert (made - exact).abs().max() < 1e-6 * exact.abs().max()  # with factors of bf16 it is 3e-3


def test_only_amds_wide_registers_need_it(monkeypatch):
    for can in (INTEL, AMD | {"avx512_f": False}, {}):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda can=can: can)
        multiply_at_full_width()
        assert MATMUL.fp32_precision == "none"


def test_a_processor_that_would_round_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: AMD)
    monkeypatch.setattr("quantkit.hardware.torch.equal", lambda a, b: False)
    multiply_at_full_width()
    assert MATMUL.fp32_precision == "none"


def test_a_command_asks_for_it_on_a_cpu_and_an_importing_program_is_left_alone(monkeypatch, tmp_path):
    network(open_model(write_toy(tmp_path / "toy.gguf", toy_model())), torch.device("cpu"))
    assert MATMUL.fp32_precision == "none" and torch.get_float32_matmul_precision() == "highest"
    asked = []
    monkeypatch.setattr("quantkit.cli.device.multiply_at_full_width", lambda: asked.append(True))
    for device, times in (("cuda:0", 0), ("cpu", 1)):
        assert own(torch.device(device)) == torch.device(device) and len(asked) == times
