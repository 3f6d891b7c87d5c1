"""torch when something of it is needed: to import it takes two seconds and 200 MiB, and much goes without.

    from quantkit.later import Tensor, no_grad, torch

Every module takes it from here, and none touches it while it is imported itself: a GGUF that is made of a GGUF on the
CPU is the work of libggml and numpy alone.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Device = torch.device | str
else:

    class _Later:
        """Stands for a module until an attribute of it is asked for; from then on that attribute is its own."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(importlib.import_module(self._name), attribute)  # waits while another thread imports it
            setattr(self, attribute, value)
            return value

    torch, nn = _Later("torch"), _Later("torch.nn")
    Tensor = Device = Any

__all__ = ["Device", "Tensor", "is_tensor", "nn", "no_grad", "on_cpu", "torch", "torch_is_there"]

F = TypeVar("F", bound=Callable[..., Any])


def torch_is_there() -> bool:
    """Whether torch has been imported, by whomever, or is just being imported."""
    return sys.modules.get("torch") is not None


def is_tensor(value: object) -> bool:
    """Whether `value` is a tensor of torch's; where torch is not loaded, there is none."""
    return torch_is_there() and isinstance(value, torch.Tensor)


def on_cpu(device: Device) -> bool:
    """Whether a device, or the name of one, is the CPU."""
    return str(device) in ("cpu", "cpu:0")


def no_grad(function: F) -> F:
    """`torch.no_grad()` as a decorator, of generators too."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return torch.no_grad()(function)(*args, **kwargs)

    return called  # type: ignore[return-value]
