"""The K-quants: 256 weights in sub-blocks of 16 or 32, whose small-integer scales share fp16 super-scales.

    Q2_K                w = d * sc * q - dmin * mn       16 sub-blocks of 16, sc and mn of 4 bits
    Q3_K, Q6_K          w = d * sc * q, q signed         16 sub-blocks of 16, sc of 6 bits and of 8
    Q4_K, Q5_K          w = d * sc * q - dmin * mn        8 sub-blocks of 32, sc and mn of 6 bits

Source: llama.cpp `ggml/src/ggml-common.h` for the structs, `dequantize_row_q*_K` in `ggml-quants.c` for the order of
the products, which decides the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.codecs.bits import unpack, unpack_scale_min_k4, unpack_scales_q3
from quantkit.codecs.codec import Codec
from quantkit.codecs.kquants_encode import q2_k, q3_k, q4_k, q5_k, q6_k

BLOCK = 256  # QK_K in ggml-common.h


def _times(q: Tensor, scale: Tensor) -> Tensor:
    """Multiply q (n, 256) by one scale a sub-block: (n, 8) or (n, 16)."""
    return (q.view(*scale.shape, -1) * scale[..., None]).flatten(1)


def _minus(values: Tensor, minimum: Tensor) -> Tensor:
    """Take one minimum a sub-block, (n, 8) or (n, 16), from values (n, 256)."""
    return (values.view(*minimum.shape, -1) - minimum[..., None]).flatten(1)


def _q2_k(scales: Tensor, qs: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    q = unpack(qs, 2, run=32).float()
    return _minus(_times(q, d.float() * (scales & 15)), dmin.float() * (scales >> 4))


def _q3_k(hmask: Tensor, qs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    # A set bit in hmask means "do not subtract 4": the third bit of q + 4.
    q = (unpack(qs, 2, run=32) | unpack(hmask, 1, run=32) << 2).float() - 4
    return _times(q, d.float() * (unpack_scales_q3(scales).float() - 32))


def _q4_k(d: Tensor, dmin: Tensor, scales: Tensor, qs: Tensor) -> Tensor:
    sc, mn = unpack_scale_min_k4(scales)
    q = unpack(qs, 4, run=32).float()
    return _minus(_times(q, d.float() * sc), dmin.float() * mn)


def _q5_k(d: Tensor, dmin: Tensor, scales: Tensor, qh: Tensor, qs: Tensor) -> Tensor:
    sc, mn = unpack_scale_min_k4(scales)
    q = (unpack(qs, 4, run=32) | unpack(qh, 1, run=32) << 4).float()
    return _minus(_times(q, d.float() * sc), dmin.float() * mn)


def _q6_k(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    q = (unpack(ql, 4, run=64) | unpack(qh, 2, run=32) << 4).float() - 32
    return _times(q, d.float() * scales)


_D = ("d", torch.float16, 1)
_DMIN = ("dmin", torch.float16, 1)
_K_SCALES = ("scales", torch.uint8, 12)  # K_SCALE_SIZE

CODECS = (
    Codec("Q2_K", BLOCK, (("scales", torch.uint8, 16), ("qs", torch.uint8, 64), _D, _DMIN), _q2_k, q2_k),
    Codec("Q3_K", BLOCK, (("hmask", torch.uint8, 32), ("qs", torch.uint8, 64), _K_SCALES, _D), _q3_k, q3_k),
    Codec("Q4_K", BLOCK, (_D, _DMIN, _K_SCALES, ("qs", torch.uint8, 128)), _q4_k, q4_k),
    Codec("Q5_K", BLOCK, (_D, _DMIN, _K_SCALES, ("qh", torch.uint8, 32), ("qs", torch.uint8, 128)), _q5_k, q5_k),
    Codec(
        "Q6_K", BLOCK, (("ql", torch.uint8, 128), ("qh", torch.uint8, 64), ("scales", torch.int8, 16), _D), _q6_k, q6_k
    ),
)
