"""Causal attention in steps of queries: what torch makes of all of them at once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from toy import toy_model, write_toy
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quantkit.attention import AT_ONCE, FOR_GRADIENT, STEP, _attended, attention_for, causal_in_steps
from quantkit.forward import embed, network, run
from quantkit.model import open_model


def attention(groups: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    return module


@pytest.mark.parametrize("length", [1, STEP, STEP + 1, FOR_GRADIENT, FOR_GRADIENT + 1, AT_ONCE // 4, AT_ONCE // 4 + 1])
@pytest.mark.parametrize("heads,of_keys", [(4, 4), (6, 2)])
def test_it_is_causal_attention(length: int, heads: int, of_keys: int):
    g = torch.Generator().manual_seed(length)
    query = torch.randn(2, length, heads, 16, generator=g).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(2, of_keys, length, 16, generator=g).requires_grad_() for _ in range(2))
    module, inputs = attention(heads // of_keys), (query, key, value)
    out, _ = causal_in_steps(module, *inputs, None, scaling=0.3)
    whole = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    with torch.no_grad():
        alone, _ = causal_in_steps(module, *inputs, None, scaling=0.3)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(alone, whole)
    for mine, theirs in zip(*(torch.autograd.grad(o.square().sum(), inputs) for o in (out, whole)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_is_not_causal_alone_is_left_to_transformers():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 130, 16, generator=g) for _ in range(3))
    window = torch.ones(1, 1, 130, 130, dtype=torch.bool).tril().triu(-40)
    given = (
        {"attention_mask": window},  # Gemma's sliding window
        {"attention_mask": None, "is_causal": False},
        {"attention_mask": None, "position_bias": torch.randn(1, 2, 130, 130, generator=g)},
    )
    for how in given:
        out, _ = causal_in_steps(attention(1), query, key, value, **how)
        assert torch.equal(out, sdpa_attention_forward(attention(1), query, key, value, **how)[0])
    one, _ = causal_in_steps(attention(1), query[:, :, -1:], key, value, None)  # a token that is generated
    torch.testing.assert_close(
        one, scaled_dot_product_attention(query, key, value, is_causal=True)[:, :, -1:].transpose(1, 2)
    )


def test_scores_are_float32_where_values_are_bf16(monkeypatch):
    monkeypatch.setattr("quantkit.attention.has_tiles", lambda: False)
    g = torch.Generator().manual_seed(0)
    query, key = (20 * torch.randn(1, 2, 130, 16, generator=g) for _ in range(2))  # in bf16 scores would be off by 4
    value = torch.randn(1, 2, 130, 16, generator=g)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = causal_in_steps(attention(1), query, key, value.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_asked_for_bf16_where_it_has_tiles(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr("quantkit.attention.has_tiles", lambda: True)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 130, 16, generator=g).to(dtype) for _ in range(3)]
    with mock.patch("quantkit.attention._attended", wraps=_attended) as asked:
        out, _ = causal_in_steps(attention(1), *inputs, None)
    assert asked.called == (dtype == torch.float32)
    if not asked.called:
        assert torch.equal(out, sdpa_attention_forward(attention(1), *inputs, None)[0])


def test_a_network_on_a_cpu_attends_in_steps(tmp_path):
    net = network(open_model(write_toy(tmp_path / "toy.gguf", toy_model())), torch.device("cpu"))
    states, length = embed(net, torch.arange(2 * STEP + 5)[None] % 50), 2 * STEP + 5
    with net.block(0) as block, mock.patch("quantkit.attention._attended", wraps=_attended) as asked:
        run(states, 0, block, net.device)
    (call,) = asked.call_args_list  # for the one sequence
    assert [t.shape[1] for t in call.args] == [length] * 3


def test_a_cuda_device_has_its_own_kernels():
    assert attention_for("cuda:0") == "sdpa" != attention_for("cpu")
