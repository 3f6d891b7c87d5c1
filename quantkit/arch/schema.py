"""`Architecture`: one model family as rows of facts; names, layouts, shapes, statistics and folds are read off it.

A family file holds rows and nothing else. What differs between GGUF and Hugging Face is stated once: the two names of a
weight, the two names of a configuration key, and how the rows of a weight are laid out. This module is what can be
derived from such rows. It leaves out tokenizers (`tokenizer.py`), scaled rotary embeddings (`rope.py`) and files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from quantkit.arch import rope
from quantkit.errors import BadInput, FormatError, Unsupported
from quantkit.later import Tensor, torch

Config = Mapping[str, Any]  # the contents of an HF config.json
Get = Callable[[str], Any]  # a GGUF key -> its plain value, or None
A = TypeVar("A", bound=Any)  # a tensor or an array


@dataclass(frozen=True)
class Rope:
    """Row order of rotary heads: HF keeps each head as two halves, GGUF's `llama` interleaves the pair.

    Source: llama.cpp `conversion/llama.py`, `permute`. Works on weights (rows, width), on their bytes, on biases
    (rows,); on tensors and on arrays.
    """

    heads: str  # the config key that counts the heads

    def to_gguf(self, w: A, config: Config) -> A:
        """Halves -> interleaved pairs."""
        return w.reshape(config[self.heads], 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    def to_hf(self, w: A, config: Config) -> A:
        """Interleaved pairs -> halves; the inverse of `to_gguf`."""
        return w.reshape(config[self.heads], -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@dataclass(frozen=True)
class PlusOne:
    """A norm whose HF module multiplies by 1 + w; a GGUF stores the sum (llama.cpp `conversion/gemma.py`)."""

    def to_gguf(self, w: A, config: Config) -> A:
        """w -> 1 + w, what the activation is multiplied by."""
        return w + 1

    def to_hf(self, w: A, config: Config) -> A:
        """1 + w -> w; the inverse of `to_gguf`."""
        return w - 1


@dataclass(frozen=True)
class Weight:
    """One weight: its GGUF and HF stems (no `.weight`), its shape in `Architecture.dims`, and what it touches."""

    gguf: str
    hf: str
    shape: tuple[str, ...]
    reads: str | None = None  # the activation this weight consumes: one statistic per name
    writes: str | None = None  # the activation this weight scales: an AWQ fold target
    layout: Rope | PlusOne | None = None
    bias: str | bool = False  # whether there is a bias of shape[:1], or the config key that says so
    absent: str | None = None  # the config key under which the weight is absent (tied embeddings)
    experts: str | None = None  # the config key that counts the experts: `hf` has {} for each, a GGUF stacks them
    kept: bool = False  # solvers leave it as it is: a router's few weights say which experts are asked

    def divided(self, w: Tensor, scale: Tensor, config: Config) -> Tensor:
        """The weight or bias that writes its activation divided by `scale`, one number per row."""
        column = scale.view(-1, *[1] * (w.dim() - 1))
        if isinstance(self.layout, PlusOne):
            return self.layout.to_hf(self.layout.to_gguf(w, config) / column, config)
        return w / column


@dataclass(frozen=True)
class Key:
    """One configuration value: GGUF key without the architecture prefix, HF key, and the value where GGUF is silent.

    Of two rows for one HF key, the second is a value that llama.cpp holds apart and HF does not: it must be the same.
    """

    gguf: str
    hf: str
    default: Callable[[Config], Any] | None = None  # computed from the keys read before; None: the key is required
    number: type[int] | type[float] = int
    off: bool = False  # 0 says the same as no such key


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
    derived: tuple[tuple[str, Callable[[Config], Any]], ...] = ()  # HF values that llama.cpp computes from the others
    only: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # GGUF keys and the values this family file covers
    scalings: tuple[str, ...] = ()  # the kinds of scaled rotary embeddings, of those in `rope.py`
    tell: str | None = None  # the GGUF key that tells it from another family of the same GGUF name
    modules: tuple[tuple[str, tuple[str, ...]], ...] = ()  # parameters of transformers' block, and the tensors in each

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
        if w.experts:
            for e in range(config[w.experts]):
                yield Placed(f"{gguf}{w.gguf}.weight", f"{hf}{w.hf.format(e)}.weight", shape, w, layer, e)
            return
        yield Placed(f"{gguf}{w.gguf}.weight", f"{hf}{w.hf}.weight", shape, w, layer)
        if w.bias is True or (w.bias and config.get(w.bias)):
            yield Placed(f"{gguf}{w.gguf}.bias", f"{hf}{w.hf}.bias", shape[:1], w, layer)

    def computed(self, config: Config) -> dict[str, rope.Array]:
        """The tensors that only a GGUF has, computed from the configuration."""
        freqs = rope.llama3_freqs(config)
        return {} if freqs is None else {rope.FREQS: freqs}

    def parameters(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors, by their names in it, as the parameters of transformers' module: experts in stacks."""
        left, made = dict(block), {}
        for name, parts in self.modules:
            if "{}" in parts[0]:
                stacks = []
                for part in parts:
                    names = [n for e in range(len(block)) if (n := part.format(e)) in left]
                    stacks.append(torch.stack([left.pop(n) for n in names]))
                made[name] = torch.cat(stacks, 1)
            else:
                made[name] = left.pop(parts[0])
        return left | made

    def place_of(self, w: Weight) -> str:
        """The path of a weight's module in transformers' block, or of the parameter that holds it for all experts."""
        held = (name for name, parts in self.modules if f"{w.hf}.weight" in parts)
        return next(held, w.hf).removesuffix(".weight")

    def folds(self) -> list[tuple[Weight, tuple[Weight, ...]]]:
        """(producer, consumers) for each activation that a norm or a matrix scales: where AWQ may fold."""
        return [(p, tuple(c for c in self.block if c.reads == p.writes)) for p in self.block if p.writes]

    def residual(self) -> dict[str, str | None]:
        """The matrices whose outcome goes into the residual stream as it is, and what reads the stream next: a norm.

        By path in the block; None where that is the next block. Experts, whose outcomes are mixed, are not among them,
        nor is what has a norm of its own behind it.
        """
        found = {}
        for i, w in enumerate(self.block):
            if len(w.shape) == 2 and w.shape[0] == "hidden" and w.reads and not w.experts:
                norm = next((n for n in self.block[i + 1 :] if n.shape == ("hidden",)), None)
                if norm is None or norm.writes:
                    found[self.place_of(w)] = None if norm is None else norm.hf
        return found

    def covers(self, get: Get) -> bool:
        """Whether this is the family of a GGUF with these keys, of those with the same GGUF name."""
        told = self.tell is None or get(f"{self.gguf}.{self.tell}") not in (None, 0)
        return told and all(get(f"{self.gguf}.{name}") in covered for name, covered in self.only)

    def config_from_gguf(
        self, get: Get, tensors: Mapping[str, tuple[int, ...]], read: Callable[[str], rope.Array]
    ) -> dict[str, Any]:
        """GGUF keys, tensor shapes (rows first) and a way to read a tensor -> HF config.json."""
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
            if isinstance(w.bias, str):
                config[w.bias] = config.get(w.bias, False) or f"blk.0.{w.gguf}.bias" in tensors
        for key in self.keys:
            value = self._value(key, get(f"{self.gguf}.{key.gguf}"), config)
            if config.setdefault(key.hf, value) != value:
                raise Unsupported(
                    f"{printable(value)} beside a {key.hf} of {config[key.hf]} is not supported",
                    where=f"{self.gguf}.{key.gguf}",
                )
        require_blocks(config, len(tensors), f"{self.gguf}.block_count")
        freqs = read(rope.FREQS) if rope.FREQS in tensors else None

        def own(name: str) -> Any:
            value = get(f"{self.gguf}.{name}")
            return shortest(value) if isinstance(value, float) else value

        if scaling := rope.scaling_from_gguf(own, freqs, config, self.scalings):
            config["rope_scaling"] = scaling
        return config | {name: value(config) for name, value in self.derived}

    def config_to_gguf(self, config: Config) -> dict[str, Any]:
        """HF config.json -> GGUF keys, without the file's general ones; the inverse of `config_from_gguf`.

        Raises Unsupported for a value that llama.cpp has no key for and would not compute so.
        """
        for name, value in self.derived:
            if name in config and config[name] != value(config):
                raise Unsupported(
                    f"a GGUF of {self.gguf} cannot say {printable(config[name])}",
                    where=name,
                    hint="choose an HF target",
                )
        keys = {
            key.gguf: key.number(config[key.hf]) for key in self.keys if config.get(key.hf) is not None
        } | rope.scaling_to_gguf(config, self.scalings)
        return {f"{self.gguf}.{name}": value for name, value in keys.items()}

    def complete(self, config: Config, defaults: Config, where: str) -> dict[str, Any]:
        """An HF config.json with what it leaves to its class filled in, and rotary keys in their flat form.

        `defaults` is the same configuration as transformers completes it. transformers 5 nests rotary keys as
        `rope_parameters`; it reads `rope_theta` and `rope_scaling` as 4.x writes them. Raises Unsupported for a value
        that the family's rows do not cover.
        """
        biases = [w.bias for w in self.block if isinstance(w.bias, str)]
        absent = [w.absent for w in self.outer if w.absent]
        named = [*(k.hf for k in self.keys), *dict(self.fixed), *dict(self.derived), *biases, *absent]
        full = {name: defaults[name] for name in named if defaults.get(name) is not None}
        full |= {k: v for k, v in config.items() if v is not None or k not in full}
        full.pop("rope_parameters", None)
        full |= rope.flat(defaults.get("rope_parameters") or {})
        for key in self.keys:
            if full.get(key.hf) is None:
                if key.default is None:
                    raise BadInput("config.json lacks this required key", where=f"{where}: {key.hf}")
                full[key.hf] = key.default(full)
            elif not _sound(full[key.hf], key.number) and not (key.off and full[key.hf] == 0):
                what = f"{printable(full[key.hf])} is not a positive number"
                raise BadInput(what, where=f"{where}: {key.hf}", hint="mend that value")
        for name, value in self.fixed:
            if full.setdefault(name, value) != value:
                raise Unsupported(
                    f"the value {printable(full[name])} is not supported",
                    where=f"{where}: {name}",
                    hint=f"known: {value}",
                )
        return full

    def _value(self, key: Key, value: Any, config: Config) -> Any:
        name = f"{self.gguf}.{key.gguf}"
        if key.off and value == 0:
            value = None
        if value is None and key.default is None:
            raise BadInput("the file lacks this required key", where=name, hint="ask its publisher for a complete file")
        if value is None and key.default is not None:
            return key.default(config)
        if not _sound(value, float):
            raise BadInput(f"{printable(value)} is not a positive number", where=name, hint="the file is damaged")
        if key.number is int and value != int(value):
            raise FormatError(f"{printable(value)} is not a whole number", where=name, hint="the file is damaged")
        return shortest(value) if key.number is float else int(value)


@dataclass(frozen=True)
class Placed:
    """One tensor of one model: both full names, its shape, the row it comes from, and its block (None outside)."""

    gguf: str
    hf: str
    shape: tuple[int, ...]
    weight: Weight
    layer: int | None
    expert: int | None = None  # its place in a GGUF's stack of experts

    @property
    def reads(self) -> str | None:
        """The name of the statistics of what it is fed: an expert has its own, of the tokens that it is asked for."""
        name = self.weight.reads if len(self.shape) > 1 else None
        return name if name is None or self.expert is None else f"{name}.{self.expert}"


def require_blocks(config: Config, tensors: int, where: str) -> None:
    """FormatError for more blocks than there are tensors, before anything is made for each of them."""
    count = config.get("num_hidden_layers")
    if isinstance(count, int) and count > tensors:
        what = f"{printable(count)} blocks in a model of {tensors} tensors"
        raise FormatError(what, where=where, hint="the file is damaged")


def _sound(value: object, number: type[int] | type[float]) -> bool:
    """Whether a value is a positive number that is not infinite, and whole where it must be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf and (number is float or value == int(value))


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
