"""The plain floats and the legacy block types: 32 weights around one fp16 scale `d`, and for Q*_1 one fp16 minimum `m`.

    Q4_0, Q5_0, Q8_0    w = d * (q - offset)      offset 8, 16 and 0 (Q8_0 is signed)
    Q4_1, Q5_1          w = d * q + m

The low four bits of weights j and 16 + j share byte `qs[j]` (low nibble first); the fifth bits of Q5_* are the 32 bits
of `qh` in the order of the weights. Source: llama.cpp `ggml/src/ggml-common.h`, `dequantize_row_*` in `ggml-quants.c`.
Q8_1 and Q8_K are left out: ggml uses them for activations only and no file holds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.codecs.bits import unpack
from quantkit.codecs.codec import Codec
from quantkit.codecs.legacy_encode import affine, q8_0, symmetric

BLOCK = 32  # QK4_0 and its like in ggml-common.h


def _plain(values: Tensor) -> Tensor:
    return values.float()


def _cast(dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], dict[str, Tensor]]:
    return lambda x, _importance: {"values": x.to(dtype).view(-1, 1)}


def _q4(qs: Tensor) -> Tensor:
    return unpack(qs, 4, run=16).float()


def _q5(qs: Tensor, qh: Tensor) -> Tensor:
    return (unpack(qs, 4, run=16) | unpack(qh, 1, run=1) << 4).float()


def _q4_0(d: Tensor, qs: Tensor) -> Tensor:
    return (_q4(qs) - 8) * d.float()


def _q4_1(d: Tensor, m: Tensor, qs: Tensor) -> Tensor:
    return _q4(qs) * d.float() + m.float()


def _q5_0(d: Tensor, qh: Tensor, qs: Tensor) -> Tensor:
    return (_q5(qs, qh) - 16) * d.float()


def _q5_1(d: Tensor, m: Tensor, qh: Tensor, qs: Tensor) -> Tensor:
    return _q5(qs, qh) * d.float() + m.float()


def _q8_0(d: Tensor, qs: Tensor) -> Tensor:
    return qs.float() * d.float()


_D = ("d", torch.float16, 1)
_M = ("m", torch.float16, 1)
_QH = ("qh", torch.uint8, 4)
_QS = ("qs", torch.uint8, 16)

CODECS = (
    Codec("F32", 1, (("values", torch.float32, 1),), _plain, _cast(torch.float32)),
    Codec("F16", 1, (("values", torch.float16, 1),), _plain, _cast(torch.float16)),
    Codec("BF16", 1, (("values", torch.bfloat16, 1),), _plain, _cast(torch.bfloat16)),
    Codec("Q4_0", BLOCK, (_D, _QS), _q4_0, symmetric(4)),
    Codec("Q4_1", BLOCK, (_D, _M, _QS), _q4_1, affine(4)),
    Codec("Q5_0", BLOCK, (_D, _QH, _QS), _q5_0, symmetric(5)),
    Codec("Q5_1", BLOCK, (_D, _M, _QH, _QS), _q5_1, affine(5)),
    Codec("Q8_0", BLOCK, (_D, ("qs", torch.int8, BLOCK)), _q8_0, q8_0),
)
