"""Learned ranges: the scales of a whole block moved by gradients until what it gives comes nearest to the source's.

A solver of one matrix minimizes the error of that matrix's outputs; what a block makes of the errors of all its
matrices - in the softmax, in the product of gate and up, in the residual stream - only the block's own output tells. As
AutoRound (Cheng et al. 2023, arXiv:2309.05516) does, ranges are tuned against it, from where the solver left them; the
codes stay the solver's. Steps are Adam's, which are as large as those of a sign gradient where gradients agree and
smaller where they do not. Offsets of the codes are left out: moved by sign gradients from the solver's optimum, few
codes changed, and blocks became worse as often as better (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantkit.codecs.sharing import Share, all_at_once
from quantkit.later import Tensor, torch

ITERATIONS = 40
ROWS = 4  # calibration rows to a step
RATE = 0.01  # of a factor of 1, at the first step; it falls to nothing
HELD_OUT = 8  # one of so many rows is not learned from, and tells whether the others taught anything
FARTHEST = 0.5  # how far a factor may go from 1

Factors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Ranged:
    """A solved weight as the sum of `parts` (N, K), each times a factor for every range (N, R) of its columns.

    `ranges` (K,) has the range of each column; `done` makes what is stored of factors: the solved tensor anew.
    """

    parts: tuple[Tensor, ...]
    ranges: Tensor
    done: Callable[[Factors], Any]

    def unmoved(self) -> Factors:
        """A factor of 1 for every range."""
        count = int(self.ranges.max()) + 1
        return tuple(torch.ones(len(part), count, device=part.device) for part in self.parts)

    @cached_property
    def _order(self) -> Tensor | None:
        """The columns (K,), those of a range side by side; None where they are so already."""
        order = self.ranges.argsort(stable=True)
        return None if bool((order[1:] > order[:-1]).all()) else order

    def weight(self, factors: Factors) -> Tensor:
        """The weight (N, K) with its ranges, of one size all, multiplied.

        Columns of a range lie side by side to be multiplied: with factors taken by an index, what was learned was not
        the same in every run on three threads.
        """
        order, made = self._order, None
        for part, factor in zip(self.parts, factors, strict=True):
            columns = part if order is None else part[:, order]
            term = (columns.unflatten(1, (factor.shape[1], -1)) * factor[..., None]).flatten(1)
            made = term if made is None else made + term
        assert made is not None  # a weight has a part
        return made if order is None else made[:, order.argsort()]


def learn(
    ranged: Mapping[str, Ranged],
    loss: Callable[[dict[str, Tensor], list[int]], Tensor],
    rows: int,
    seed: int,
    share: Share = all_at_once,
) -> dict[str, Factors]:
    """Factors for every weight that make `loss` small: of weights by name, the mean of some of `rows` calibration rows.

    `share`: how the rows of a step are shared out to threads.
    """
    factors = {name: r.unmoved() for name, r in ranged.items()}
    every = [f.requires_grad_() for each in factors.values() for f in each]
    steps = torch.optim.Adam(every, lr=RATE, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LinearLR(steps, 1.0, 1 / ITERATIONS, ITERATIONS)
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(ITERATIONS):
        some = torch.randperm(rows, generator=drawn)[:ROWS].tolist()

        def slopes(part: slice, some: list[int] = some) -> tuple[Tensor, ...]:
            mine = some[part]
            with torch.enable_grad():
                made = loss({name: r.weight(factors[name]) for name, r in ranged.items()}, mine)
                return torch.autograd.grad(made * (len(mine) / len(some)), every)

        for f, *each in zip(every, *share(slopes, len(some)), strict=True):
            f.grad = torch.stack(each).sum(0)
        steps.step()
        falling.step()
        with torch.no_grad():
            for f in every:
                f.clamp_(1 - FARTHEST, 1 + FARTHEST)
    return {name: tuple(f.detach() for f in each) for name, each in factors.items()}
