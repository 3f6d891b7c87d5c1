"""`Grid` and `Quantized`: the integer grids of GPTQ, AWQ and compressed-tensors, apart from how they lie on disk.

A solver sees a grid and nothing else: it asks for parameters of a group (`fit`) and for the codes of weights under them
(`codes`). Scales are rounded to fp16 before any code is chosen, so that what is stored is what was solved for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantkit.later import Tensor, torch

# How far a range may shrink below the largest weight: tried from widest to narrowest, then on both sides of the best.
# Below half the range, clipping always costs more than it saves at 3 bits and more.
COARSE, FINE = (1.0, 0.875, 0.75, 0.625, 0.5), (1 / 16, 1 / 32)


@dataclass(frozen=True)
class Quantized:
    """Codes of a weight (N, K) in groups of K/G columns: w = scales[n, k//g] * (codes[n, k] - zeros[n, k//g]).

    Where columns were grouped in another order, `index` has the group of each in place of k//g.
    """

    codes: Tensor  # (N, K) uint8
    scales: Tensor  # (N, G) float16
    zeros: Tensor  # (N, G) uint8
    index: Tensor | None = None  # (K,) int32

    @classmethod
    def stacked(cls, parts: Sequence[Quantized]) -> Quantized:
        """One above the other: the inverse of `rows`."""
        codes, scales, zeros = (torch.cat([getattr(q, f) for q in parts]) for f in ("codes", "scales", "zeros"))
        return cls(codes, scales, zeros, parts[0].index)

    def times(self, factors: Tensor) -> Quantized:
        """With the scales of its groups multiplied by `factors` (N, G); one that fp16 would round to 0 stays."""
        scales = (self.scales.float() * factors).clamp(-65504, 65504).half()
        return replace(self, scales=torch.where(scales == 0, self.scales, scales))

    @property
    def group(self) -> int:
        """Columns to a group."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """(N, K) float32; exact, since an fp16 scale times a small integer has a float32."""
        if self.index is None:
            levels = self.codes.float().unflatten(1, (-1, self.group)).sub_(self.zeros.float()[..., None])
            return levels.mul_(self.scales.float()[..., None]).flatten(1)
        index = self.index.long()
        return (self.codes.float() - self.zeros.float()[:, index]) * self.scales.float()[:, index]

    @property
    def groups(self) -> Tensor:
        """The group of each column, (K,) int32: GPTQ's `g_idx`."""
        columns = torch.arange(self.codes.shape[1], device=self.codes.device, dtype=torch.int32)
        return columns // self.group if self.index is None else self.index

    def rows(self, sizes: list[int]) -> list[Quantized]:
        """Cut by rows: the inverse of solving several weights of one input as one."""
        parts = zip(self.codes.split(sizes), self.scales.split(sizes), self.zeros.split(sizes), strict=True)
        return [Quantized(*p, self.index) for p in parts]


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits in groups of `group` columns; symmetric grids have their zero in the middle."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def fit(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group: w (..., g) -> two tensors (...), the scale already rounded to fp16.

        Searches coarsely, then finely, for the range of least squared error, weighted by `importance` (..., g or
        broadcastable). A symmetric range is tried with both signs of the scale, since the grid reaches one step further
        down than up.
        """
        columns = w.movedim(-1, 0).contiguous()  # (g, ...): a group's parameters then lie as each of its columns does
        weight = torch.ones(columns.shape[:1], device=w.device) if importance is None else importance.clamp_min(1e-12)
        weight = weight if weight.dim() == 1 else weight.expand_as(w).movedim(-1, 0)

        def tried(low: Tensor, high: Tensor, shrink: Tensor) -> Tensor:
            """What ranges (c, ...) give: error, scale, zero, then what they are and how far shrunk, (6, c, ...)."""
            scale, zero = self._parameters(low * shrink, high * shrink)
            e = self._errors(columns, weight, scale, zero)
            return torch.stack((e, scale, zero, low, high, shrink.expand_as(low)))

        ends = [end for end in self._ends(w) for _ in COARSE]
        low, high = (torch.stack(side) for side in zip(*ends, strict=True))
        shrink = w.new_tensor(COARSE).repeat(len(ends) // len(COARSE)).view(-1, *[1] * (low.dim() - 1))
        best = _least(tried(low, high, shrink))
        for step in FINE:
            *_, low, high, reach = best
            shrunk = torch.cat((reach - step, (reach + step).clamp_max(1)))
            best = _least(torch.cat((best, tried(low.expand_as(shrunk), high.expand_as(shrunk), shrunk)), 1))
        return best[1, 0], best[2, 0]

    def _errors(self, columns: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The squared errors of columns (g, ...), times `weight`, under each of c scales and zeros: all (c, ...)."""
        steps, off, made = torch.empty_like(columns), torch.empty_like(columns), torch.empty_like(scale)
        per_scale = 1 / scale
        for e, per, at in zip(made, per_scale, zero, strict=True):
            torch.addcmul(at, columns, per, out=steps)
            torch.round(steps, out=off).clamp_(0, self.top).sub_(steps).square_()
            e.copy_(torch.tensordot(weight, off, 1) if weight.dim() == 1 else (off * weight).sum(0))
        return made.mul_(scale).mul_(scale)

    def plain(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero from the extremes alone, as round-to-nearest takes them: w (..., g) -> two tensors (...)."""
        return self.between(*w.aminmax(dim=-1))

    def between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of groups whose weights lie between `low` and `high` (...)."""
        if self.symmetric:
            reach = torch.maximum(-low, high)
            return self._parameters(-reach * 2**self.bits / self.top, reach)
        return self._parameters(low.clamp_max(0), high.clamp_min(0))

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as floats: w (..., g) under scale and zero (...)."""
        return (w / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, self.top)

    def levels(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The weights that codes stand for; the inverse of `codes` on the grid."""
        return (codes - zero[..., None]).mul_(scale[..., None])

    def _ends(self, w: Tensor) -> list[tuple[Tensor, Tensor]]:
        if not self.symmetric:  # the grid must hold zero, or a group of one sign could not be centred
            return [(w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0))]
        absmax = w.abs().amax(-1)
        return [(-absmax, absmax), (absmax, -absmax)]

    def _parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The scale whose lowest level lies at `low`: fp16-rounded, never zero (an all-zero group gets scale 1)."""
        if self.symmetric:
            zero = torch.full_like(low, 2 ** (self.bits - 1))
            scale = _fp16(-low / zero)
        else:
            scale = _fp16((high - low) / self.top)
            zero = torch.round(-low / scale).clamp_(0, self.top)
        return scale, zero


def _least(found: Tensor) -> Tensor:
    """Of what was tried (n, c, ...) what has the least of the first of n, the first of several: (n, 1, ...)."""
    return found.gather(1, found[:1].min(1, keepdim=True).indices.expand(len(found), *[-1] * (found.dim() - 1)))


def _fp16(scale: Tensor) -> Tensor:
    """Rounded to what fp16 can hold, with 1 in place of 0: a block of zeros must not divide by zero (AutoAWQ #335)."""
    rounded = scale.clamp(-65504, 65504).half().float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
