"""Small integers inside bytes, as GGUF blocks hold them: planes of bits over a run of bytes.

In a run of R bytes the first R values are the low bits, the next R values the bits above, and so on; so value number
p * R + r of a run sits in byte r at bit p * bits:

    byte r (4-bit values, R = 16):   7 6 5 4 | 3 2 1 0
                                     value   | value
                                     16 + r  | r
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)[:, None]


def unpack(packed: Tensor, bits: int, run: int) -> Tensor:
    """(n, bytes) uint8 -> (n, bytes * 8 / bits) uint8, each value in 0 .. 2^bits - 1.

    >>> unpack(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4, run=2).tolist()
    [[1, 3, 2, 4]]
    """
    planes = packed.reshape(len(packed), -1, 1, run) >> _shifts(bits, packed.device)
    return (planes & (2**bits - 1)).flatten(1)


def pack(values: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `unpack`: (n, count) uint8 -> (n, count * bits / 8) uint8; values must fit their bits."""
    planes = values.reshape(len(values), -1, 8 // bits, run) << _shifts(bits, values.device)
    return planes.sum(2, dtype=torch.uint8).flatten(1)
