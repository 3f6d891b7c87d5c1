"""Facts about a model that its user states: `KEY=VALUE`, typed by the rows of its family.

Old converters lost some (a rope base, a sliding window, the pre-tokenizer), and nothing here is guessed in their place.
A fact has the name it has in config.json, and says which keys of a GGUF hold it, so it can be laid over either source.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from quantkit.arch.rope import FIELDS
from quantkit.arch.schema import Architecture
from quantkit.arch.tokenizer_gguf import PREFIX
from quantkit.errors import UsageError

OPTION = "--override"


@dataclass(frozen=True)
class Fact:
    """The type of a value, the GGUF keys that hold it, and whether it may be 0."""

    type: type
    gguf: tuple[str, ...]
    zero: bool = False


# What a folder keeps in its tokenizer's own files, a GGUF keeps in keys.
TOKENIZER = {
    "bos_token_id": Fact(int, (PREFIX + "bos_token_id",), zero=True),
    "eos_token_id": Fact(int, (PREFIX + "eos_token_id",), zero=True),
    "pad_token_id": Fact(int, (PREFIX + "padding_token_id",), zero=True),
    "unk_token_id": Fact(int, (PREFIX + "unknown_token_id",), zero=True),
    "add_bos_token": Fact(bool, (PREFIX + "add_bos_token",)),
    "add_eos_token": Fact(bool, (PREFIX + "add_eos_token",)),
    "add_space_prefix": Fact(bool, (PREFIX + "add_space_prefix",)),
    "pre_tokenizer": Fact(str, (PREFIX + "pre",)),
}


def facts_of(families: Iterable[Architecture]) -> dict[str, Fact]:
    """Every configuration value of these families by its HF key; parts of `rope_scaling` behind a dot."""
    found: dict[str, Fact] = {}
    for arch in families:
        for key in arch.keys:
            same = found.get(key.hf, Fact(key.number, (), key.off))
            found[key.hf] = Fact(key.number, tuple(dict.fromkeys((*same.gguf, f"{arch.gguf}.{key.gguf}"))), key.off)
        for hf, (gguf, number) in FIELDS.items() if arch.scalings else ():
            found[f"rope_scaling.{hf}"] = Fact(number, (f"{arch.gguf}.{gguf}",))
    return found


def stated(texts: Iterable[str], known: Mapping[str, Fact]) -> dict[str, Any]:
    """`KEY=VALUE` texts as typed values by key; UsageError for an unknown key, with those of similar names."""
    values: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"{text!r} is not KEY=VALUE, such as rope_theta=1000000", where=OPTION)
        if key not in known:
            close = get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
            raise UsageError(f"no fact {key!r} of this model", where=OPTION, hint=f"known: {', '.join(close)}")
        values[key] = _typed(key, value, known[key])
    return values


def _typed(key: str, text: str, fact: Fact) -> Any:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    readings = {"true": True, "false": False}
    try:
        value = readings[text.lower()] if fact.type is bool else fact.type(text)
    except (KeyError, ValueError):
        raise UsageError(f"{key} is {words[fact.type]}, not {text!r}", where=OPTION) from None
    last = {int: 2**32 - 1, float: sys.float_info.max}.get(fact.type)
    if value == "" or (last and not (0 < value <= last or (value == 0 and fact.zero))):
        raise UsageError(f"{text!r} is out of range for {key}", where=OPTION)
    return value
