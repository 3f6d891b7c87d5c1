"""AWQ: before rounding, scale up the columns that large activations reach, and scale what produces them down.

Lin et al. 2023 (arXiv:2306.00978). The scale of column k is s_k = act_scale_k^a, with a searched from coarse to fine;
then the range of each group is clipped, again by search. Both searches minimize tr(delta G delta^T) on the Gram matrix
G of the calibration activations, so no activations are stored.
Groups are clipped one after the other, each behind the errors of all others: what clipping takes off outputs adds up
over groups, which a search by each group's own block of G (llm-awq `auto_clip.py`) does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from quantkit.codecs.grid import Grid, Quantized
from quantkit.codecs.sharing import one_each, share_out
from quantkit.later import Tensor, on_cpu, torch
from quantkit.solvers.gptq import gptq
from quantkit.solvers.rtn import rounded, rtn
from quantkit.stats import Stats, error

Solve = Callable[[Tensor, Tensor, Stats, Grid], Tensor]  # weight (N, K), scales of columns (K,) -> what is left of it

ROWS, ROWS_SOLVED = 128, 256  # outputs, evenly spaced, that a search by rounding looks at, and one by GPTQ
STEPS = 20  # exponents are multiples of 1/20 below 1 (llm-awq `auto_scale.py`, n_grid)
STRIDES = (4, 2, 1)  # how far apart those are that are tried, the first time over all, then beside the best
CLIP, MOST = 1 / 32, 8  # a range is clipped by so much, and at most so many times
TRIED = (range(0, MOST + 1, 2), range(-1, 2))  # how often: over all groups like this, then again beside the best
SLAB = 512  # rows that a CPU clips at a time: a group of them in all its ranges about fills a core's cache


def nearest(weight: Tensor, scale: Tensor, stats: Stats, grid: Grid) -> Tensor:
    """What rounding to nearest makes of `weight` with its columns scaled."""
    return rtn(weight * scale, grid).dequantize() / scale


def compensated(weight: Tensor, scale: Tensor, stats: Stats, grid: Grid) -> Tensor:
    """What GPTQ makes of it in one pass, for a search whose scales GPTQ is to be used with."""
    found = gptq(weight * scale, stats.scaled(1 / scale), grid, polishing=0)
    return found.quantized.dequantize() / scale


def awq_scale(weight: Tensor, stats: Stats, grid: Grid, solve: Solve = nearest, most: int = ROWS) -> Tensor:
    """The column scales (K,) for `weight` (N, K): all the weights that read one activation, stacked.

    `solve` is what scales are tried with, on `most` rows. All ones where no exponent does better than none. Columns
    without activations keep scale 1.
    """
    rows = torch.linspace(0, len(weight) - 1, min(most, len(weight)), device=weight.device).round().long()
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
    """Round `weight` (N, K), already multiplied by `scale` (K,), with each group's range clipped where that helps.

    No row's error is above that of rounding to nearest.
    """
    gram, inverse = stats.gram, 1 / scale  # the activations that reach a scaled weight are scaled down
    parts = one_each(len(weight), weight.device, most=SLAB if on_cpu(weight.device) else None)
    return Quantized.stacked(share_out(lambda rows: _clipped(weight[rows], gram, inverse, grid), parts, weight.device))


def _clipped(weight: Tensor, gram: Tensor, inverse: Tensor, grid: Grid) -> Quantized:
    """Rows rounded; by coordinate descent on their error, whose coordinates are the ranges of groups."""
    groups = weight.unflatten(1, (-1, grid.group)).transpose(0, 1).contiguous()  # (G, N, g)
    low, high = groups.amin(-1), groups.amax(-1)
    reach = torch.maximum(-low, high)
    scale, zero = grid.between(low, high)

    def off(group: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return grid.levels(grid.codes(group, scale, zero), scale, zero).sub_(group)

    made = off(groups, scale, zero).transpose(0, 1).flatten(1).mul_(inverse)  # (N, K), of the weight as it was
    times = torch.zeros_like(low)
    for tried, i in product([times.new_tensor(tried)[:, None] for tried in TRIED], range(len(groups))):
        own, group = slice(i * grid.group, (i + 1) * grid.group), groups[i]
        inside, factor = gram[own, own], inverse[own]
        others = (made @ gram[own].T).addmm_(made[:, own], inside, alpha=-1).mul_(2 * factor)
        often = (times[i] + tried).clamp_(0, MOST)  # (ranges, N)
        most = (1 - CLIP * often) * reach[i]
        ranges = grid.between(torch.maximum(low[i], -most), torch.minimum(high[i], most))
        delta = off(group, *ranges)  # (ranges, N, g)
        inside = inside * factor * factor[:, None]
        best = (delta @ inside).add_(others).mul_(delta).sum(-1).min(0, keepdim=True).indices
        times[i], scale[i], zero[i] = (of.gather(0, best)[0] for of in (often, *ranges))
        made[:, own] = off(group, scale[i], zero[i]).mul_(factor)
    return rounded(groups.transpose(0, 1), scale.T, zero.T, grid)
