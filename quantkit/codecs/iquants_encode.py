"""Torch encoders of IQ4_NL and IQ4_XS, byte for byte ggml's (`quantize_row_iq4_nl_impl` in `ggml-quants.c`).

The sixteen levels are uneven, so a code is the nearest level rather than a rounded number; the scale is searched as in
the K-quants, over fifteen candidates that map the value of largest magnitude near the outermost level.
"""

from __future__ import annotations

import gguf

from quantkit.codecs.parts import Parts
from quantkit.codecs.search import TINY, farthest, quotient, reciprocal, root, rounded, total
from quantkit.later import Tensor, torch

SUB = 32  # weights under one scale, in both types
LEVELS = tuple(map(float, gguf.quants.IQ4_NL.kvalues))


def levels_on(device: torch.device) -> Tensor:
    """The sixteen levels, rising from -127 to 113 (`kvalues_iq4nl`), float32."""
    return torch.tensor(LEVELS, device=device)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level; midway, the upper one. The midpoints are exact in float32."""
    midpoints = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(x, midpoints, right=True, out_int32=True)


def _scales(x: Tensor, w: Tensor, levels: Tensor) -> Tensor:
    """Scale d of each group (32, ...) that makes sum w (x - d level)^2 small; 0 for an empty group."""
    peak = farthest(x)

    def fit(iscale: Tensor) -> tuple[Tensor, Tensor]:
        q = levels[_nearest(iscale * x, levels)]
        wq = w * q
        return total(wq * x), total(wq * q)

    sumqx, sumq2 = fit(quotient(1.0, quotient(-peak, levels[0])))
    d = torch.where(sumq2 > 0, sumqx / sumq2, 0.0)
    best = d * sumqx
    for step in range(-7, 8):
        sumqx, sumq2 = fit(quotient(step + levels[0], peak))
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        scale = sumqx / sumq2
        d, best = torch.where(better, scale, d), torch.where(better, scale * sumqx, best)
    return torch.where(peak.abs() < TINY, 0.0, d)


def _lanes(x: Tensor, block: int) -> Tensor:
    """(rows, width) -> (32, block / 32, n)."""
    return x.reshape(-1, block // SUB, SUB).permute(2, 1, 0).contiguous()


def _weights(x: Tensor, importance: Tensor | None, rows: int) -> Tensor:
    """x^2, or importance * sqrt(twice the mean of x^2 over the block + x^2)."""
    squares = x * x
    if importance is None:
        return squares
    block = SUB * x.shape[1]
    sigma2 = total(squares.transpose(0, 1).reshape(block, -1)) * (2 / block)
    return _lanes(importance.expand(rows, -1), block) * root(sigma2 + squares)


def _codes(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).permute(2, 1, 0).flatten(1)


def iq4_nl(x: Tensor, importance: Tensor | None) -> Parts:
    """Blocks of 32 under one fp16 scale."""
    rows, x, levels = len(x), _lanes(x, SUB), levels_on(x.device)
    d = _scales(x, _weights(x, importance, rows), levels)
    stored = d.half().float().view(-1, 1)
    return Parts(_codes(_nearest(reciprocal(d) * x, levels)), stored, torch.ones_like(stored))


def iq4_xs(x: Tensor, importance: Tensor | None) -> Parts:
    """Blocks of 256: eight scales of 6 bits under one fp16 scale."""
    rows, x, levels = len(x), _lanes(x, 256), levels_on(x.device)
    scales = _scales(x, _weights(x, importance, rows), levels)
    d = farthest(scales) / -32
    sc = rounded(reciprocal(d) * scales, -32, 31)
    return Parts(_codes(_nearest(reciprocal(d * sc) * x, levels)), d.half().float()[:, None], sc.T)
