"""From one type straight to another, without torch: against decoding and encoding each by itself, slab by slab."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.codecs import cpu, decode, encode, in_bytes, in_floats, lookup, read_through, recode, sharing
from quantkit.errors import BadInput

ROWS, WIDTH = 24, 512


def normal(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32", "Q8_0", "Q4_K", "IQ4_XS"])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "Q8_0", "Q3_K"])
def test_bytes_are_those_of_two_steps(source, kind, monkeypatch):
    monkeypatch.setattr(sharing, "SLAB", 3 * WIDTH)
    stored = encode(source, torch.from_numpy(normal()))
    floats = decode(source, stored, (ROWS, WIDTH))
    raw, loss = recode(kind, in_bytes(source, stored.numpy()), ROWS, WIDTH)
    expected = encode(kind, floats)
    assert np.array_equal(raw, expected.numpy())
    assert loss == pytest.approx(share_lost(kind, expected, floats, every=3), rel=1e-4)  # a row of each slab
    monkeypatch.undo()
    _, loss = recode(kind, in_bytes(source, stored.numpy()), ROWS, WIDTH)
    assert loss == pytest.approx(share_lost(kind, expected, floats, every=1), rel=1e-4)


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS"])
def test_what_numpy_encodes_in_pieces_is_what_it_encodes_whole(kind, monkeypatch):
    importance = np.random.default_rng(1).random(WIDTH, np.float32)
    whole = cpu.encode(lookup(kind), normal(), importance)
    monkeypatch.setattr(cpu, "IN_CACHE", 5 * WIDTH)
    assert np.array_equal(cpu.encode(lookup(kind), normal(), importance), whole)


def share_lost(kind: str, raw: torch.Tensor, floats: torch.Tensor, every: int) -> float:
    error = decode(kind, raw, floats.shape) - floats
    return (error[::every].double().square().sum() / floats[::every].double().square().sum()).item()


def test_half_precision_is_torchs_for_every_magnitude():
    """Subnormals, ties and the largest numbers: all bits of what torch casts."""
    x = np.geomspace(1e-9, 65504, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    x[0] = (np.arange(WIDTH) + 0.5) * 2.0**-24
    raw, _ = recode("F16", in_floats(x), ROWS, WIDTH)
    assert np.array_equal(raw.view(np.uint16), torch.from_numpy(x).half().view(torch.uint16).numpy())


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_any_count_of_numbers_is_cast_whole(kind, dtype):
    for count in range(1, 20):
        x = torch.from_numpy(normal()[:1, :count].copy())
        raw, _ = recode(kind, in_floats(x.numpy()), 1, count)
        assert torch.equal(torch.from_numpy(raw).view(dtype), x.to(dtype))
        read = in_bytes(kind, raw)(slice(None), np.empty((1, count), np.float32))
        assert np.array_equal(read, x.to(dtype).float().numpy())


def test_experts_are_weighed_each_by_its_own_row():
    x, importance = normal(), np.random.default_rng(1).random((3, WIDTH)).astype(np.float32) ** 8
    raw, _ = recode("Q4_K", in_floats(x), ROWS, WIDTH, importance)
    each = [encode("Q4_K", torch.from_numpy(x[8 * i : 8 * i + 8]), torch.from_numpy(importance[i])) for i in range(3)]
    assert np.array_equal(raw, torch.cat(each).numpy())


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (np.nan, "Q4_K", "not finite"),
        (-np.inf, "F32", "not finite"),
        (1e9, "Q6_K", "a weight of 1e\\+09 is out of range"),
        (7e4, "F16", "a weight is too large for it"),
        (9e7, "Q8_0", "a weight is too large for it"),
    ],
)
@pytest.mark.parametrize("slab", [2 * WIDTH, ROWS * WIDTH])
def test_what_a_type_cannot_hold_is_refused(value, kind, says, slab, monkeypatch):
    monkeypatch.setattr(sharing, "SLAB", slab)
    x = normal()
    x[ROWS - 1, 3] = value
    with pytest.raises(BadInput, match=says):
        recode(kind, in_floats(x), ROWS, WIDTH)


def test_weights_whose_squares_overflow_are_finite_all_the_same():
    x = np.full((ROWS, WIDTH), 1e30, np.float32)
    raw, loss = recode("BF16", in_floats(x), ROWS, WIDTH)
    assert 0 < loss < 1e-4 and lookup("BF16").row_bytes(WIDTH) == raw.shape[1]
    read_through(in_floats(x), ROWS, WIDTH)
    x[5, 5] = np.inf
    with pytest.raises(BadInput, match="not finite"):
        read_through(in_floats(x), ROWS, WIDTH)
