"""Microscaling: four-bit floats (E2M1) under a scale that is itself a float of eight bits.

    MXFP4    32 weights, one scale E8M0 (a power of two), as in the OCP MX specification
    NVFP4    64 weights, one scale UE4M3 for each 16

ggml stores the E2M1 levels doubled, as integers, and halves the scale. Source: llama.cpp `ggml/src/ggml-common.h`,
`ggml_e8m0_to_fp32_half` and `ggml_ue4m3_to_fp32` in `ggml-impl.h`.
"""

from __future__ import annotations

import gguf

from quantkit.codecs.bits import unpack
from quantkit.codecs.codec import U8, Codec
from quantkit.later import Tensor, torch

LEVELS = gguf.quants.MXFP4.kvalues  # kvalues_mxfp4: twice 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives


def _levels(qs: Tensor, run: int) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=qs.device)[unpack(qs, 4, run).long()]


def _half_e8m0(e: Tensor) -> Tensor:
    """2^(e - 128), by the bits of a float32; below e = 2 that is a subnormal number."""
    exponent = e.int()
    return torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23).view(torch.float32)


def _half_ue4m3(d: Tensor) -> Tensor:
    """Half of a float of four exponent bits (bias 7) and three mantissa bits, by the bits of a float32 (bias 127).

    With exponent 0 it is mantissa * 2^-10, halved already; ggml reads 0x7F as zero and ignores the eighth bit.
    """
    exponent, mantissa = (d >> 3 & 15).int(), (d & 7).int()
    normal = (exponent - 8 + 127 << 23 | mantissa << 20).view(torch.float32)
    return torch.where(d == 0x7F, 0.0, torch.where(exponent == 0, mantissa * 2.0**-10, normal))


def _mxfp4(e: Tensor, qs: Tensor) -> Tensor:
    return _levels(qs, run=16) * _half_e8m0(e)


def _nvfp4(d: Tensor, qs: Tensor) -> Tensor:
    return (_levels(qs, run=8).view(-1, 4, 16) * _half_ue4m3(d)[..., None]).flatten(1)


CODECS = (
    Codec("MXFP4", 32, (("e", U8, 1), ("qs", U8, 16)), _mxfp4),
    Codec("NVFP4", 64, (("d", U8, 4), ("qs", U8, 32)), _nvfp4),
)
