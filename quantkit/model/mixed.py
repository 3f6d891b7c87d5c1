"""Packed folders whose matrices do not all have the same settings: which ones a matrix has, by its name.

GPTQ's `dynamic` (GPTQModel `quantization/config.py`, vLLM `gptq_utils.py`) has regexes, after `+:` or nothing, and what
they set anew; the first that a module's name begins with counts. compressed-tensors has a group of settings for each
list of targets; a name goes before a regex (`re:`), and that before a class, of which there is one here, Linear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def gptq_settings(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The settings of a module of a GPTQ folder."""
    for pattern, changes in (quantization.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
            return {**quantization, **changes}
    return quantization


def dynamic(bits_of: Mapping[str, int], bits: int) -> dict[str, dict[str, int]]:
    """GPTQ's `dynamic` for modules of which some have other than `bits` bits; the inverse of `gptq_settings`."""
    return {f"+:{regex}": {"bits": own} for own, regexes in _exceptions(bits_of, bits).items() for regex in regexes}


def compressed_settings(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What a compressed-tensors folder says of the weights of a module; empty where it says nothing."""
    found: dict[int, Mapping[str, Any]] = {}
    for group in (quantization.get("config_groups") or {}).values():
        for target in group.get("targets") or ():
            regex = target.startswith("re:") and re.match(target.removeprefix("re:"), module)
            if target == module or regex or target == "Linear":
                found.setdefault(0 if target == module else 1 if regex else 2, group.get("weights") or {})
    return found[min(found)] if found else {}


def config_groups(weights: Mapping[str, Any], bits_of: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """compressed-tensors' groups for modules of which some have other bits than `weights` says; the inverse."""
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(weights)}}
    for i, (own, regexes) in enumerate(_exceptions(bits_of, weights["num_bits"]).items(), 1):
        targets = [f"re:{regex}" for regex in regexes]
        groups[f"group_{i}"] = {"targets": targets, "weights": {**weights, "num_bits": own}}
    return groups


def _exceptions(bits_of: Mapping[str, int], bits: int) -> dict[int, Sequence[str]]:
    """Regexes of the modules that have other than `bits` bits, by the bits they have: one for each kind of module."""
    layers: dict[tuple[int, str, str], list[str]] = {}
    for module, own in bits_of.items():
        if own != bits:
            before, layer, after = re.split(r"\.(\d+)\.", module, maxsplit=1)
            layers.setdefault((own, before, after), []).append(layer)
    found: dict[int, list[str]] = {}
    for (own, before, after), numbers in layers.items():
        found.setdefault(own, []).append(rf"^{re.escape(before)}\.(?:{'|'.join(numbers)})\.{re.escape(after)}$")
    return dict(sorted(found.items()))
