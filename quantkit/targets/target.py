"""What a finished product is: `Family` (a kind of target), `Output` (one planned product), and what travels between.

A family is one file in this folder: the names it answers to, and a function that plans an `Output` for a model. An
output knows every tensor and byte before any weight is read, and how to solve the pieces it will be handed one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.codecs import Numbers, Rows, in_bytes, native
from quantkit.errors import BadInput
from quantkit.files import gguf_set, gguf_writer, safetensors
from quantkit.later import Device, Tensor, torch
from quantkit.model import Model, Ref, in_rows
from quantkit.solvers.learned import Factors, Ranged
from quantkit.stats import Stats
from quantkit.targets.layers import LayerRule

LEARNED = "learned"  # the solver (`targets.learned`)

# Matrices of a block by HF name -> factors of their ranges, and the share of the block's error that they leave.
Learn = Callable[[Mapping[str, Ranged]], tuple[dict[str, Factors], float]]


@dataclass(frozen=True)
class Calibration:
    """The calibration that outputs are planned for: the text's name, and rows x seqlen tokens."""

    text: str
    rows: int
    seqlen: int


@dataclass(frozen=True)
class Choices:
    """What is asked of targets beside their names, as `llama-quantize` takes it; the defaults ask for nothing.

    All but `bits`, `inputs` and `solver` are for GGUF targets; see `targets.gguf` and `targets.mixtures`.
    """

    output_type: str | None = None  # of output.weight, and of token_embd.weight where it is the output as well
    token_embedding_type: str | None = None
    tensor_types: tuple[tuple[re.Pattern[str], str], ...] = ()  # the first that is found in a tensor's name counts
    pure: bool = False  # the mixture's base type for every tensor
    leave_output: bool = False  # output.weight stays as it is
    split_bytes: int | None = None  # the largest file of a set
    imatrix: Path | None = None  # in place of calibrating
    layers: tuple[LayerRule, ...] = ()  # types of single layers; go before all else
    bits: tuple[LayerRule, ...] = ()  # bits of single layers, for GPTQ and compressed-tensors
    solver: str | None = None  # gptq: error compensation for GGUF types and AWQ; awq+gptq, learned: more than that
    inputs: str = "quantized"  # what solvers are calibrated on: quantized (the prefix) or source

    def behind(self, model: Model) -> bool:
        """Whether solvers see the activations behind what is quantized already.

        Not in a mixture of experts: there a token may reach another expert than in the source, and has no counterpart.
        """
        return self.inputs == "quantized" and not model.experts


@dataclass(frozen=True)
class Row:
    """One tensor of an output: its name there, its HF name in the source, what it was, becomes, and by which solver."""

    name: str
    source: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    solver: str
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """What a solver has at hand: one block, or one tensor outside, by HF name.

    Where the block was run over calibration rows, `weights` holds it all, float32 in HF layout on `device`, and `stats`
    the statistics of its activations, by the names of the architecture table: the source's, or for an output that asks
    for them (`Output.behind`) those behind all that it has solved when it looks them up. Else both are empty, and a
    tensor is read when a solver comes to it.
    """

    model: Model
    refs: Mapping[str, Ref]
    weights: Mapping[str, Tensor]
    stats: Mapping[str, Stats]
    device: Device = "cpu"
    source: Mapping[str, Stats] = field(default_factory=dict)  # the source's beside others, for `Output.scaled`
    learn: Learn | None = None  # where the block can be run with what is solved of it

    def weight(self, name: str) -> Tensor:
        """A whole tensor, float32 in HF layout on the device; BadInput where a value is not finite."""
        return self.weights[name] if name in self.weights else finite(name, self.refs[name].read().to(self.device))

    def rows(self, name: str) -> Rows:
        """The same as rows, each slab read when it is asked for where it can be."""
        if name in self.weights:
            return in_rows(self.weights[name])
        rows = self.refs[name].rows()
        return lambda part: finite(name, rows(part).to(self.device))

    def numbers(self, name: str) -> Numbers | None:
        """The same for libggml, where that does the work and the source's bytes are at hand; else None."""
        ref = self.refs[name]
        if name in self.weights or ref.stored is None or not native(self.device):
            return None
        return in_bytes(ref.type, ref.stored())


@dataclass(frozen=True)
class Solved:
    """One tensor done: the parts to write, the weight that a reader must get back, and the error made.

    `value` is None where reading back the very bytes of `parts` is all there is to check (`Output.sealed`).

    `loss` is the share of the output's energy that the change of the weight costs on the calibration activations,
    tr(delta G delta^T) / tr(W G W^T); for a tensor that reads no activation, of the weight's own energy. Behind a
    quantized prefix, W is what comes nearest to the source's outputs there.

    `unfolded` is the same weight in a block without column scales, where some were moved from one weight to another.
    `ranged` is it as learning moves it (`targets.learned`); a `draft` is not written: the tensor comes once more.
    """

    source: str
    parts: dict[str, Any]  # tensors, or arrays of their bytes
    value: Tensor | None
    loss: float
    log: dict[str, Any] = field(default_factory=dict)  # how a solver came to it, for the report
    unfolded: Tensor | None = None
    ranged: Callable[[], Ranged] | None = None
    draft: bool = False


@dataclass(frozen=True)
class Output:
    """One planned product: a folder in HF format (`texts` are its small files), a GGUF, or a folder of its shards."""

    target: str
    format: str
    path: str  # what a reader is given, relative to the output folder
    note: str  # what was chosen, in words
    rows: tuple[Row, ...]
    layout: safetensors.Layout | gguf_writer.Layout | gguf_set.SetLayout
    solve: Callable[[Piece], Iterator[Solved]]
    calibrated: bool
    texts: dict[str, str] = field(default_factory=dict)
    outer: bool = False  # whether solvers need statistics of embedding and output matrix (`sensitivity`)
    sealed: bool = False  # its bytes are its meaning, and are what verification compares
    behind: bool = False  # calibrated behind its own quantized blocks, and not on the source's activations
    reordered: bool = False  # solved in another order of the columns, under statistics in that order
    scaled: bool = False  # looks for column scales under the source's statistics, wherever else it is calibrated

    @property
    def nbytes(self) -> int:
        """Bytes of everything that will be written."""
        return self.layout.nbytes + sum(len(t.encode()) for t in self.texts.values())

    @property
    def weighted(self) -> bool:
        """Whether it is encoded under the importance matrix of the source's activations, which goes into a file."""
        return self.format == "gguf" and self.calibrated and not self.behind

    @property
    def lasting(self) -> bool:
        """Whether a block takes so long that it is kept until all are done (`quantkit.journal`)."""
        return any(row.solver == LEARNED for row in self.rows)

    @property
    def root(self) -> str:
        """The file or folder that holds all of the product, relative to the output folder."""
        return self.path.split("/")[0]

    @property
    def is_folder(self) -> bool:
        """Whether the product is a folder and not a file."""
        return not isinstance(self.layout, gguf_writer.Layout)

    def writer(self, path: Path) -> safetensors.FolderWriter | gguf_writer.GGUFWriter | gguf_set.SetWriter:
        """Open the product for writing at `path`; a folder's small files are written at once."""
        if isinstance(self.layout, gguf_writer.Layout):
            return gguf_writer.GGUFWriter(path, self.layout)
        path.mkdir()
        if isinstance(self.layout, gguf_set.SetLayout):
            return gguf_set.SetWriter(path, self.layout)
        for name, text in self.texts.items():
            (path / name).write_text(text, encoding="utf-8")
        return safetensors.FolderWriter(path, self.layout)


@dataclass(frozen=True)
class Family:
    """A kind of target: how its names look (`pattern`, shown to users as `usage`), and how to plan one."""

    usage: str
    pattern: re.Pattern[str]
    plan: Callable[[re.Match[str], Model, Calibration | None, Choices], Output]


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Matrices that read the same activation, one above the other; a single one is not copied."""
    return torch.cat(tuple(weights)) if len(weights) > 1 else weights[0]


def finite(name: str, weight: Tensor) -> Tensor:
    """`weight` itself; BadInput where a value in it is not finite."""
    if not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):  # no temporary of the weight's size
        raise BadInput("holds values that are not finite", where=name, hint="the source is damaged; get it again")
    return weight
