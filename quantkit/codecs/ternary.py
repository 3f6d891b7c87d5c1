"""One to two bits without a codebook: ternary TQ1_0 and TQ2_0 (BitNet), binary Q1_0. Each weight is d times -1, 0 or 1.

TQ1_0 keeps five trits in a byte as a fixed-point fraction: byte = ceil(256 / 243 * (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4)),
so that multiplying by 3^i modulo 256 moves trit i to the front and one more product with 3 carries it out of the byte.
Source: llama.cpp `ggml/src/ggml-common.h`, `dequantize_row_tq1_0`, `_tq2_0`, `_q1_0` in `ggml-quants.c`.
"""

from __future__ import annotations

from quantkit.codecs.bits import unpack
from quantkit.codecs.codec import F16, U8, Codec
from quantkit.later import Tensor, torch

BLOCK = 256  # QK_K
BLOCK_Q1 = 128  # QK1_0


def _trits(packed: Tensor, count: int) -> Tensor:
    """(n, run) bytes -> (n, count * run) trits 0, 1, 2; trit i of all bytes of the run before trit i + 1."""
    powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8, device=packed.device)
    front = packed[:, None, :] * powers[:, None]  # uint8 wraps around, as it must
    return (front.short() * 3 >> 8).flatten(1)


def _tq1_0(qs: Tensor, qh: Tensor, d: Tensor) -> Tensor:
    q = torch.cat([_trits(qs[:, :32], 5), _trits(qs[:, 32:], 5), _trits(qh, 4)], 1)
    return (q.float() - 1) * d.float()


def _tq2_0(qs: Tensor, d: Tensor) -> Tensor:
    return (unpack(qs, 2, run=32).float() - 1) * d.float()


def _q1_0(d: Tensor, qs: Tensor) -> Tensor:
    return (2 * unpack(qs, 1, run=1).float() - 1) * d.float()


_D = ("d", F16, 1)

CODECS = (
    Codec("TQ1_0", BLOCK, (("qs", U8, 48), ("qh", U8, 4), _D), _tq1_0),
    Codec("TQ2_0", BLOCK, (("qs", U8, 64), _D), _tq2_0),
    Codec("Q1_0", BLOCK_Q1, (_D, ("qs", U8, 16)), _q1_0),
)
