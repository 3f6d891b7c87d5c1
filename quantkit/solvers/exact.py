"""Weights that lie on a grid already, as the blocks of a Q4_0 or Q8_0 file do: found again exactly."""

from __future__ import annotations

from quantkit.codecs.grid import Grid, Quantized
from quantkit.later import Tensor, torch


def exact(weight: Tensor, grid: Grid) -> Quantized | None:
    """`weight` (N, K) as codes and fp16 scales that dequantize to the very same floats; None where there are none.

    The weight of a group that lies farthest out is some level times the scale, so each level is tried for it, from the
    grid's end inwards. A scale may be negative: Q4_0 has one wherever the farthest weight is positive.

    >>> exact(torch.tensor([[-1.0, 0.75, 0.25, 0.0]]), Grid(4, 4)).codes
    tensor([[ 0, 14, 10,  8]], dtype=torch.uint8)
    """
    groups = weight.float().reshape(-1, grid.group)
    middle = 2 ** (grid.bits - 1)
    farthest = groups.gather(1, groups.abs().argmax(1, keepdim=True))[:, 0]
    scales = torch.ones_like(farthest)
    left = farthest.nonzero()[:, 0]  # groups without a scale yet
    for level in (-middle, *(side * i for i in range(middle - 1, 0, -1) for side in (1, -1))):
        scale = (farthest[left] / level).half().float()
        codes = torch.round(groups[left] / scale[:, None])
        held = (codes * scale[:, None] == groups[left]).all(1) & (codes >= -middle).all(1) & (codes < middle).all(1)
        scales[left[held]] = scale[held]
        left = left[~held]
        if not len(left):
            break
    if len(left):
        return None
    codes = (torch.round(groups / scales[:, None]) + middle).byte().view(weight.shape)
    scales = scales.half().view(len(weight), -1)
    return Quantized(codes, scales, torch.full_like(scales, middle, dtype=torch.uint8))
