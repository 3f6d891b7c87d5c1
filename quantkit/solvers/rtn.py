"""Round to nearest: the range of each group from its extremes, weights to the nearest code; blind to activations."""

from __future__ import annotations

from torch import Tensor

from quantkit.codecs.grid import Grid, Quantized
from quantkit.stats import Stats


def rtn(weight: Tensor, stats: Stats | None, grid: Grid) -> Quantized:
    """Quantize `weight` (N, K) on `grid`; `stats` is not looked at."""
    groups = weight.float().unflatten(1, (-1, grid.group))
    return rounded(groups, *grid.plain(groups), grid)


def rounded(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Quantized:
    """The nearest codes of `groups` (N, G, g) under given parameters (N, G), as one record."""
    return Quantized(grid.codes(groups, scale, zero).flatten(1).byte(), scale.half(), zero.byte())
