"""Model families. Adding one is adding a file with an `ARCHITECTURE` to this folder; there is no list to edit."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from quantkit.arch.schema import Architecture, Get, find


@cache
def _families() -> tuple[Architecture, ...]:
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return tuple(m.ARCHITECTURE for m in modules if hasattr(m, "ARCHITECTURE"))


def by_gguf(name: str, get: Get, where: str) -> Architecture:
    """The family whose `general.architecture` is `name`; where several share it, a key of the file tells them apart."""
    plain = find({a.gguf: a for a in _families() if a.tell is None}, name, where)
    told = [a for a in _families() if a.gguf == name and a.tell is not None and a.covers(get)]
    return told[0] if told else plain


def sharing(name: str) -> tuple[Architecture, ...]:
    """All families whose `general.architecture` is `name`."""
    return tuple(a for a in _families() if a.gguf == name)


def by_hf(model_type: str, where: str) -> Architecture:
    """The family whose HF `model_type` is `model_type`."""
    return find({a.hf: a for a in _families()}, model_type, where)


__all__ = ["Architecture", "by_gguf", "by_hf", "sharing"]
