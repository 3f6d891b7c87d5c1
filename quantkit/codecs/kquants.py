"""The K-quants: 256 weights in sub-blocks of 16 or 32, whose small-integer scales share fp16 super-scales.

    Q2_K                w = d * sc * q - dmin * mn       16 sub-blocks of 16, sc and mn of 4 bits
    Q3_K, Q6_K          w = d * sc * q, q signed         16 sub-blocks of 16, sc of 6 bits and of 8
    Q4_K, Q5_K          w = d * sc * q - dmin * mn        8 sub-blocks of 32, sc and mn of 6 bits

Source: llama.cpp `ggml/src/ggml-common.h` for the structs, `dequantize_row_q*_K` in `ggml-quants.c` for the order of
the products, which decides the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

from quantkit.codecs.bits import (
    pack,
    pack_scale_min_k4,
    pack_scales_q3,
    unpack,
    unpack_scale_min_k4,
    unpack_scales_q3,
)
from quantkit.codecs.codec import F16, I8, U8, Codec, Field
from quantkit.codecs.kquants_encode import q2_k, q3_k, q4_k, q5_k, q6_k
from quantkit.codecs.parts import Fields, Ladder, Parts, whole
from quantkit.later import Tensor, torch

BLOCK = 256  # QK_K in ggml-common.h


def _codec(
    name: str, fields: tuple[Field, ...], ladder: Ladder, encode: Callable[[Tensor, Tensor | None], Parts]
) -> Codec:
    return Codec.of_ladder(name, BLOCK, fields, ladder, encode)


def _read_q2_k(scales: Tensor, qs: Tensor, d: Tensor, dmin: Tensor) -> Parts:
    sc, mn = (scales & 15).float(), (scales >> 4).float()
    return Parts(unpack(qs, 2, run=32), d.float(), sc, dmin.float(), mn)


def _write_q2_k(parts: Parts) -> Fields:
    return _supers(parts) | {"scales": _byte(parts.scales) | _byte(parts.mins) << 4, "qs": pack(parts.codes, 2, run=32)}


def _read_q3_k(hmask: Tensor, qs: Tensor, scales: Tensor, d: Tensor) -> Parts:
    # A set bit in hmask means "do not subtract 4": the third bit of q + 4.
    codes = unpack(qs, 2, run=32) | unpack(hmask, 1, run=32) << 2
    return Parts(codes, d.float(), unpack_scales_q3(scales).float() - 32)


def _write_q3_k(parts: Parts) -> Fields:
    return {
        "hmask": pack(parts.codes >> 2, 1, run=32),
        "qs": pack(parts.codes & 3, 2, run=32),
        "scales": pack_scales_q3(_byte(parts.scales + 32)),
        "d": parts.d.half(),
    }


def _read_q4_k(d: Tensor, dmin: Tensor, scales: Tensor, qs: Tensor) -> Parts:
    sc, mn = unpack_scale_min_k4(scales)
    return Parts(unpack(qs, 4, run=32), d.float(), sc.float(), dmin.float(), mn.float())


def _write_q4_k(parts: Parts) -> Fields:
    return _supers(parts) | {
        "scales": pack_scale_min_k4(_byte(parts.scales), _byte(parts.mins)),
        "qs": pack(parts.codes & 15, 4, run=32),
    }


def _read_q5_k(d: Tensor, dmin: Tensor, scales: Tensor, qh: Tensor, qs: Tensor) -> Parts:
    sc, mn = unpack_scale_min_k4(scales)
    codes = unpack(qs, 4, run=32) | unpack(qh, 1, run=32) << 4
    return Parts(codes, d.float(), sc.float(), dmin.float(), mn.float())


def _write_q5_k(parts: Parts) -> Fields:
    return _write_q4_k(parts) | {"qh": pack(parts.codes >> 4, 1, run=32)}


def _read_q6_k(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Parts:
    return Parts(unpack(ql, 4, run=64) | unpack(qh, 2, run=32) << 4, d.float(), scales.float())


def _write_q6_k(parts: Parts) -> Fields:
    return {
        "ql": pack(parts.codes & 15, 4, run=64),
        "qh": pack(parts.codes >> 4, 2, run=32),
        "scales": parts.scales.to(torch.int8),
        "d": parts.d.half(),
    }


def _supers(parts: Parts) -> Fields:
    assert parts.dmin is not None
    return {"d": parts.d.half(), "dmin": parts.dmin.half()}


def _byte(whole_numbers: Tensor | None) -> Tensor:
    assert whole_numbers is not None
    return whole_numbers.to(torch.uint8)


_D = ("d", F16, 1)
_DMIN = ("dmin", F16, 1)
_K_SCALES = ("scales", U8, 12)  # K_SCALE_SIZE

_Q2_K = Ladder(_read_q2_k, _write_q2_k, whole(0, 2), (0, 15), (0, 15))
_Q3_K = Ladder(_read_q3_k, _write_q3_k, whole(-4, 3), (-32, 31))
_Q4_K = Ladder(_read_q4_k, _write_q4_k, whole(0, 4), (0, 63), (0, 63))
_Q5_K = Ladder(_read_q5_k, _write_q5_k, whole(0, 5), (0, 63), (0, 63))
_Q6_K = Ladder(_read_q6_k, _write_q6_k, whole(-32, 6), (-128, 127))

CODECS = (
    _codec("Q2_K", (("scales", U8, 16), ("qs", U8, 64), _D, _DMIN), _Q2_K, q2_k),
    _codec("Q3_K", (("hmask", U8, 32), ("qs", U8, 64), _K_SCALES, _D), _Q3_K, q3_k),
    _codec("Q4_K", (_D, _DMIN, _K_SCALES, ("qs", U8, 128)), _Q4_K, q4_k),
    _codec("Q5_K", (_D, _DMIN, _K_SCALES, ("qh", U8, 32), ("qs", U8, 128)), _Q5_K, q5_k),
    _codec("Q6_K", (("ql", U8, 128), ("qh", U8, 64), ("scales", I8, 16), _D), _Q6_K, q6_k),
)
