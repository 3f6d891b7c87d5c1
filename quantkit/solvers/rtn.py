"""Round to nearest: the range of each group from its extremes, or searched under the importance of its columns."""

from __future__ import annotations

from quantkit.codecs.grid import Grid, Quantized
from quantkit.codecs.sharing import share_out, slabs
from quantkit.later import Tensor, torch
from quantkit.stats import Stats


def rtn(weight: Tensor, grid: Grid) -> Quantized:
    """Quantize `weight` (N, K) on `grid`, each group's range from its extremes."""
    groups = weight.float().unflatten(1, (-1, grid.group))
    return rounded(groups, *grid.plain(groups), grid)


def weighted(weight: Tensor, stats: Stats, grid: Grid) -> Quantized:
    """Quantize `weight` (N, K) on `grid`, each group's range searched under the importance of its columns.

    A column that no calibration token reached counts as an average one.
    """
    importance = stats.importance
    seen = torch.where(importance == 0, importance.mean(), importance)
    columns = seen.unflatten(0, (-1, grid.group))

    def fitted(rows: slice) -> Quantized:
        groups = weight[rows].float().unflatten(1, (-1, grid.group))
        return rounded(groups, *grid.fit(groups, columns), grid)

    return Quantized.stacked(share_out(fitted, slabs(len(weight), weight.shape[1], weight.device), weight.device))


def rounded(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Quantized:
    """The nearest codes of `groups` (N, G, g) under given parameters (N, G), as one record."""
    return Quantized(grid.codes(groups, scale, zero).flatten(1).byte(), scale.half(), zero.byte())
