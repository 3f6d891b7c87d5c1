"""`CODECS`: every block type by ggml's name for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from quantkit.codecs import iquants, kquants, legacy, microscaling, ternary
from quantkit.codecs.codec import Codec
from quantkit.errors import Unsupported

_FAMILIES = (legacy, kquants, iquants, ternary, microscaling)

CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for family in _FAMILIES for codec in family.CODECS})


def lookup(name: str) -> Codec:
    """The codec of a tensor type, by ggml's name in capitals ("Q4_K", "F16")."""
    try:
        return CODECS[name]
    except KeyError:
        raise Unsupported(f"no codec for tensor type {name}", hint=f"known are {', '.join(CODECS)}") from None
