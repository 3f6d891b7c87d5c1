"""The device of a command, which has its process to itself."""

from __future__ import annotations

from quantkit.hardware import multiply_at_full_width
from quantkit.later import on_cpu, torch


def own(device: torch.device) -> torch.device:
    """The same device; a CPU multiplies float32 at full width from now on.

    A program that imports quantkit is not changed like that: there `torch.compile` may ask torch how precise float32
    products are, and torch has no word for the answer.
    """
    if on_cpu(device):
        multiply_at_full_width()
    return device
