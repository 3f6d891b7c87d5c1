"""Rules for single layers, from a recipe's `layers`: which type or how many bits a tensor gets, by its name.

A pattern is held against the whole name that a tensor has in the output, with `.weight` and without; `*` stands for
any characters. The first rule that matches counts; one that matches no tensor is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from quantkit.errors import UsageError


@dataclass(frozen=True)
class LayerRule:
    """What a recipe says of the layers whose names match `pattern`."""

    pattern: str
    type: str = ""  # of GGUF targets
    bits: int = 0  # of GPTQ and compressed-tensors targets

    def matches(self, name: str) -> bool:
        """Whether `name`, or its stem without `.weight`, is one that the pattern means."""
        return fnmatchcase(name, self.pattern) or fnmatchcase(name.removesuffix(".weight"), self.pattern)


def first_rule(rules: Iterable[LayerRule], name: str) -> LayerRule | None:
    """The first rule that matches the tensor."""
    return next((rule for rule in rules if rule.matches(name)), None)


def require_matches(rules: Iterable[LayerRule], names: Iterable[str]) -> None:
    """UsageError for a rule that matches none of `names`, with the nearest that there are."""
    names = list(names)
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            raise _unmatched(rule.pattern, names, "layers")


def require_found(patterns: Iterable[re.Pattern[str]], names: Sequence[str]) -> None:
    """The same for a regular expression that is found in none of them."""
    for pattern in patterns:
        if not any(pattern.search(name) for name in names):
            raise _unmatched(pattern.pattern, names, "--tensor-type")


def _unmatched(pattern: str, names: Sequence[str], where: str) -> UsageError:
    stems = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in names))
    near = get_close_matches(pattern, stems + [stem.rpartition(".")[2] for stem in stems], 3, 0.4)
    hint = f"near it: {', '.join(dict.fromkeys(near))}" if near else f"names are such as {names[0]}"
    return UsageError(f"the pattern {pattern!r} matches no tensor", where=where, hint=hint)
