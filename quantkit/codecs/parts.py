"""`Parts`: a block type whose weights have a code each, apart from where its bits lie.

    w = d * scales[s] * level(code) - dmin * mins[s]        s the weight's sub-block

The small integers `scales` and `mins` belong to sub-blocks, the fp16 numbers `d` and `dmin` to the block; a type
without sub-blocks has one scale, which is 1. `Ladder` says how the parts lie in a struct's fields and what they may
be: all that a solver needs to choose any of them anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from quantkit.later import Tensor, torch

Fields = dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """n blocks taken apart; integers as float32."""

    codes: Tensor  # (n, block) uint8, indices into the ladder's levels
    d: Tensor  # (n, 1) float32, each the value of an fp16
    scales: Tensor  # (n, subs)
    dmin: Tensor | None = None  # (n, 1), each the value of an fp16
    mins: Tensor | None = None  # (n, subs)


@dataclass(frozen=True)
class Ladder:
    """A block type's fields <-> `Parts`, the levels its codes stand for (rising), and the ranges of its integers."""

    read: Callable[..., Parts]
    write: Callable[[Parts], Fields]
    levels: tuple[float, ...]
    scales: tuple[int, int] = (1, 1)
    mins: tuple[int, int] = (1, 1)

    @property
    def even(self) -> bool:
        """Whether the levels are consecutive whole numbers."""
        return self.levels == _from(self.levels[0], len(self.levels))

    def level(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32."""
        if self.even:
            return codes.float().add_(self.levels[0])
        return _table(self.levels, codes.device)[0][codes.long()]

    def nearest(self, x: Tensor) -> Tensor:
        """The codes, uint8, of the levels nearest to x."""
        if self.even:
            return (x - self.levels[0]).round_().clamp_(0, len(self.levels) - 1).to(torch.uint8)
        return torch.bucketize(x, _table(self.levels, x.device)[1], right=True, out_int32=True).to(torch.uint8)

    def values(self, parts: Parts) -> Tensor:
        """The weights (n, block) float32, by ggml's order of products."""
        steps = parts.d * parts.scales
        values = self.level(parts.codes).view(*steps.shape, -1) * steps[..., None]
        if parts.dmin is not None and parts.mins is not None:
            values -= (parts.dmin * parts.mins)[..., None]
        return values.flatten(1)


@functools.cache
def _table(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Uneven levels, and the points midway between them."""
    rising = torch.tensor(levels, device=device)
    return rising, (rising[1:] + rising[:-1]) / 2


def whole(low: int, bits: int) -> tuple[float, ...]:
    """The levels low, low + 1 ... of a code of so many bits."""
    return _from(low, 1 << bits)


def _from(low: float, count: int) -> tuple[float, ...]:
    return tuple(low + i for i in range(count))
