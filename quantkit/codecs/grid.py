"""`Grid` and `Quantized`: the integer grids of GPTQ, AWQ and compressed-tensors, apart from how they lie on disk.

A solver sees a grid and nothing else: it asks for parameters of a group (`fit`) and for the codes of weights under them
(`codes`). Scales are rounded to fp16 before any code is chosen, so that what is stored is what was solved for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.later import Tensor, torch

# How far a range may shrink below the largest weight, tried from widest to narrowest (llama.cpp and MSE searches use
# the same order of magnitude). Below half the range, clipping always costs more than it saves at 3 bits and more.
SHRINK = tuple(1.0 - i / 32 for i in range(17))


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

    @property
    def group(self) -> int:
        """Columns to a group."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """(N, K) float32; exact, since an fp16 scale times a small integer has a float32."""
        index = self.groups.long()
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

        Searches `SHRINK` for the range of least squared error, weighted by `importance` (..., g or broadcastable). A
        symmetric range is tried with both signs of the scale, since the grid reaches one step further down than up.
        """
        ends = self._ends(w)
        weight = torch.ones_like(w) if importance is None else importance.clamp_min(1e-12).expand_as(w)
        best_error = torch.full(w.shape[:-1], torch.inf, device=w.device)
        best = (torch.ones_like(best_error), torch.zeros_like(best_error))
        for shrink in SHRINK:
            for low, high in ends:
                scale, zero = self._parameters(low * shrink, high * shrink)
                off = self.levels(self.codes(w, scale, zero), scale, zero) - w
                e = (off.square_() * weight).sum(-1)
                better = e < best_error
                best_error = torch.where(better, e, best_error)
                best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        return best

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
        return torch.round(w / scale[..., None] + zero[..., None]).clamp_(0, self.top)

    def levels(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The weights that codes stand for; the inverse of `codes` on the grid."""
        return (codes - zero[..., None]) * scale[..., None]

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


def _fp16(scale: Tensor) -> Tensor:
    """Rounded to what fp16 can hold, with 1 in place of 0: a block of zeros must not divide by zero (AutoAWQ #335)."""
    rounded = scale.clamp(-65504, 65504).half().float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
