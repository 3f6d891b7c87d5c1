"""GPTQ: round one column after another, and let the columns still to come make up for each rounding error.

Frantar et al. 2022 (arXiv:2210.17323), in the form of IST-DASLab `gptq.py`, with these choices:
  - Group-aware order: groups, and columns inside a group, are visited by falling diag(H), so that the columns that
    matter most are rounded while the most others can still make up for them. Groups stay what they are on disk, so a
    reader needs no permutation (`g_idx` stays k // g), unlike act-order.
  - The range of a group is searched under diag(H), on the weights as corrected so far, when its first column is due.
  - Codes are chosen under the fp16 scale that is stored.
A column that no calibration token reached has an all-zero row in H: it is rounded, and neither gives nor takes errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quantkit.codecs.grid import Grid, Quantized
from quantkit.errors import BadInput
from quantkit.stats import Stats

DAMP = 0.05  # of the mean diagonal, added to the diagonal; multiplied by 10 where the Cholesky factor does not exist


def gptq(weight: Tensor, stats: Stats, grid: Grid, damp: float = DAMP) -> Quantized:
    """Quantize `weight` (N, K) on `grid`, minimizing tr(delta H delta^T) greedily.

    Rows do not influence one another: weights that read the same activation may be stacked and solved as one. Raises
    BadInput where the statistics are not finite.
    """
    hessian = stats.hessian
    if not bool(torch.isfinite(hessian).all()):
        raise BadInput("the calibration statistics are not finite", hint="the model overflows on this text")
    g = grid.group
    diagonal = hessian.diagonal()
    importance = torch.where(diagonal == 0, diagonal.mean(), diagonal)  # unseen is not worthless: an average column
    order = group_aware_order(importance, g)
    upper = inverse_factor(hessian[order][:, order], damp)
    w = weight.float()[:, order].T.contiguous()  # (K, N): the columns in their order, each contiguous
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales, zeros = [], []
    for start in range(0, len(w), g):
        block = slice(start, start + g)
        with one_thread():
            scale, zero = grid.fit(w[block].T.contiguous(), importance[order[block]])
            codes[block], errors = _columns(w[block], upper[block, block], scale, zero, grid)
        w[start + g :].addmm_(upper[block, start + g :].T, errors, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    back = torch.argsort(order)
    groups = torch.argsort(order[::g] // g)
    return Quantized(
        codes[back].T.contiguous(), torch.stack(scales, 1)[:, groups].half(), torch.stack(zeros, 1)[:, groups].byte()
    )


def _columns(w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round the columns w (g, N) of one group in turn, in place; codes and scaled errors, both (g, N)."""
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for i, column in enumerate(w):
        codes[i] = grid.codes(column[:, None], scale, zero)[:, 0]
        errors[i] = (column - grid.levels(codes[i][:, None], scale, zero)[:, 0]) / upper[i, i]
        w[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for many small operations: waking a second one costs more than it does."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def group_aware_order(importance: Tensor, group: int) -> Tensor:
    """The order in which columns are visited: groups by their largest importance, columns inside by their own.

    >>> group_aware_order(torch.tensor([1.0, 4.0, 9.0, 2.0]), 2)
    tensor([2, 3, 1, 0])
    """
    rows = importance.view(-1, group)
    inside = rows.argsort(dim=1, descending=True, stable=True)
    first = rows.amax(1).argsort(dim=0, descending=True, stable=True)
    return (inside + torch.arange(len(rows), device=rows.device)[:, None] * group)[first].flatten()


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse of `hessian` (K, K), by more damping where it takes that."""
    mean = hessian.diagonal().mean().item() or 1.0
    dead = hessian.diagonal() == 0
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        damped.diagonal()[dead] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
        damp *= 10
