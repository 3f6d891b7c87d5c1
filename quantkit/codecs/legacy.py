"""The plain floats and the legacy block types: 32 weights around one fp16 scale `d`, and for Q*_1 one fp16 minimum `m`.

    Q4_0, Q5_0, Q8_0    w = d * (q - offset)      offset 8, 16 and 0 (Q8_0 is signed)
    Q4_1, Q5_1          w = d * q + m

The low four bits of weights j and 16 + j share byte `qs[j]` (low nibble first); the fifth bits of Q5_* are the 32 bits
of `qh` in the order of the weights. Source: llama.cpp `ggml/src/ggml-common.h`, `dequantize_row_*` in `ggml-quants.c`.
Q8_1 and Q8_K are left out: ggml uses them for activations only and no file holds them.
"""

from __future__ import annotations

from collections.abc import Callable

from quantkit.codecs.bits import pack, unpack
from quantkit.codecs.codec import BF16, F16, F32, I8, U8, Codec
from quantkit.codecs.legacy_encode import affine, q8_0, symmetric
from quantkit.codecs.parts import Fields, Ladder, Parts, whole
from quantkit.later import Tensor, torch

BLOCK = 32  # QK4_0 and its like in ggml-common.h


def _plain(values: Tensor) -> Tensor:
    return values.float()


def _cast(kind: str) -> Callable[[Tensor, Tensor | None], dict[str, Tensor]]:
    return lambda x, _importance: {"values": x.to(getattr(torch, kind)).view(-1, 1)}


def _read(d: Tensor, qs: Tensor, qh: Tensor | None = None, m: Tensor | None = None) -> Parts:
    codes = unpack(qs, 4, run=16)
    if qh is not None:
        codes |= unpack(qh, 1, run=1) << 4
    d = d.float()
    one = torch.ones_like(d)
    return Parts(codes, d, one, *(() if m is None else (-m.float(), one)))


def _write(bits: int) -> Callable[[Parts], Fields]:
    def write(parts: Parts) -> Fields:
        fields = {"d": parts.d.half(), "qs": pack(parts.codes & 15, 4, run=16)}
        if parts.dmin is not None:
            fields["m"] = -parts.dmin.half()
        if bits == 5:
            fields["qh"] = pack(parts.codes >> 4, 1, run=1)
        return fields

    return write


def _q8_0(d: Tensor, qs: Tensor) -> Tensor:
    return qs.float() * d.float()


_D = ("d", F16, 1)
_M = ("m", F16, 1)
_QH = ("qh", U8, 4)
_QS = ("qs", U8, 16)

CODECS = (
    Codec("F32", 1, (("values", F32, 1),), _plain, _cast(F32)),
    Codec("F16", 1, (("values", F16, 1),), _plain, _cast(F16)),
    Codec("BF16", 1, (("values", BF16, 1),), _plain, _cast(BF16)),
    Codec.of_ladder("Q4_0", BLOCK, (_D, _QS), Ladder(_read, _write(4), whole(-8, 4)), symmetric(4)),
    Codec.of_ladder("Q4_1", BLOCK, (_D, _M, _QS), Ladder(_read, _write(4), whole(0, 4)), affine(4)),
    Codec.of_ladder("Q5_0", BLOCK, (_D, _QH, _QS), Ladder(_read, _write(5), whole(-16, 5)), symmetric(5)),
    Codec.of_ladder("Q5_1", BLOCK, (_D, _M, _QH, _QS), Ladder(_read, _write(5), whole(0, 5)), affine(5)),
    Codec("Q8_0", BLOCK, (_D, ("qs", I8, BLOCK)), _q8_0, q8_0),
)
