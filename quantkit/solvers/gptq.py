"""GPTQ: round one column after another, and let the columns still to come make up for each rounding error.

Frantar et al. 2022 (arXiv:2210.17323), in the form of IST-DASLab `gptq.py`, with these choices:
  - Group-aware order: groups, and columns inside a group, are visited by falling diag(H), so that the columns that
    matter most are rounded while the most others can still make up for them. Groups stay what they are on disk, so a
    reader needs no permutation (`g_idx` stays k // g), unlike act-order (`by_activation`).
  - The range of a group is searched under diag(H), on the weights as corrected so far, when its first column is due.
  - Codes are chosen under the fp16 scale that is stored.
  - Where the statistics are of activations behind a quantized prefix, what is rounded is not the weight but the one
    that comes nearest to the source's outputs on those activations (the asymmetric calibration of GPTAQ,
    arXiv:2504.02692, in closed form: `aim`).
  - Greedy choices are then reconsidered: `polish` goes over the groups again, and gives each its best scale and each
    of its columns its best code, all others as they are. The error never grows.
Rows are independent of one another: where there are many, each thread solves its share of them.
A column that no calibration token reached has an all-zero row in H: it is rounded, and neither gives nor takes errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Generic, Protocol, Self, TypeVar

from quantkit.codecs.grid import Grid, Quantized
from quantkit.codecs.sharing import one_each, one_thread, share_out
from quantkit.errors import BadInput
from quantkit.later import Tensor, torch
from quantkit.solvers.damping import added, damped_factor, inverse_factor, seen, with_damping
from quantkit.solvers.replay import replayed
from quantkit.solvers.rtn import rtn, weighted
from quantkit.stats import Stats, errors, told

DAMP = 0.3  # of the mean diagonal, added to the diagonal: with less, codes fit the calibration text only
AIM_DAMP = 1.0  # the same for `aim`, which fits as many numbers to that text as the weight has
POLISH = 2  # times that all groups are reconsidered
LEAST = 4096  # rows to a thread: two that take smaller steps wait for the interpreter more than they work
CHUNK = 16  # columns that are updated one by one; those behind them are by one product


class Codes(Protocol):
    """A weight as it is stored."""

    def dequantize(self) -> Tensor:
        """The weight that a reader gets, (N, K) float32."""

    def rows(self, sizes: list[int]) -> list[Self]:
        """Cut by rows."""


Q = TypeVar("Q", bound=Codes)


@dataclass(frozen=True)
class Solution(Generic[Q]):
    """What a solver found, and how: errors are the diagonal of delta H delta^T, energy that of W H W^T, (N,) each.

    All three are 0 in rows where they were not taken.
    """

    quantized: Q
    errors: Tensor
    rounded: Tensor  # the errors of rounding to nearest
    energy: Tensor
    damp: float
    fallback: str = ""  # why the weight is rounded and no more
    order: str = "groups by importance"

    @property
    def loss(self) -> float:
        """The share of the energy that is lost."""
        return (self.errors.sum() / self.energy.sum().clamp_min(1e-30)).clamp_min(0).item()

    @property
    def log(self) -> dict[str, Any]:
        """For the report: the loss of rounding alone, and how this one was found."""
        rounded = (self.rounded.sum() / self.energy.sum().clamp_min(1e-30)).clamp_min(0).item()
        return {"loss_rounded": rounded, "damp": self.damp, "order": self.order, "fallback": self.fallback or None}

    def rows(self, sizes: list[int]) -> list[Solution[Q]]:
        """Cut by rows: the inverse of solving several weights of one input as one."""
        parts = (t.split(sizes) for t in (self.errors, self.rounded, self.energy))
        cut = zip(self.quantized.rows(sizes), *parts, strict=True)
        return [replace(self, quantized=q, errors=e, rounded=r, energy=w) for q, e, r, w in cut]


def gptq(weight: Tensor, stats: Stats, grid: Grid, damp: float = DAMP, polishing: int = POLISH) -> Solution[Quantized]:
    """Quantize `weight` (N, K) on `grid`, minimizing tr(delta H delta^T).

    Rows do not influence one another: weights that read the same activation may be stacked and solved as one. Raises
    BadInput where the statistics are not finite.
    """
    require_finite(stats)
    weight, gram = weight.float(), stats.gram
    if not bool(gram.any()):
        return _rounded(weight, gram, grid, 0.0, "no calibration token reached it")
    goal = aim(weight, stats)
    found, damp = _compensated(goal, gram, grid, damp)
    if found is None:
        return _rounded(goal, gram, grid, damp, "its statistics have no Cholesky factor")
    best = _reconsidered(goal, gram, damp, found, grid, polishing)
    by_rounding, made = of_told(goal, gram, lambda rows: rtn(rows, grid)), taken(best, goal, gram)
    if made.sum() <= by_rounding.sum():  # which is false of what is not a number
        return Solution(best, made, by_rounding, taken(None, goal, gram), damp)
    return _rounded(goal, gram, grid, damp, "solving did worse")


def by_activation(weight: Tensor, stats: Stats, grid: Grid) -> Solution[Quantized]:
    """`gptq` with groups of columns of like importance, which a reader needs `g_idx` for (act-order, `desc_act`)."""
    order = stats.importance.argsort(descending=True, stable=True)
    found = gptq(weight[:, order], stats.permuted(order), grid)
    q, back = found.quantized, torch.argsort(order)
    q = replace(q, codes=q.codes[:, back], index=q.groups[back])
    return replace(found, quantized=q, order="columns by importance")


def rounding(weight: Tensor, stats: Stats, grid: Grid, why: str) -> Solution[Quantized]:
    """`weight` rounded to nearest, its ranges searched under importance: where `why` speaks against solving."""
    found = _rounded(weight.float(), stats.gram, grid, 0.0, why)
    q = weighted(weight, stats, grid)
    return replace(found, quantized=q, errors=taken(q, weight, stats.gram), order="none")


def require_finite(stats: Stats, where: str | None = None) -> None:
    """BadInput where an activation has overflowed."""
    if not bool(torch.isfinite(stats.upper.diagonal()).all()):  # no product lies farther out than both its squares
        hint = "the model overflows on this text"
        raise BadInput("the calibration statistics are not finite", where=where, hint=hint)


def _rounded(weight: Tensor, gram: Tensor, grid: Grid, damp: float, why: str) -> Solution[Quantized]:
    q = rtn(weight, grid)
    made = taken(q, weight, gram)
    return Solution(q, made, made, taken(None, weight, gram), damp, why)


def taken(q: Codes | None, weight: Tensor, gram: Tensor) -> Tensor:
    """The errors (N,) of what a weight became, or of leaving it out, in the rows that are told of."""
    some = told(len(weight))
    value = weight if q is None else weight - q.dequantize()
    out = weight.new_zeros(len(weight))
    out[some] = errors(value[some], gram)
    return out


def of_told(weight: Tensor, gram: Tensor, make: Callable[[Tensor], Codes]) -> Tensor:
    """The errors (N,) of what `make` makes of rows of a weight, in those that are told of; no others are made."""
    some = told(len(weight))
    out = weight.new_zeros(len(weight))
    out[some] = errors(weight[some] - make(weight[some]).dequantize(), gram)
    return out


def aim(weight: Tensor, stats: Stats) -> Tensor:
    """The weight A (N, K) to round in place of `weight`: of least |y - A x|, y what the layer is to give.

    That is W x~ of the source's activations x~, or where the outcome is added to the residual stream, what the source's
    stream has behind the layer, less what the quantized one has before it: then A makes up, as far as x tells, for what
    went wrong in the stream as well. With H the sum of x^T x and D the damping of `AIM_DAMP` on its diagonal, which
    draws A to W, A = (sum of y^T x + W D) (H + D)^-1; W itself where no damping gives an inverse.
    """
    if stats.wanted is None and stats.drift is None:
        return weight
    lower, damp = damped_factor(stats.gram, AIM_DAMP)
    if lower is None:
        return weight
    if stats.wanted is not None:
        return _divided(torch.addcmul(stats.wanted, weight, added(stats.gram, damp)), lower)
    assert stats.drift is not None  # y is W x~: few rows to divide, however many the weight has
    return torch.addmm(weight, weight, _divided(stats.drift.clone(), lower))


def _divided(rows: Tensor, lower: Tensor) -> Tensor:
    """`rows` (N, K) times the inverse of the matrix (K, K) whose Cholesky factor is `lower`; in place."""
    for factor, upper in ((lower.T, True), (lower, False)):
        torch.linalg.solve_triangular(factor, rows, upper=upper, left=False, out=rows)
    return rows


def _compensated(goal: Tensor, gram: Tensor, grid: Grid, damp: float) -> tuple[Quantized | None, float]:
    """`goal` rounded greedily, and the damping that took; None where none was enough."""
    order = group_aware_order(seen(gram), grid.group)
    upper, damp = inverse_factor(gram, damp, order)
    if upper is None:
        return None, damp
    importance = seen(gram)[order]
    parts = one_each(len(goal), goal.device, LEAST)
    found = share_out(lambda rows: _greedy(goal[rows], importance, order, upper, grid), parts, goal.device)
    return Quantized.stacked(found), damp


def _reconsidered(goal: Tensor, gram: Tensor, damp: float, q: Quantized, grid: Grid, passes: int) -> Quantized:
    """`q` polished. The factor of `_compensated` is gone by now: a wide layer has room for few of its size."""
    damped, parts = with_damping(gram, damp), one_each(len(goal), goal.device, LEAST)
    cut = list(zip(parts, q.rows([part.stop - part.start for part in parts]), strict=True))
    found = share_out(lambda part: polish(goal[part[0]], damped, part[1], grid, passes), cut, goal.device)
    return Quantized.stacked(found)


def _greedy(weight: Tensor, importance: Tensor, order: Tensor, upper: Tensor, grid: Grid) -> Quantized:
    """GPTQ proper: `upper` is the factor of the inverse, it and `importance` in the order of the columns' visits."""
    g = grid.group
    w = weight[:, order].T.contiguous()  # (K, N): the columns in their order, each contiguous
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales, zeros = [], []
    columns = replayed(partial(_columns, grid), w[:g], upper[:g, :g], w[0], w[0])
    for start in range(0, len(w), g):
        block = slice(start, start + g)
        with one_thread():
            scale, zero = grid.fit(w[block].T.contiguous(), importance[block])
            codes[block], missed = columns(w[block], upper[block, block], scale, zero)
        w[start + g :].addmm_(upper[block, start + g :].T, missed, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    back = torch.argsort(order)
    groups = torch.argsort(order[::g] // g)
    return Quantized(
        codes[back].T.contiguous(), torch.stack(scales, 1)[:, groups].half(), torch.stack(zeros, 1)[:, groups].byte()
    )


def _columns(grid: Grid, w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Round the columns w (g, N) of one group in turn; codes and scaled errors, both (g, N).

    A row has one scale in all of them, so that they are counted in its steps: a column is then few operations.
    """
    steps = torch.addcmul(zero, w, 1 / scale)
    codes, missed = torch.empty_like(w), torch.empty_like(w)
    turned = (upper / upper.diagonal()[:, None]).contiguous()
    for first, last in _chunks(len(w)):
        columns = zip(*(t[first:last].unbind() for t in (steps, codes, missed)), strict=True)
        for i, (column, code, miss) in enumerate(columns, first):
            torch.round(column, out=code).clamp_(0, grid.top)
            torch.sub(column, code, out=miss)
            steps[i + 1 : last].addr_(turned[i, i + 1 : last], miss, alpha=-1)
        steps[last:].addmm_(turned[first:last, last:].T, missed[first:last], alpha=-1)
    return codes, missed.mul_(scale).div_(upper.diagonal()[:, None])


def _chunks(columns: int) -> list[tuple[int, int]]:
    return [(first, min(first + CHUNK, columns)) for first in range(0, columns, CHUNK)]


def polish(weight: Tensor, hessian: Tensor, q: Quantized, grid: Grid, passes: int = 1) -> Quantized:
    """Passes of coordinate descent on tr(delta H delta^T): group by group, the scale, then each column's code.

    Both have closed forms. With r = (W - Q) H, the best step of a scale is <l, r> / <l, H l> for the group's levels l,
    and that of a column's value r_k / H_kk; the nearest that the grid holds is the best that it holds.
    """
    if not passes:
        return q
    g = grid.group
    left = hessian @ (weight - q.dequantize()).T  # (K, N): minus half the gradient
    codes, scales, zeros = (t.T.contiguous().float() for t in (q.codes, q.scales, q.zeros))
    better = replayed(partial(_reconsider, grid), codes[:g], left[:g], hessian[:g, :g], scales[0], scales[0])
    for turn, start in product(range(passes), range(0, len(codes), g)):
        block, i = slice(start, start + g), start // g
        own = hessian[block, block].contiguous()
        with one_thread():
            codes[block], scales[i], moved = better(codes[block], left[block], own, scales[i], zeros[i])
        due = slice(0 if turn < passes - 1 else start + g, None)  # nothing comes back to earlier groups
        left[due].addmm_(hessian[block, due].T, moved, alpha=-1)
    return replace(q, codes=codes.T.byte().contiguous(), scales=scales.T.half().contiguous())


def _reconsider(
    grid: Grid, codes: Tensor, left: Tensor, own: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Better codes (g, N) and scales (N,) of one group, and the steps (g, N) that its weights made."""
    levels = codes - zero
    pull = own @ levels
    curve = (levels * pull).sum(0)
    best = (scale + (levels * left).sum(0) / curve.clamp_min(1e-30)).half().float()
    best = torch.where((curve > 0) & torch.isfinite(best) & (best != 0), best, scale)
    step, per_curve = best - scale, 1 / own.diagonal().clamp_min(1e-30)
    wanted = torch.addcmul(left, pull, step, value=-1).mul_(per_curve[:, None])  # how far each weight is to move
    wanted = torch.addcdiv(codes, wanted, best)  # and the code that it would have there
    turned = (own * per_curve).contiguous()
    chosen, changes = torch.empty_like(codes), torch.empty_like(codes)
    for first, last in _chunks(len(codes)):
        columns = zip(*(t[first:last].unbind() for t in (codes, wanted, chosen, changes)), strict=True)
        for k, (code, at, new, change) in enumerate(columns, first):
            torch.round(at, out=new).clamp_(0, grid.top)
            torch.sub(new, code, out=change)
            wanted[k + 1 : last].addr_(turned[k, k + 1 : last], change, alpha=-1)
        wanted[last:].addmm_(turned[first:last, last:].T, changes[first:last], alpha=-1)
    return chosen, best, torch.addcmul(changes.mul_(best), levels, step)


def group_aware_order(importance: Tensor, group: int) -> Tensor:
    """The order in which columns are visited: groups by their largest importance, columns inside by their own.

    >>> group_aware_order(torch.tensor([1.0, 4.0, 9.0, 2.0]), 2)
    tensor([2, 3, 1, 0])
    """
    rows = importance.view(-1, group)
    inside = rows.argsort(dim=1, descending=True, stable=True)
    first = rows.amax(1).argsort(dim=0, descending=True, stable=True)
    return (inside + torch.arange(len(rows), device=rows.device)[:, None] * group)[first].flatten()
