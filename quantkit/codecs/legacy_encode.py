"""Torch encoders of the legacy block types, byte for byte ggml's: a plain rounding, or a search where columns matter.

Without importance the scale follows from the extreme values of a block (`quantize_row_q*_ref` in `ggml-quants.c`); with
it Q4_0 and Q5_0 search a scale, Q4_1 and Q5_1 a scale and a minimum (`quantize_row_q*_impl`). Q8_0 takes no importance.
"""

from __future__ import annotations

from collections.abc import Callable

from quantkit.codecs.parts import Parts
from quantkit.codecs.search import (
    farthest,
    lowest,
    quotient,
    reciprocal,
    root,
    search_affine,
    search_symmetric,
    total,
)
from quantkit.later import Tensor, torch

BLOCK = 32
Encoder = Callable[[Tensor, Tensor | None], Parts]


def _lanes(x: Tensor) -> Tensor:
    """(rows, width) -> (32, blocks): one block down each column."""
    return x.reshape(-1, BLOCK).T.contiguous()


def _weights(x: Tensor, importance: Tensor) -> Tensor:
    """What ggml weighs squared errors by, (32, blocks): importance * sqrt(mean of x^2 over the row + x^2)."""
    squares = x * x
    sigma2 = quotient(total(squares.T.contiguous()), float(x.shape[1]))
    return _lanes(importance * root(sigma2[:, None] + squares))


def _parts(q: Tensor, d: Tensor, m: Tensor | None = None) -> Parts:
    """Codes (32, blocks), scales and minima (blocks,) as the parts of blocks; scales are stored in fp16."""
    d = d[:, None].half().float()
    one = torch.ones_like(d)
    return Parts(q.T.to(torch.uint8), d, one, *(() if m is None else (-m[:, None].half().float(), one)))


def symmetric(bits: int) -> Encoder:
    """Q4_0 and Q5_0: w = d * (q - 2^(bits - 1))."""
    half = 1 << (bits - 1)

    def encode(x: Tensor, importance: Tensor | None) -> Parts:
        lanes = _lanes(x)
        if importance is None:
            d = farthest(lanes) / -half
            q = (lanes * reciprocal(d) + (half + 0.5)).trunc_().clamp_(max=2 * half - 1)
        else:
            d, q = search_symmetric(lanes, _weights(x, importance), half)
        return _parts(q, d)

    return encode


def affine(bits: int) -> Encoder:
    """Q4_1 and Q5_1: w = d * q + m."""
    nmax = (1 << bits) - 1

    def encode(x: Tensor, importance: Tensor | None) -> Parts:
        lanes = _lanes(x)
        if importance is None:
            m = lowest(lanes)
            d = quotient(lanes.amax(0) - m, float(nmax)) + 0.0  # never -0, whichever zero amax picked
            q = ((lanes - m) * reciprocal(d) + 0.5).trunc_().clamp_(max=nmax)
        else:
            d, m, q = search_affine(lanes, _weights(x, importance), nmax, -0.9, 0.05, 36)
        return _parts(q, d, m)

    return encode


def q8_0(x: Tensor, _importance: Tensor | None) -> dict[str, Tensor]:
    """w = d * q, q rounded half away from zero (C's roundf)."""
    blocks = x.reshape(-1, BLOCK)
    d = quotient(blocks.abs().amax(1, keepdim=True), 127.0)
    scaled = blocks * reciprocal(d)
    whole = scaled.trunc()
    q = whole + ((scaled - whole).abs() >= 0.5) * scaled.sign()
    return {"d": d.half(), "qs": q.to(torch.int8)}
