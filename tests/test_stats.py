"""Sums over activations: what rounding factors to bf16 leaves of them."""

from __future__ import annotations

import torch

from quantkit.stats import Squares, Stats


def test_mixed_sums_lose_a_share_of_what_batches_differ_by():
    """Each sequence begins with a token of huge activations, as those of real models do."""
    g = torch.Generator().manual_seed(0)
    batches = torch.randn(6, 512, 600, generator=g) @ torch.randn(600, 600, generator=g).div(25)
    batches[:, ::128] += torch.randn(600, generator=g) * (torch.rand(600, generator=g) > 0.98) * 300
    wanted = batches[..., :300] * 2 + torch.randn(6, 512, 300, generator=g)
    whole, mixed = Stats.zeros(600), Stats.zeros(600, mixed=True)
    gram, aim = torch.zeros(600, 600).double(), torch.zeros(300, 600).double()
    for x, y in zip(batches, wanted, strict=True):
        whole, mixed = whole.add(x, wanted=y), mixed.add(x, wanted=y)
        factor, other = (t.bfloat16().double() for t in (x, y))
        gram, aim = gram + factor.T @ factor, aim + other.T @ factor
    assert torch.equal(whole.importance, mixed.importance)
    assert torch.equal(whole.act_scale, mixed.act_scale)
    gram.diagonal().copy_(whole.gram.diagonal())
    columns, outputs = gram.diagonal().sqrt(), wanted.double().square().sum((0, 1)).sqrt()
    assert (mixed.gram - gram).abs().div(columns[:, None] * columns).max() < 2**-12
    assert (mixed.wanted - aim).abs().div(outputs[:, None] * columns).max() < 2**-12


def test_batches_with_too_little_before_them_are_multiplied_as_float32():
    """As of experts that hardly any token of the first batches asks for."""
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, 320, generator=g) for rows in (0, 3, 200)]
    whole, mixed = Stats.zeros(320), Stats.zeros(320, mixed=True)
    for x in batches:
        whole, mixed = whole.add(x.bfloat16()), mixed.add(x)
    whole.gram.diagonal().copy_(mixed.gram.diagonal())  # squares are of what was not rounded
    assert torch.equal(whole.gram, mixed.gram) and mixed.rows == 203
    assert not torch.equal(whole.add(batches[2]).gram, mixed.add(batches[2]).gram)


def test_squares_alone_are_those_of_statistics():
    g = torch.Generator().manual_seed(0)
    batches = torch.randn(4, 2, 50, 40, generator=g)
    kinds = Stats.zeros(40), Squares.zeros(40), Squares.zeros(40)
    whole, alone, half = kinds
    for i, x in enumerate(batches):
        whole, alone = whole.add(x), alone.add(x)
        half = half.add(x) if i < 2 else half
    rest = Squares.zeros(40).add(batches[2]).add(batches[3])
    assert torch.equal(alone.squares, whole.squares) and alone.rows == whole.rows == 400
    torch.testing.assert_close(half.merge(rest).squares, alone.squares)
    assert half.merge(rest).rows == 400
