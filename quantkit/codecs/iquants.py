"""The I-quants: codebook indices (IQ1 to IQ3) or a table of uneven levels (IQ4), with small scales under one fp16 `d`.

    IQ2_XXS, IQ2_XS, IQ2_S    8 weights = d * (1/2 + sc) / 4 * grid[i] * signs       grids of 256, 512 and 1024
    IQ3_XXS                   4 weights = d * (1/2 + sc) / 2 * grid[i] * signs       grid of 256
    IQ3_S                     4 weights = d * (1 + 2 * sc) * grid[i] * signs         grid of 512
    IQ1_S, IQ1_M              8 weights = d * (1 + 2 * sc) * (grid[i] +- 1/8)        grid of 2048
    IQ4_NL                    1 weight  = d * table[q]                               16 levels
    IQ4_XS                    1 weight  = d * (sc - 32) * table[q]

The grids are read from gguf-py, which carries them packed. Only libggml can encode to the codebook types: the search
for a grid point among its neighbours does not turn into tensor operations. Source: llama.cpp `ggml/src/ggml-common.h`,
`dequantize_row_iq*` in `ggml-quants.c`.
"""

from __future__ import annotations

import functools

import gguf

from quantkit.codecs.bits import pack, unpack
from quantkit.codecs.codec import F16, U8, U16, Codec
from quantkit.codecs.iquants_encode import LEVELS, iq4_nl, iq4_xs
from quantkit.codecs.parts import Fields, Ladder, Parts
from quantkit.later import Tensor, torch

BLOCK = 256  # QK_K
BLOCK_NL = 32  # QK4_NL
DELTA = 0.125  # IQ1S_DELTA and IQ1M_DELTA in ggml-common.h


@functools.cache
def _grid(name: str, device: torch.device) -> Tensor:
    """The codebook of a type: (points, 8) or (points, 4) float32."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    return torch.from_numpy(quant.grid).reshape(quant.grid_shape).to(device)


def _points(name: str, index: Tensor) -> Tensor:
    """Grid points of (n, groups) indices -> (n, groups, 8) or (n, groups, 4)."""
    return _grid(name, index.device)[index.long()]


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    """Multiply the values of n blocks, in any grouping, by (n, sub-blocks) scales -> (n, 256)."""
    return (scale[..., None] * values.view(*scale.shape, -1)).flatten(1)


def _signs(bits: Tensor) -> Tensor:
    """(n, k) bytes -> (n, k, 8) float32 of +1 (bit clear) and -1 (bit set), low bit first."""
    return 1 - 2 * unpack(bits, 1, run=1).view(*bits.shape, 8).float()


def _even_signs(seven: Tensor) -> Tensor:
    """Seven stored sign bits; the eighth makes the number of minus signs even (the table `ksigns_iq2xs`)."""
    parity = seven ^ seven >> 4
    parity = parity ^ parity >> 2
    parity = (parity ^ parity >> 1) & 1
    return _signs((seven | parity << 7).to(torch.uint8))


def _unsigned(field: Tensor) -> Tensor:
    """A uint16 field as int32, on which torch can shift."""
    return field.view(torch.int16).int() & 0xFFFF


def _signs_and_scale(word: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k) int32 words `ssss 7777777 7777777 7777777 7777777` -> signs (n, 4k, 8), scales (n, k) of four bits."""
    sevens = word[..., None] >> torch.arange(0, 28, 7, device=word.device) & 127
    return _even_signs(sevens.flatten(1)), (word >> 28 & 15).float()


def _iq2_xxs(d: Tensor, qs: Tensor) -> Tensor:
    # Four uint16 serve 32 weights: four bytes of grid indices, then one word of signs and scale.
    words = qs.view(torch.int32).view(-1, 8, 2)
    index = words[..., 0].contiguous().view(torch.uint8)
    signs, sc = _signs_and_scale(words[..., 1])
    return _scaled(d.float() * (0.5 + sc) * 0.25, _points("IQ2_XXS", index) * signs)


def _iq2_xs(d: Tensor, qs: Tensor, scales: Tensor) -> Tensor:
    # uint16: seven sign bits over nine bits of grid index.
    words = _unsigned(qs)
    sc = unpack(scales, 4, run=1).float()
    return _scaled(d.float() * (0.5 + sc) * 0.25, _points("IQ2_XS", words & 511) * _even_signs(words >> 9))


def _iq2_s(d: Tensor, qs: Tensor, qh: Tensor, scales: Tensor) -> Tensor:
    # qs: 32 low bytes of the indices, then 32 bytes of signs. qh: the two high bits of four indices.
    index = qs[:, :32].int() | unpack(qh, 2, run=1).int() << 8
    sc = unpack(scales, 4, run=1).float()
    return _scaled(d.float() * (0.5 + sc) * 0.25, _points("IQ2_S", index) * _signs(qs[:, 32:]))


def _iq3_xxs(d: Tensor, qs: Tensor) -> Tensor:
    # qs: 64 grid indices, then eight words of signs and scale.
    signs, sc = _signs_and_scale(qs[:, 64:].contiguous().view(torch.int32))
    points = _points("IQ3_XXS", qs[:, :64]).view_as(signs)
    return _scaled(d.float() * (0.5 + sc) * 0.5, points * signs)


def _iq3_s(d: Tensor, qs: Tensor, qh: Tensor, signs: Tensor, scales: Tensor) -> Tensor:
    index = qs.int() | unpack(qh, 1, run=1).int() << 8
    sc = unpack(scales, 4, run=1).float()
    minus = _signs(signs)
    return _scaled(d.float() * (1 + 2 * sc), _points("IQ3_S", index).view_as(minus) * minus)


def _iq1_s(d: Tensor, qs: Tensor, qh: Tensor) -> Tensor:
    # qh serves 32 weights: the shift's sign, a scale of three bits, the three high bits of four indices.
    words = _unsigned(qh)
    high = words[..., None] >> torch.arange(0, 12, 3, device=words.device) & 7
    shift = torch.where(words >> 15 > 0, -DELTA, DELTA).repeat_interleave(4, 1)
    sc = (words >> 12 & 7).float()
    return _scaled(d.float() * (2 * sc + 1), _points("IQ1_S", qs.int() | high.flatten(1) << 8) + shift[..., None])


def _iq1_m(qs: Tensor, qh: Tensor, scales: Tensor) -> Tensor:
    # Each of the four uint16 in `scales` holds a nibble of d over four scales of three bits (d's low nibble first).
    words = scales.view(torch.int16).int() & 0xFFFF
    nibbles = (words >> 12) << torch.arange(0, 16, 4, device=words.device)
    d = nibbles.sum(1, keepdim=True).to(torch.int16).view(torch.float16).float()
    sc = (words[..., None] >> torch.arange(0, 12, 3, device=words.device) & 7).flatten(1).float()
    # qh, a nibble for 8 weights: the shift's sign over the three high bits of the index.
    high = unpack(qh, 4, run=1).int()
    shift = torch.where(high >> 3 > 0, -DELTA, DELTA)
    return _scaled(d * (2 * sc + 1), _points("IQ1_M", qs.int() | (high & 7) << 8) + shift[..., None])


def _read_iq4_nl(d: Tensor, qs: Tensor) -> Parts:
    d = d.float()
    return Parts(unpack(qs, 4, run=16), d, torch.ones_like(d))


def _write_iq4_nl(parts: Parts) -> Fields:
    return {"d": parts.d.half(), "qs": pack(parts.codes, 4, run=16)}


def _read_iq4_xs(d: Tensor, scales_h: Tensor, scales_l: Tensor, qs: Tensor) -> Parts:
    # Scale j of eight: its low four bits are nibble j of scales_l, its high two are bits 2j and 2j + 1 of scales_h.
    sc = unpack(scales_l, 4, run=1) | unpack(scales_h.view(torch.uint8), 2, run=1) << 4
    return Parts(unpack(qs, 4, run=16), d.float(), sc.float() - 32)


def _write_iq4_xs(parts: Parts) -> Fields:
    stored = (parts.scales + 32).to(torch.uint8)
    return _write_iq4_nl(parts) | {
        "scales_h": pack(stored >> 4, 2, run=1).view(torch.uint16),
        "scales_l": pack(stored & 15, 4, run=1),
    }


_D = ("d", F16, 1)
_SCALES = ("scales", U8, 8)
_QS16 = ("qs", U16, 32)

_IQ4_NL = Ladder(_read_iq4_nl, _write_iq4_nl, LEVELS)
_IQ4_XS = Ladder(_read_iq4_xs, _write_iq4_xs, LEVELS, (-32, 31))

CODECS = (
    Codec("IQ1_S", BLOCK, (_D, ("qs", U8, 32), ("qh", U16, 8)), _iq1_s, None, True),
    Codec("IQ1_M", BLOCK, (("qs", U8, 32), ("qh", U8, 16), _SCALES), _iq1_m, None, True),
    Codec("IQ2_XXS", BLOCK, (_D, _QS16), _iq2_xxs, None, True),
    Codec("IQ2_XS", BLOCK, (_D, _QS16, _SCALES), _iq2_xs, None, True),
    Codec("IQ2_S", BLOCK, (_D, ("qs", U8, 64), ("qh", U8, 8), _SCALES), _iq2_s),
    Codec("IQ3_XXS", BLOCK, (_D, ("qs", U8, 96)), _iq3_xxs),
    Codec(
        "IQ3_S",
        BLOCK,
        (_D, ("qs", U8, 64), ("qh", U8, 8), ("signs", U8, 32), ("scales", U8, 4)),
        _iq3_s,
    ),
    Codec.of_ladder("IQ4_NL", BLOCK_NL, (_D, ("qs", U8, 16)), _IQ4_NL, iq4_nl),
    Codec.of_ladder(
        "IQ4_XS",
        BLOCK,
        (_D, ("scales_h", U16, 1), ("scales_l", U8, 4), ("qs", U8, 128)),
        _IQ4_XS,
        iq4_xs,
    ),
)
