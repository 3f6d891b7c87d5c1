"""Torch encoders of the K-quants, byte for byte ggml's.

Each sub-block searches its own scale (and minimum), the sub-blocks' scales are rounded to small integers under one fp16
super-scale, and the codes are rounded once more under the scales as stored. Without importance that is ggml's
`quantize_row_q*_K_ref`, with it `quantize_row_q*_K_impl`: finer searches, errors weighed by importance, and the
super-scales searched too.

Throughout, x is (sub, count, n): a sub-block's weights down dimension 0, then the sub-blocks of a block, then blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.codecs.bits import pack_scale_min_k4, unpack_scale_min_k4
from quantkit.codecs.parts import Parts
from quantkit.codecs.search import (
    TINY,
    descend,
    farthest,
    quotient,
    root,
    rounded,
    search_affine,
    search_positive,
    search_symmetric,
    stored,
    total,
)
from quantkit.later import Tensor, torch

BLOCK = 256


def _lanes(x: Tensor, sub: int) -> Tensor:
    """(rows, width) -> (sub, 256 / sub, rows * width / 256)."""
    return x.reshape(-1, BLOCK // sub, sub).permute(2, 1, 0).contiguous()


def _flat(codes: Tensor) -> Tensor:
    """The way back for codes: (sub, count, n) float32 -> (n, 256) uint8."""
    return codes.to(torch.uint8).permute(2, 1, 0).reshape(-1, BLOCK)


def _mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over each block, (n,), added up in the order of the weights."""
    return total((x * x).transpose(0, 1).reshape(BLOCK, -1)) / BLOCK


def _weights(x: Tensor, importance: Tensor, sigma2: Tensor) -> Tensor:
    return importance * root(sigma2 + x * x)


def _rounded_again(x: Tensor, d: Tensor, codes: Tensor, low: int, high: int) -> Tensor:
    """Codes of x under the scales as stored; those of the search stay where the stored scale is zero."""
    return torch.where(d == 0, codes, rounded(quotient(x, d), low, high) - low)


def _by_largest(scales: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """Scales (count, n) >= 0 -> super-scale (n,) and integers 0 .. nmax: the largest becomes nmax."""
    largest = scales.amax(0).clamp(min=0) + 0.0
    inverse = torch.where(largest > 0, quotient(float(nmax), largest), 0.0)
    return quotient(largest, float(nmax)), stored((inverse * scales).round_(), torch.uint8)


def _pack_nibbles(sc: Tensor, mn: Tensor) -> Tensor:
    return sc | mn << 4


def _unpack_nibbles(scales: Tensor) -> tuple[Tensor, Tensor]:
    return scales & 15, scales >> 4


@dataclass(frozen=True)
class _Affine:
    """What tells Q2_K, Q4_K and Q5_K apart: their search without importance, and how integer scales are stored.

    `cap` and `cap_weighted` bound the integers that have wrapped around below zero (see `search_positive`), without
    and with importance; ggml caps some and not others, and uncapped ones spill into their neighbours' bits.
    """

    bits: int
    sub: int
    scale_max: int
    first: float
    count: int
    cap: int
    cap_weighted: int
    pack: Callable[[Tensor, Tensor], Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, Tensor]]


_Q2_K = _Affine(2, 16, 15, -0.5, 15, 255, 255, _pack_nibbles, _unpack_nibbles)
_Q4_K = _Affine(4, 32, 63, -1.0, 20, 63, 255, pack_scale_min_k4, unpack_scale_min_k4)
_Q5_K = _Affine(5, 32, 63, -0.5, 15, 63, 63, pack_scale_min_k4, unpack_scale_min_k4)


def _encode_affine(kind: _Affine, x: Tensor, importance: Tensor | None) -> Parts:
    """The common course of Q2_K, Q4_K and Q5_K."""
    nmax, rows, x = (1 << kind.bits) - 1, len(x), _lanes(x, kind.sub)
    if importance is not None:
        sigma2 = _mean_square(x) * (1 if kind.bits == 2 else 2)
        w = _weights(x, _lanes(importance.expand(rows, -1), kind.sub), sigma2)
        scales, low, codes = search_affine(x, w, nmax, -0.9, 0.05, 36)
        sum_w = total(w)
        (d, sc), (dmin, mn) = (search_positive(v, sum_w, kind.scale_max) for v in (scales, -low))
        cap = kind.cap_weighted
    else:
        w = x.abs() if kind.bits == 2 else root(total(x * x) / kind.sub) + x.abs()
        scales, low, codes = search_affine(x, w, nmax, kind.first, 0.1, kind.count, absolute=kind.bits == 2)
        (d, sc), (dmin, mn) = (_by_largest(v, kind.scale_max) for v in (scales, -low))
        cap = kind.cap
    d, dmin = d.half().float()[:, None], dmin.half().float()[:, None]
    sc, mn = (v.float() for v in kind.unpack(kind.pack(*(v.clamp(max=cap).T.to(torch.uint8) for v in (sc, mn)))))
    codes = _rounded_again(x + (dmin * mn).T, (d * sc).T, codes, 0, nmax)
    return Parts(_flat(codes), d, sc, dmin, mn)


def q2_k(x: Tensor, importance: Tensor | None) -> Parts:
    """16 sub-blocks of 16, scales and minima of 4 bits."""
    return _encode_affine(_Q2_K, x, importance)


def q4_k(x: Tensor, importance: Tensor | None) -> Parts:
    """8 sub-blocks of 32, scales and minima of 6 bits."""
    return _encode_affine(_Q4_K, x, importance)


def q5_k(x: Tensor, importance: Tensor | None) -> Parts:
    """As Q4_K, with codes of 5 bits."""
    return _encode_affine(_Q5_K, x, importance)


def q3_k(x: Tensor, importance: Tensor | None) -> Parts:
    """16 sub-blocks of 16, signed scales of 6 bits stored codes of 3."""
    rows, x = len(x), _lanes(x, 16)
    if importance is None:
        peak = farthest(x)
        empty = peak.abs() < TINY
        scales, codes = descend(x, x * x, rounded(quotient(-4.0, peak) * x, -4, 3), -4, 3, torch.int8)
        scales, codes = torch.where(empty, 0.0, scales), torch.where(empty, 0.0, codes + 4)
        largest = farthest(scales)
        inverse = quotient(-32.0, largest)
        zero = largest == 0
        d = torch.where(zero, 0.0, quotient(1.0, inverse)).half()
        sc = torch.where(zero, 0.0, rounded(inverse * scales, -32, 31) + 32)
    else:
        w = _weights(x, _lanes(importance.expand(rows, -1), 16), 2 * _mean_square(x))
        scales, codes = search_symmetric(x, w, 4)
        d, sc = search_symmetric(scales, total(w), 32)
        d = d.half()
    d, sc = d.float(), sc - 32
    return Parts(_flat(_rounded_again(x, d * sc, codes, -4, 3)), d[:, None], sc.T)


def q6_k(x: Tensor, importance: Tensor | None) -> Parts:
    """16 sub-blocks of 16, scales of 8 bits, codes stored with 32 added; importance weighs errors as it is."""
    rows, x = len(x), _lanes(x, 16)
    w = x * x if importance is None else _lanes(importance.expand(rows, -1), 16)
    scales, codes = search_symmetric(x, w, 32)
    largest = farthest(scales)
    empty = largest.abs() < TINY
    inverse = quotient(-128.0, largest)
    d = torch.where(empty, 0.0, quotient(1.0, inverse)).half().float()
    sc = torch.where(empty, 0.0, rounded(inverse * scales, -128, 127))
    codes = torch.where(empty, 0.0, _rounded_again(x, d * sc, codes, -32, 31))
    return Parts(_flat(codes), d[:, None], sc.T)
