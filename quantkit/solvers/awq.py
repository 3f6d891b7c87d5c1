"""AWQ: before rounding, scale up the columns that large activations reach, and scale what produces them down.

Lin et al. 2023 (arXiv:2306.00978). The scale of column k is s_k = act_scale_k^a, with a searched in 20 steps; then the
range of each group is clipped, again by search. Both searches minimize tr(delta G delta^T) on the Gram matrix of the
calibration activations, so no activations are stored: the clip search uses the group's own block of G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.codecs.grid import SHRINK, Grid, Quantized
from quantkit.solvers.rtn import rounded
from quantkit.stats import Stats, error

ROWS = 1024  # outputs that the search for a scale looks at, evenly spaced: one scale serves them all
STEPS = 20  # exponents a = 0, 1/20, ... 19/20 (llm-awq `auto_scale.py`, n_grid)


def awq_scale(weight: Tensor, stats: Stats, grid: Grid) -> Tensor:
    """The column scales (K,) for `weight` (N, K): all the weights that read one activation, stacked.

    All ones where no exponent does better than none. Columns without activations keep scale 1.
    """
    weight = weight[:: max(1, len(weight) // ROWS)]
    act = stats.act_scale
    alive = act > 0
    best, best_error = torch.ones_like(act), torch.inf
    for step in range(STEPS):
        s = torch.where(alive, act.clamp_min(1e-10) ** (step / STEPS), 1.0)
        s = torch.where(alive, s / (s[alive].max() * s[alive].min()).sqrt(), 1.0) if alive.any() else s
        s = s.clamp(1e-4, 1e4)
        groups = (weight * s).unflatten(1, (-1, grid.group))
        approx = rounded(groups, *grid.plain(groups), grid).dequantize() / s
        if (e := error(approx - weight, stats.gram).item()) < best_error:
            best, best_error = s, e
    return best


def awq_round(weight: Tensor, stats: Stats, grid: Grid, scale: Tensor) -> Quantized:
    """Round `weight` (N, K), already multiplied by `scale` (K,), with each group's range clipped where that helps."""
    g = grid.group
    groups = weight.unflatten(1, (-1, g))
    n = groups.shape[1]
    inverse = 1 / scale  # the activations that reach a scaled weight are scaled down
    gram = (stats.gram * inverse[:, None] * inverse).view(n, g, n, g)
    own = torch.stack([gram[i, :, i] for i in range(n)])  # (G, g, g): each group's block on the diagonal
    best_error = torch.full(groups.shape[:2], torch.inf, device=weight.device)
    best = grid.plain(groups)
    for shrink in SHRINK:
        reach = shrink * groups.abs().amax(-1, keepdim=True)
        parameters = grid.plain(groups.clamp(-reach, reach))
        off = grid.levels(grid.codes(groups, *parameters), *parameters) - groups
        e = (torch.einsum("rgi,gij->rgj", off, own) * off).sum(-1)
        better = e < best_error
        best_error = torch.where(better, e, best_error)
        best = (torch.where(better, parameters[0], best[0]), torch.where(better, parameters[1], best[1]))
    return rounded(groups, *best, grid)
