"""A device that is not there: its tensors lie in CPU memory, refuse to meet others, and are counted.

It stands in for a CUDA card where there is none. Work on it goes through the same code as on a card, and fails as it
does there where a tensor was left on the processor. Built on torch's hook for devices written in Python (PrivateUse1).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
_setup_privateuseone_for_python_backend("card")
CARD = torch.device("card", 0)
# A card takes indices from the processor, as it does numbers.
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
# What torch has for cards alone.
CARDS_OWN = {aten.mm.dtype: lambda a, b, kind: a.to(kind) @ b.to(kind)}


@dataclass
class Memory:
    """Bytes that live on the card now, and the most that did."""

    now: int = 0
    peak: int = 0
    known: set[int] = field(default_factory=set)

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


MEMORY = Memory()


class OnCard(torch.Tensor):
    """A tensor on the card; `own` is where it really is."""

    own: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(
            cls, own.size(), strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=CARD
        )
        made.own = own
        MEMORY.hold(own.untyped_storage())
        return made

    def __repr__(self) -> str:
        return f"OnCard({self.own})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnCard:
        return OnCard(self.own.clone())

    def tolist(self) -> Any:
        return self.own.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


def _made(func: Any) -> Any:
    """`func`, which makes a tensor out of nothing, for the card."""

    def make(*args: Any, **options: Any) -> OnCard:
        return OnCard(func(*args, **options | {"device": torch.device("cpu"), "pin_memory": False}))

    return make


def _copy_from(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _own(to).copy_(_own(source))
    return to


LIBRARY = torch.library.Library("aten", "IMPL")
for name in ("empty.memory_format", "empty_strided", "eye", "arange", "arange.start", "arange.start_step"):
    op, _, overload = name.partition(".")
    LIBRARY.impl(name, _made(getattr(getattr(aten, op), overload or "default")), "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


def _call(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    asked = kwargs.get("device")
    there = asked is not None and torch.device(asked).type == CARD.type
    if func is not aten.copy_.default and func is not aten._to_copy.default:
        _require_together(func, args, tensors)
    plain = {k: torch.device("cpu") if k == "device" and there else v for k, v in kwargs.items()}
    made = CARDS_OWN.get(func, func)(*tree_map(_own, args), **tree_map(_own, plain))
    if written := _written(func, args, kwargs):
        return written[0] if len(written) == 1 else tuple(written)
    return made if asked is not None and not there else tree_map(_on_card, made)


def _require_together(func: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
    strangers = [t for t in tensors if not isinstance(t, OnCard) and t.dim()]
    if func in INDEXED and isinstance(args[0], OnCard) and not any(t.is_floating_point() for t in strangers):
        return
    if strangers:
        raise RuntimeError(f"{func} of tensors on the card and elsewhere: {[tuple(t.shape) for t in strangers]}")


def _own(x: Any) -> Any:
    return x.own if isinstance(x, OnCard) else x


def _on_card(x: Any) -> Any:
    return OnCard(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnCard) else x


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a call wrote into and returns, as `add_` and `out=` do."""
    if not all(r.alias_info and r.alias_info.is_write for r in func._schema.returns):
        return []
    named = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    return [value for a, value in named if a.alias_info and a.alias_info.is_write]
