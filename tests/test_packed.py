"""GPTQ and AWQ words against layouts written out by hand, and against their own inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.codecs.grid import Grid, Quantized
from quantkit.codecs.packed import pack_awq, pack_bits, pack_gptq, unpack_awq, unpack_bits, unpack_gptq
from quantkit.errors import FormatError


def random_quantized(bits: int, n: int = 96, k: int = 128, group: int = 32, symmetric: bool = False) -> Quantized:
    g = torch.Generator().manual_seed(bits)
    zeros = torch.randint(1, 2**bits, (n, k // group), generator=g)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    return Quantized(
        torch.randint(0, 2**bits, (n, k), generator=g).byte(),
        torch.randn(n, k // group, generator=g).half(),
        zeros.byte(),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_codes_low_bits_first(bits):
    """One column as one big integer: code i stands at bit i * bits."""
    codes = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (64 * bits // 32, 5)
    for column in range(5):
        number = sum(int(c) << (i * bits) for i, c in enumerate(codes[:, column]))
        expected = [(number >> (32 * j)) & 0xFFFFFFFF for j in range(len(words))]
        assert [int(w) & 0xFFFFFFFF for w in words[:, column]] == expected
    assert np.array_equal(unpack_bits(words.numpy(), bits), codes.numpy())


def test_three_bit_codes_run_10_1_10_1_10():
    """Ten whole codes in the first word, then two bits of the eleventh; its third bit opens the second word."""
    codes = torch.zeros(32, 1, dtype=torch.int64)
    codes[10], codes[21] = 0b111, 0b111
    first, second, third = (int(w) & 0xFFFFFFFF for w in pack_bits(codes, 3)[:, 0])
    assert first == 0b11 << 30 and second == 1 | (1 << 31) and third == 0b11


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_v1_stores_zero_less_one_and_reads_back(bits):
    q = random_quantized(bits, symmetric=True)
    parts = pack_gptq(q, bits)
    assert torch.equal(unpack_gptq(parts, bits, v2=False, where="w"), q.dequantize())
    if bits == 4:
        assert set(parts["qzeros"].flatten().tolist()) == {0x77777777}
    assert parts["g_idx"].tolist() == [k // 32 for k in range(128)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_v2_keeps_any_zero(bits):
    q = random_quantized(bits)
    assert torch.equal(unpack_gptq(pack_gptq(q, bits, v2=True), bits, v2=True, where="w"), q.dequantize())


def test_gptq_groups_may_be_permuted_by_the_reader():
    q = random_quantized(4, symmetric=True)
    parts = pack_gptq(q, 4)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    words = pack_bits(q.codes[:, order].T, 4)
    moved = parts | {"qweight": words, "g_idx": parts["g_idx"][order]}
    assert torch.equal(unpack_gptq(moved, 4, v2=False, where="w"), q.dequantize()[:, order])


def test_awq_interleaves_nibbles():
    """A row of codes 0..7 over eight outputs: the word's nibbles, low first, are columns 0 2 4 6 1 3 5 7."""
    q = Quantized(torch.arange(8, dtype=torch.uint8)[:, None], torch.ones(8, 1).half(), torch.zeros(8, 1).byte())
    word = int(pack_awq(q)["qweight"][0, 0]) & 0xFFFFFFFF
    assert [(word >> (4 * i)) & 15 for i in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_awq_reads_back():
    q = random_quantized(4)
    parts = pack_awq(q)
    assert parts["qweight"].shape == (128, 12) and parts["qzeros"].shape == (4, 12) and parts["scales"].shape == (4, 96)
    assert torch.equal(unpack_awq(parts, "w"), q.dequantize())


def test_parts_that_do_not_fit_together_are_refused():
    parts = pack_gptq(random_quantized(4, symmetric=True), 4)
    with pytest.raises(FormatError, match="g_idx"):
        unpack_gptq(parts | {"g_idx": parts["g_idx"] + 4}, 4, False, "layer")
    awq = pack_awq(random_quantized(4))
    with pytest.raises(FormatError, match="do not fit together"):
        unpack_awq(awq | {"scales": awq["scales"][:3]}, "layer")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_grid_holds_what_it_can_hold(bits, symmetric):
    grid = Grid(bits, 16, symmetric)
    w = torch.randn(40, 7, 16, generator=torch.Generator().manual_seed(bits))
    for scale, zero in (grid.plain(w), grid.fit(w)):
        assert torch.equal(scale, scale.half().float()) and bool((scale != 0).all())
        codes = grid.codes(w, scale, zero)
        assert codes.min() >= 0 and codes.max() <= grid.top and torch.equal(codes, codes.round())
        on_grid = grid.levels(codes, scale, zero)
        assert torch.equal(grid.codes(on_grid, scale, zero), codes)
    plain, fitted = (((grid.levels(grid.codes(w, *p), *p) - w) ** 2).sum() for p in (grid.plain(w), grid.fit(w)))
    assert fitted < plain or bits == 8  # at 8 bits there is next to nothing to gain by clipping


@pytest.mark.parametrize("rows", [5, 16])
def test_importance_may_be_of_columns_of_groups_or_of_weights(rows):
    """Of several shapes the same is meant, also where there are as many rows as columns in a group."""
    grid, rng = Grid(3, 16), torch.Generator().manual_seed(rows)
    w, columns = torch.randn(rows, 4, 16, generator=rng), torch.rand(16, generator=rng) ** 4
    groups = columns.expand(4, 16) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    alone = [grid.fit(w[:, i], groups[i]) for i in range(4)]
    for importance in (groups, groups.expand_as(w)):
        scale, zero = grid.fit(w, importance)
        for i, (s, z) in enumerate(alone):
            assert torch.equal(scale[:, i], s) and torch.equal(zero[:, i], z)
    assert not torch.equal(grid.fit(w)[0], grid.fit(w, columns)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_constant_and_tiny_groups_stay_finite(symmetric):
    grid = Grid(4, 8, symmetric)
    rows = [torch.zeros(8), torch.full((8,), 3.0), torch.full((8,), -2.0), torch.full((8,), 1e-30), torch.ones(8) * 6e4]
    w = torch.stack(rows)[:, None]
    for parameters in (grid.plain(w), grid.fit(w)):
        back = grid.levels(grid.codes(w, *parameters), *parameters)
        assert bool(torch.isfinite(back).all())
        assert torch.equal(back[0], torch.zeros(1, 8))
        assert bool(((back - w).abs() <= 0.51 * parameters[0].abs()[..., None]).all())
