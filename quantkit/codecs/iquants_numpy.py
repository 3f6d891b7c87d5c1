"""Encoders of IQ4_NL and IQ4_XS for the CPU, byte for byte ggml's, in under a third of its time.

ggml looks for the nearest of the uneven levels one weight after the other, by halves; fifteen times a weight, that is
where its time goes. Here the level is read off a table: all midpoints between levels are multiples of 1/2, so twice a
number, rounded down, says which two it lies between. Steps and their order are those of `codecs.iquants_encode`, which
is for other devices; numpy's operations drop the interpreter's lock, and need no torch to be there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from quantkit.codecs.codec import Bytes, Floats
from quantkit.codecs.iquants_encode import LEVELS, SUB
from quantkit.codecs.search import TINY, total

Encoder = Callable[[Floats, Floats | None, Bytes], None]  # weights (rows, width), importance (width,), where to write

SUBS = 8  # scales to a block of IQ4_XS
REACH = 256  # twice a number, rounded down, that is beyond all midpoints

# By twice a number, rounded down, plus REACH: an index below zero would cost more than the whole step.
_HALVES = np.arange(-REACH, REACH, dtype=np.float32) / 2
_RISING = np.array(LEVELS, np.float32)
_CODES = np.searchsorted((_RISING[1:] + _RISING[:-1]) / 2, _HALVES, side="right").astype(np.uint8)
_LEVELS = _RISING[_CODES]


def _lanes(x: Floats, block: int) -> Floats:
    """(rows, width) -> (32, block / 32, n)."""
    return np.ascontiguousarray(x.reshape(-1, block // SUB, SUB).transpose(2, 1, 0))


def _weights(x: Floats, importance: Floats | None, rows: int) -> Floats:
    """x^2, or importance * sqrt(twice the mean of x^2 over the block + x^2)."""
    squares = x * x
    if importance is None:
        return squares
    block = SUB * x.shape[1]
    sigma2 = total(squares.swapaxes(0, 1).reshape(block, -1)) * np.float32(2 / block)
    squares += sigma2
    return np.sqrt(squares, out=squares) * _lanes(np.broadcast_to(importance, (rows, len(importance))), block)


def _farthest(x: Floats) -> Floats:
    """The value of largest magnitude down dimension 0, with its sign; of equal ones the first."""
    return np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]


def _scales(x: Floats, w: Floats) -> Floats:
    """Scale d of each group (32, ...) that makes sum w (x - d level)^2 small; 0 for an empty group."""
    peak = _farthest(x)
    empty = np.abs(peak) < TINY
    peak[empty] = 1.0
    at, level, place = np.empty_like(x), np.empty_like(x), np.empty(x.shape, np.intp)

    def fit(iscale: Floats) -> tuple[Floats, Floats]:
        np.multiply(2 * iscale, x, out=at)  # twice a float has the same digits
        np.add(np.floor(at, out=at), REACH, out=place, casting="unsafe")
        np.take(_LEVELS, place, out=level, mode="clip")  # what lies beyond has the last level
        wl = np.multiply(w, level, out=at)
        sum_l2 = total(np.multiply(wl, level, out=level))
        return total(np.multiply(wl, x, out=at)), sum_l2

    sum_lx, sum_l2 = fit(1 / (-peak / _RISING[0]))
    d = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0))
    best = d * sum_lx
    for step in range(-7, 8):
        sum_lx, sum_l2 = fit((step + _RISING[0]) / peak)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = sum_lx / sum_l2
        d, best = np.where(better, scale, d), np.where(better, scale * sum_lx, best)
    d[empty] = 0.0
    return d


def _reciprocal(d: Floats) -> Floats:
    return np.where(d == 0, np.float32(0), 1 / d)


def _packed(x: Floats, inverse: Floats) -> Bytes:
    """Codes of x (32, subs, n) under the inverse of its scales, two to a byte: (n, 16 * subs)."""
    at = np.fmin(np.floor(2 * inverse * x), REACH)  # what is no number has the last code, as in ggml
    codes = _CODES.take((np.fmax(at, -REACH) + REACH).astype(np.intp), mode="clip")
    low, high = codes[: SUB // 2], codes[SUB // 2 :]
    return (low | high << 4).transpose(2, 1, 0).reshape(x.shape[2], -1)


def _half(d: Floats) -> Bytes:
    """(n,) -> (n, 2), as fp16."""
    return d.astype("<f2").view(np.uint8).reshape(-1, 2)


def _iq4_nl(x: Floats, importance: Floats | None, out: Bytes) -> None:
    """Blocks of 32: d, then the codes."""
    rows, x = len(x), _lanes(x, SUB)
    d = _scales(x, _weights(x, importance, rows))
    blocks = out.reshape(x.shape[2], -1)
    blocks[:, :2], blocks[:, 2:] = _half(d[0]), _packed(x, _reciprocal(d))


def _iq4_xs(x: Floats, importance: Floats | None, out: Bytes) -> None:
    """Blocks of 256: d, the high two bits of eight scales, the low four, the codes."""
    rows, x = len(x), _lanes(x, SUB * SUBS)
    scales = _scales(x, _weights(x, importance, rows))
    d = _farthest(scales) / np.float32(-32)
    sc = np.rint(_reciprocal(d) * scales).clip(-32, 31)
    stored = (sc + 32).astype(np.uint8)
    blocks, high = out.reshape(x.shape[2], -1), (stored >> 4).reshape(2, 4, -1)
    blocks[:, :2], blocks[:, 8:] = _half(d), _packed(x, _reciprocal(d * sc))
    blocks[:, 2:4] = (high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6).T
    blocks[:, 4:8] = (stored[::2] & 15 | stored[1::2] << 4).T


def _quiet(encoder: Encoder) -> Encoder:
    """Divisions by zero and overflows are meant: `where` leaves out what they give, and the caller checks the rest."""

    def called(*args: Any) -> None:
        with np.errstate(all="ignore"):
            encoder(*args)

    return called


ENCODERS = {"IQ4_NL": _quiet(_iq4_nl), "IQ4_XS": _quiet(_iq4_xs)}
