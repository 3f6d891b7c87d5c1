"""Small integers inside bytes, as GGUF blocks hold them: planes of bits over a run of bytes, and the six-bit scales.

In a run of R bytes the first R values are the low bits, the next R values the bits above, and so on; so value number
p * R + r of a run sits in byte r at bit p * bits:

    byte r (4-bit values, R = 16):   7 6 5 4 | 3 2 1 0
                                     value   | value
                                     16 + r  | r
"""

from __future__ import annotations

from quantkit.later import Tensor, torch


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


def unpack_scale_min_k4(scales: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, both (n, 8) uint8 (Q4_K, Q5_K; ggml's `get_scale_min_k4`).

    byte      7 6     5 4 3 2 1 0            byte      7 6 5 4     3 2 1 0
    0 + j    sc[4+j]  sc[j]                  8 + j    mn[4+j]     sc[4+j]       j = 0 .. 3
             high 2                                   low 4       low 4
    4 + j    mn[4+j]  mn[j]
             high 2
    """
    first, second, low = scales.view(-1, 3, 4).unbind(1)
    sc = torch.cat([first & 63, (low & 15) | (first >> 2 & 48)], 1)
    mn = torch.cat([second & 63, (low >> 4) | (second >> 2 & 48)], 1)
    return sc, mn


def pack_scale_min_k4(sc: Tensor, mn: Tensor) -> Tensor:
    """The inverse of `unpack_scale_min_k4`."""
    first = sc[:, :4] | (sc[:, 4:] & 48) << 2
    second = mn[:, :4] | (mn[:, 4:] & 48) << 2
    return torch.cat([first, second, (sc[:, 4:] & 15) | mn[:, 4:] << 4], 1)


def unpack_scales_q3(scales: Tensor) -> Tensor:
    """12 bytes -> 16 values of 6 bits, (n, 16) uint8 (Q3_K, which stores scale + 32).

    byte      7 6 5 4     3 2 1 0            byte      7 6       5 4       3 2      1 0
    0 + j    v[8+j]      v[j]    j = 0 .. 7  8 + j    v[12+j]   v[8+j]    v[4+j]   v[j]      j = 0 .. 3
             low 4       low 4                        high 2    high 2    high 2   high 2
    """
    return unpack(scales[:, :8], 4, run=8) | unpack(scales[:, 8:], 2, run=4) << 4


def pack_scales_q3(values: Tensor) -> Tensor:
    """The inverse of `unpack_scales_q3`."""
    return torch.cat([pack(values & 15, 4, run=8), pack(values >> 4, 2, run=4)], 1)
