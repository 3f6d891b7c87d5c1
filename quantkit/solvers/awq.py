"""AWQ: before rounding, scale up the columns that large activations reach, and scale what produces them down.

Lin et al. 2023 (arXiv:2306.00978). The scale of column k is s_k = act_scale_k^a, with a searched from coarse to fine;
then the range of each group is clipped, again by search. Both searches minimize tr(delta G delta^T) on the Gram matrix
of the calibration activations, so no activations are stored: the clip search uses the group's own block of G.
"""

from __future__ import annotations

from collections.abc import Callable

from quantkit.codecs.grid import Grid, Quantized
from quantkit.codecs.sharing import share_out, slabs
from quantkit.later import Tensor, torch
from quantkit.solvers.gptq import gptq
from quantkit.solvers.rtn import rounded, rtn
from quantkit.stats import Stats, error

Solve = Callable[[Tensor, Tensor, Stats, Grid], Tensor]  # weight (N, K), scales of columns (K,) -> what is left of it

ROWS = 256  # outputs that the search for a scale looks at, evenly spaced: one scale serves them all
STEPS = 20  # exponents are multiples of 1/20 below 1 (llm-awq `auto_scale.py`, n_grid)
SHRINK = tuple(1.0 - i / 32 for i in range(17))  # of ranges: all are tried, for half of them cost 2% of the KL
STRIDES = (4, 2, 1)  # how far apart those are that are tried, the first time over all, then beside the best


def nearest(weight: Tensor, scale: Tensor, stats: Stats, grid: Grid) -> Tensor:
    """What rounding to nearest makes of `weight` with its columns scaled."""
    return rtn(weight * scale, grid).dequantize() / scale


def compensated(weight: Tensor, scale: Tensor, stats: Stats, grid: Grid) -> Tensor:
    """What GPTQ makes of it in one pass, for a search whose scales GPTQ is to be used with."""
    found = gptq(weight * scale, stats.scaled(1 / scale), grid, polishing=0)
    return found.quantized.dequantize() / scale


def awq_scale(weight: Tensor, stats: Stats, grid: Grid, solve: Solve = nearest) -> Tensor:
    """The column scales (K,) for `weight` (N, K): all the weights that read one activation, stacked.

    `solve` is what scales are tried with. All ones where no exponent does better than none. Columns without activations
    keep scale 1.
    """
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device).round().long()
    weight = weight[rows]
    losses: dict[int, float] = {}

    def loss(step: int) -> float:
        if step not in losses:
            scale = _scale(stats.act_scale, step / STEPS)
            losses[step] = error(solve(weight, scale, stats, grid) - weight, stats.gram).item()
        return losses[step]

    best = min(range(0, STEPS, STRIDES[0]), key=loss)
    for stride in STRIDES[1:]:
        best = min((s for s in (best, best - stride, best + stride) if 0 <= s < STEPS), key=loss)
    return _scale(stats.act_scale, best / STEPS)


def _scale(act: Tensor, exponent: float) -> Tensor:
    """act^exponent with its extremes around 1; 1 where nothing is active."""
    alive = act > 0
    s = torch.where(alive, act.clamp_min(1e-10) ** exponent, 1.0)
    s = torch.where(alive, s / (s[alive].max() * s[alive].min()).sqrt(), 1.0) if alive.any() else s
    return s.clamp(1e-4, 1e4)


def awq_round(weight: Tensor, stats: Stats, grid: Grid, scale: Tensor) -> Quantized:
    """Round `weight` (N, K), already multiplied by `scale` (K,), with each group's range clipped where that helps."""
    g, n = grid.group, weight.shape[1] // grid.group
    inverse = 1 / scale  # the activations that reach a scaled weight are scaled down
    inside = inverse.view(n, g)
    own = torch.stack([block[:, i] for i, block in enumerate(stats.gram.view(n, g, n, g))])  # (G, g, g)
    own *= inside[:, :, None] * inside[:, None]
    parts = slabs(len(weight), weight.shape[1], weight.device)
    return Quantized.stacked(share_out(lambda rows: _clipped(weight[rows], own, grid), parts, weight.device))


def _clipped(weight: Tensor, own: Tensor, grid: Grid) -> Quantized:
    """Rows rounded, each group under the range of least error; `own` (G, g, g) are the groups' Gram matrices."""
    groups = weight.unflatten(1, (-1, grid.group)).transpose(0, 1).contiguous()  # (G, N, g)
    low, high = groups.amin(-1), groups.amax(-1)
    reach = torch.maximum(-low, high)
    best, best_error = grid.between(low, high), torch.full_like(low, torch.inf)
    for shrink in SHRINK:
        scale, zero = grid.between(torch.maximum(low, -shrink * reach), torch.minimum(high, shrink * reach))
        off = grid.levels(grid.codes(groups, scale, zero), scale, zero).sub_(groups)
        e = torch.bmm(off, own).mul_(off).sum(-1)
        better = e < best_error
        best_error = torch.where(better, e, best_error)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
    return rounded(groups.transpose(0, 1), best[0].T, best[1].T, grid)
