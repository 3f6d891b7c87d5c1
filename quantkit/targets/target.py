"""What a finished product is: `Family` (a kind of target), `Output` (one planned product), and what travels between.

A family is one file in this folder: the names it answers to, and a function that plans an `Output` for a model. An
output knows every tensor and byte before any weight is read, and how to solve the pieces it will be handed one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from quantkit.codecs import Numbers, Rows, in_bytes, native, recode, share_out, slabs
from quantkit.errors import BadInput, UsageError
from quantkit.files import gguf_set, gguf_writer, safetensors
from quantkit.later import Device, Tensor, torch
from quantkit.model import Model, Ref, in_rows
from quantkit.solvers.learned import Factors, Ranged
from quantkit.stats import Stats, error, told
from quantkit.targets.layers import LayerRule

LEARNED = "learned"  # the solver (`targets.learned`)
SCARCE = 0.005  # of the calibration tokens: a Gram matrix of fewer says little of an expert

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
    inputs: str = "quantized"  # what solvers of packed folders are calibrated on: quantized (the prefix) or source


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
    scaled: bool = False  # looks for column scales under the source's statistics, wherever else it is calibrated

    @property
    def nbytes(self) -> int:
        """Bytes of everything that will be written."""
        return self.layout.nbytes + sum(len(t.encode()) for t in self.texts.values())

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


def weight_loss(weight: Tensor, value: Tensor, *stats: Stats) -> float:
    """The relative error of `value` for `weight`; see `Solved`. 0 for a weight of zeros kept as zeros.

    A stack of experts (experts, rows, width) has statistics for each. It is that of the rows that are `told` of.
    """
    shape = (len(stats), -1, weight.shape[-1])
    some = told(weight.numel() // weight.shape[-1] // len(stats))
    parts = list(zip(weight.reshape(shape)[:, some], value.reshape(shape)[:, some], stats, strict=True))
    made = torch.stack([error(v - w, s.gram) for w, v, s in parts]).sum()
    full = torch.stack([error(w, s.gram) for w, _, s in parts]).sum()
    return (made / full.clamp_min(1e-30)).clamp_min(0).item()


def finite(name: str, weight: Tensor) -> Tensor:
    """`weight` itself; BadInput where a value in it is not finite."""
    if not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):  # no temporary of the weight's size
        raise BadInput("holds values that are not finite", where=name, hint="the source is damaged; get it again")
    return weight


def recoded(
    rows: Rows,
    parts: Sequence[slice],
    encode: Callable[[Tensor, slice], Tensor],
    decode: Callable[[Tensor], Tensor],
    out: Tensor,
) -> float:
    """Fill `out`, whose first dimension counts rows, with what `encode(rows(part), part)` makes of every part.

    Returns the relative error of that, as `decode` reads it in fresh float32.
    """

    def one(part: slice) -> tuple[float, float]:
        before = rows(part)
        made = encode(before, part)
        out[part] = made
        plain = before.flatten()
        delta = decode(made).flatten().sub_(plain)
        return torch.dot(delta, delta).item(), torch.dot(plain, plain).item()

    made, full = (sum(column) for column in zip(*share_out(one, parts, out.device), strict=True))
    return made / max(full, 1e-30)


def linear(model: Model) -> dict[str, Ref]:
    """The weights that solvers quantize: the matrices of the blocks that read an activation, by HF name."""
    return {n: r for n, r in model.tensors.items() if r.placed.reads and not r.placed.weight.kept}


def readers_of(piece: Piece) -> dict[str, list[str]]:
    """The matrices of a piece by the activation they read, as HF names."""
    groups: dict[str, list[str]] = {}
    for name, ref in piece.refs.items():
        if ref.placed.reads and not ref.placed.weight.kept:
            groups.setdefault(ref.placed.reads, []).append(name)
    return groups


def scarce(piece: Piece, activation: str) -> str:
    """Why matrices that read an activation are rounded and no more: too few tokens asked for their expert; or ""."""
    router = next((w.reads for w in piece.model.arch.block if w.kept), None)
    if router is None or activation not in {r.placed.reads for r in piece.refs.values() if r.placed.expert is not None}:
        return ""
    rows, tokens = piece.stats[activation].rows, piece.stats[router].rows
    return f"{rows} of {tokens} calibration tokens" if rows < SCARCE * tokens else ""


def fitting_group(model: Model, asked: int | None, choices: Sequence[int] = (128, 64, 32)) -> tuple[int, str]:
    """The group size and the words that explain it; UsageError naming the first tensor that `asked` does not divide."""
    widths = sorted({r.shape[1] for r in linear(model).values()})
    fits = [g for g in choices if all(w % g == 0 for w in widths)]
    if asked is None:
        if not fits:
            raise UsageError(
                f"no group size of {', '.join(map(str, choices))} divides the input widths {widths}",
                hint="choose a GGUF target, whose types fall back tensor by tensor",
            )
        return fits[0], f"group {fits[0]}: the largest of {', '.join(map(str, choices))} that divides {widths}"
    for name, ref in linear(model).items():
        if ref.shape[1] % asked:
            hint = f"use group size {fits[0]}" if fits else "no usual group size fits this model"
            raise UsageError(f"its input width {ref.shape[1]} is no multiple of {asked}", where=name, hint=hint)
    return asked, f"group {asked} as asked"


def require_multiples(model: Model, rows: int, columns: int, reader: str) -> None:
    """Hold every quantized matrix against a reader's shape limits before anything is computed."""
    for name, ref in linear(model).items():
        if ref.shape[0] % rows or ref.shape[1] % columns:
            raise UsageError(
                f"its shape {ref.shape} is not in multiples of ({rows}, {columns}), which {reader} needs",
                where=name,
                hint="choose a GGUF target, whose types fall back tensor by tensor",
            )


def cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` as `dtype`; BadInput where a finite value would become infinite."""
    bounds = torch.stack(weight.aminmax())  # rounding keeps the order, so the others fit where these do
    if not bool(torch.isfinite(bounds.to(dtype)).all()):
        raise BadInput(
            f"holds {bounds.abs().max().item():.3g}, which {str(dtype).removeprefix('torch.')} cannot hold",
            where=name,
            hint="convert to bf16 or a GGUF type",
        )
    return weight.to(dtype)


def dense(name: str, weight: Tensor, dtype: torch.dtype) -> Solved:
    """A tensor kept as plain numbers of `dtype`."""
    return dense_rows(name, in_rows(weight), tuple(weight.shape), dtype, weight.device)


def straight(source: str, name: str, kind: str, numbers: Numbers, rows: int, width: int, *importance: Any) -> Solved:
    """A tensor of `rows` rows as bytes of type `kind`, by `codecs.recode`; an error names it as `name`."""
    try:
        raw, loss = recode(kind, numbers, rows, width, *importance)
    except BadInput as e:
        raise BadInput(e.what, where=e.where or name, hint=e.hint) from e
    return Solved(source, {name: raw.reshape(-1)}, None, loss)


def dense_rows(name: str, rows: Rows, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Solved:
    """The same of a tensor of `shape` whose rows are given."""
    width = shape[-1]
    out = torch.empty(prod(shape) // width, width, dtype=dtype, device=device)
    loss = recoded(
        rows,
        slabs(len(out), width, device),
        lambda before, _: cast(name, before, dtype),
        lambda made: made.to(torch.float32, copy=True),
        out,
    )
    return Solved(name, {name: out.view(shape)}, out.view(shape), loss)


def folder_output(
    target: str,
    format: str,
    note: str,
    model: Model,
    parts: Mapping[str, Sequence[safetensors.Spec]],
    solver: str,
    solve: Callable[[Piece], Iterator[Solved]],
    dtype: torch.dtype | str,
    quantization: dict[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
    behind: bool = False,
    exact: frozenset[str] = frozenset(),
) -> Output:
    """Plan an HF folder: quantized tensors as `parts` lays them out (by HF name), all others cast to `dtype`.

    Those in `exact` lie on the grid already; a folder without others needs no calibration.
    """
    plain = str(dtype).removeprefix("torch.")
    rows, specs = [], []
    for name, ref in model.tensors.items():
        own = list(parts.get(name, [(name, dtype, ref.shape)]))
        nbytes = sum(safetensors.nbytes_of(d, shape) for _, d, shape in own)
        kind, how = (target, "exact" if name in exact else solver) if name in parts else (plain, "cast")
        rows.append(Row(name, name, ref.shape, ref.type, kind, how, nbytes))
        specs += own
    config = {k: v for k, v in model.config.items() if k not in ("quantization_config", "dtype")}
    config["torch_dtype"] = plain
    if quantization:
        config["quantization_config"] = quantization
    texts = {"config.json": json.dumps(config, indent=2) + "\n"} | dict(model.files) | dict(extra or {})
    layout = safetensors.layout_folder(specs)
    solved = bool(parts.keys() - exact)
    kinds = {"sealed": quantization is None, "behind": behind and solved}
    return Output(target, format, target, note, tuple(rows), layout, solve, solved, texts, **kinds)
