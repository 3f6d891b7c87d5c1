"""`Architecture`: one model family as rows of facts; names, layouts, shapes, statistics and folds are read off it.

A family file holds rows and nothing else. What differs between GGUF and Hugging Face is stated once: the two names of a
weight, the two names of a configuration key, and how the rows of a weight are laid out. This module is what can be
derived from such rows. It leaves out tokenizers (`tokenizer.py`) and reading files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from quantkit.errors import BadInput, Unsupported

Config = Mapping[str, Any]  # the contents of an HF config.json


@dataclass(frozen=True)
class Rope:
    """Row order of rotary heads: HF keeps each head as two halves, GGUF's `llama` interleaves the pair.

    Source: llama.cpp `conversion/llama.py`, `permute`. Works on weights (rows, width) and on biases (rows,).
    """

    heads: str  # the config key that counts the heads

    def to_gguf(self, w: Tensor, config: Config) -> Tensor:
        """Halves -> interleaved pairs."""
        return w.reshape(config[self.heads], 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)

    def to_hf(self, w: Tensor, config: Config) -> Tensor:
        """Interleaved pairs -> halves; the inverse of `to_gguf`."""
        return w.reshape(config[self.heads], -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


@dataclass(frozen=True)
class Weight:
    """One weight: its GGUF and HF stems (no `.weight`), its shape in `Architecture.dims`, and what it touches."""

    gguf: str
    hf: str
    shape: tuple[str, ...]
    reads: str | None = None  # the activation this weight consumes: one statistic per name
    writes: str | None = None  # the activation this weight scales: an AWQ fold target
    layout: Rope | None = None
    bias: str | None = None  # the config key that says there is a bias of shape[:1]
    absent: str | None = None  # the config key under which the weight is absent (tied embeddings)


@dataclass(frozen=True)
class Key:
    """One configuration value: GGUF key without the architecture prefix, HF key, and the value where GGUF is silent."""

    gguf: str
    hf: str
    default: Callable[[Config], Any] | None = None  # computed from the keys read before; None: the key is required


@dataclass(frozen=True)
class Architecture:
    """One family. `gguf` is `general.architecture`, `hf` the HF `model_type`, `hf_class` the HF class name."""

    gguf: str
    hf: str
    hf_class: str
    keys: tuple[Key, ...]
    outer: tuple[Weight, ...]  # embedding, final norm, head
    block: tuple[Weight, ...]
    dims: Callable[[Config], dict[str, int]]
    fixed: tuple[tuple[str, Any], ...] = ()  # HF config values that every member of the family has
    only: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # GGUF keys and the values this family file covers

    def weights(self, config: Config) -> Iterator[Placed]:
        """Every tensor a model of this configuration has: outer ones first, then block by block."""
        for w in self.outer:
            yield from self._placed(w, "", "", None, config)
        for i in range(config["num_hidden_layers"]):
            for w in self.block:
                yield from self._placed(w, f"blk.{i}.", f"model.layers.{i}.", i, config)

    def _placed(self, w: Weight, gguf: str, hf: str, layer: int | None, config: Config) -> Iterator[Placed]:
        if w.absent and config.get(w.absent):
            return
        dims = self.dims(config)
        shape = tuple(dims[d] for d in w.shape)
        yield Placed(f"{gguf}{w.gguf}.weight", f"{hf}{w.hf}.weight", shape, w, layer)
        if w.bias and config.get(w.bias):
            yield Placed(f"{gguf}{w.gguf}.bias", f"{hf}{w.hf}.bias", shape[:1], w, layer)

    def folds(self) -> list[tuple[Weight, tuple[Weight, ...]]]:
        """(producer, consumers) for each activation that a norm or a matrix scales: where AWQ may fold."""
        return [(p, tuple(c for c in self.block if c.reads == p.writes)) for p in self.block if p.writes]

    def config_from_gguf(self, get: Callable[[str], Any], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """GGUF keys and tensor shapes (rows first) -> HF config.json. `get(key)` gives a plain value or None."""
        for name, covered in self.only:
            if (value := get(f"{self.gguf}.{name}")) not in covered:
                raise Unsupported(
                    f"the value {printable(value)} is not supported",
                    where=f"{self.gguf}.{name}",
                    hint=f"known: {', '.join(str(v) for v in covered if v is not None)} or no such key",
                )
        embedding = self.outer[0].gguf + ".weight"
        if len(tensors.get(embedding, ())) != 2:
            raise BadInput("the file has no token embedding", where=embedding, hint="it may be a vocabulary-only file")
        config: dict[str, Any] = {
            "architectures": [self.hf_class],
            "model_type": self.hf,
            "vocab_size": tensors[embedding][0],
            **dict(self.fixed),
        }
        for w in (*self.outer, *self.block):
            if w.absent:
                config[w.absent] = f"{w.gguf}.weight" not in tensors
            if w.bias:
                config[w.bias] = config.get(w.bias, False) or f"blk.0.{w.gguf}.bias" in tensors
        for key in self.keys:
            config[key.hf] = self._value(key, get(f"{self.gguf}.{key.gguf}"), config)
        return config

    def complete(self, config: Config, where: str) -> dict[str, Any]:
        """An HF config.json with the values it leaves to its class filled in, and rotary keys in their flat form.

        transformers 5 nests them as `rope_parameters`; it reads `rope_theta` and `rope_scaling` as 4.x writes them.
        """
        full = dict(self.fixed) | {"tie_word_embeddings": False, "attention_bias": False} | dict(config)
        rope = full.pop("rope_parameters", None)
        if isinstance(rope, dict):
            rope = dict(rope)
            full["rope_theta"] = rope.pop("rope_theta", 10000.0)
            if rope.get("rope_type", "default") != "default":
                full["rope_scaling"] = rope
        for key in self.keys:
            if full.get(key.hf) is None:
                if key.default is None:
                    raise BadInput("config.json lacks this required key", where=f"{where}: {key.hf}")
                full[key.hf] = key.default(full)
        return full

    def _value(self, key: Key, value: Any, config: Config) -> Any:
        name = f"{self.gguf}.{key.gguf}"
        if value is None and key.default is None:
            raise BadInput("the file lacks this required key", where=name, hint="ask its publisher for a complete file")
        if value is None and key.default is not None:
            return key.default(config)
        if isinstance(value, bool | str) or not isinstance(value, int | float) or value <= 0:
            raise BadInput(f"{printable(value)} is not a positive number", where=name, hint="the file is damaged")
        return shortest(value) if isinstance(value, float) else value


@dataclass(frozen=True)
class Placed:
    """One tensor of one model: both full names, its shape, the row it comes from, and its block (None outside)."""

    gguf: str
    hf: str
    shape: tuple[int, ...]
    weight: Weight
    layer: int | None


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF's 9.999999747378752e-06 is the config's 1e-05."""
    return float(str(np.float32(value)))


def find(known: Mapping[str, Architecture], name: str, where: str) -> Architecture:
    """The family called `name`, or Unsupported with the list of those that are known."""
    if name not in known:
        raise Unsupported(
            f"architecture '{printable(name)}' is not supported", where=where, hint=f"known: {', '.join(sorted(known))}"
        )
    return known[name]


def printable(name: object) -> str:
    """A name from a file, made safe to print on one line."""
    return re.sub(r"[^\w.+/ -]", "?", str(name))[:64]
