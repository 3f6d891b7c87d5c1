"""`Model`: any source, opened: configuration, tokenizer files, and every tensor by its HF name with a lazy `read()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from quantkit.arch.schema import Architecture, Placed
from quantkit.arch.tokenizer import Tokenizer, load_tokenizer
from quantkit.chat import ChatTemplate
from quantkit.codecs import Bytes, Rows, decode, decoded
from quantkit.errors import BadInput
from quantkit.files.gguf import GGUF
from quantkit.later import Tensor, torch
from quantkit.model.hub import Pulled


@dataclass(frozen=True)
class Ref:
    """One tensor of a model. `read()` gives it as float32 in HF's row order; `type` is how the source stores it.

    `stored()` gives the very bytes (rows, row_bytes) in HF's row order, of a GGUF where they need only be moved, of a
    folder where they are plain floats; a tensor of one dimension is one row.
    """

    placed: Placed
    type: str
    nbytes: int
    read: Callable[[], Tensor]
    stored: Callable[[], Bytes] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first, as in torch."""
        return self.placed.shape

    def rows(self) -> Rows:
        """The same, float32 in HF's row order, as rows that are read when they are asked for where that can be."""
        return decoded(self.type, torch.from_numpy(self.stored())) if self.stored else in_rows(self.read())

    def some(self, rows: Tensor) -> Tensor:
        """Some rows of a matrix, by their numbers: no others are read where that can be."""
        if not self.stored:
            return self.read()[rows]
        return decode(self.type, torch.from_numpy(self.stored()[rows.numpy()]), (len(rows), self.shape[-1]))


def in_rows(weight: Tensor) -> Rows:
    """A tensor in memory as rows; one of a single dimension is one row."""
    flat = weight.reshape(-1, weight.shape[-1])
    return lambda part: flat[part]


@dataclass(frozen=True)
class Model:
    """A model that can be read: configuration, texts of its tokenizer files, and every tensor by its HF name."""

    name: str
    path: Path
    format: str  # gguf, dense, gptq or awq
    arch: Architecture
    config: dict[str, Any]
    make_files: Callable[[], dict[str, str]]  # takes seconds for a GGUF of a large vocabulary
    tensors: dict[str, Ref]
    gguf: GGUF | None = None
    hub: Pulled | None = None  # where on the Hub it is from
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the user stated over the source, by HF key
    template: ChatTemplate | None = None  # the chat template that was given over the source's own

    @cached_property
    def files(self) -> dict[str, str]:
        """The texts of its tokenizer files, by name; of a GGUF, Unsupported for a tokenizer that HF cannot have."""
        return self.make_files()

    @property
    def chat_template(self) -> str | None:
        """Its text, for which a GGUF's tokenizer need not be made."""
        return self.gguf.get("tokenizer.chat_template") if self.gguf else self.tokenizer().chat_template

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        return sum(prod(t.shape) for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors as the source stores them."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files it is read from."""
        if self.gguf:
            return self.gguf.nbytes
        return sum(p.stat().st_size for p in self.path.iterdir() if p.is_file())

    @property
    def layers(self) -> int:
        """How many decoder blocks."""
        return self.config["num_hidden_layers"]

    @property
    def experts(self) -> int:
        """How many experts a block has; 0 for a dense model."""
        return 1 + max((-1 if r.placed.expert is None else r.placed.expert for r in self.tensors.values()), default=-1)

    def block(self, layer: int) -> dict[str, Ref]:
        """The tensors of one block by their names inside the block."""
        prefix = f"model.layers.{layer}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if t.placed.layer == layer}

    def outer(self) -> dict[str, Ref]:
        """The tensors outside the blocks, by their full names."""
        return {n: t for n, t in self.tensors.items() if t.placed.layer is None}

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return load_tokenizer(self.files)


def transformers_config(config: Mapping[str, Any], where: Path) -> Any:
    """The configuration as transformers completes it; BadInput where it refuses to."""
    from transformers import AutoConfig

    left_out = ("model_type", "quantization_config", "dtype", "torch_dtype")
    values = {k: v for k, v in config.items() if k not in left_out}
    try:
        return AutoConfig.for_model(config["model_type"], **values)
    except Exception as e:  # whatever its code for the family comes upon in values that make no sense
        raise refused(e, where) from e


def refused(e: Exception, where: Path) -> BadInput:
    """What transformers raised over a configuration, as our error."""
    reason = f"it knows no {e}" if isinstance(e, KeyError) else (str(e).splitlines() or [type(e).__name__])[-1].strip()
    return BadInput(f"transformers refuses this configuration ({reason})", where=where, hint="mend it or get it again")
