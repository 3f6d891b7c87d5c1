"""GGUF files of any llama.cpp mixture: `Q8_0`, `Q4_K_M`, `IQ4_XS`, `F16`. Types by `mixtures.py`, bytes by the codecs.

A tensor whose type already fits is copied byte for byte: the same type again is not idempotent through floats. The
importance matrix is one that the user gives, or the diagonal of the calibration's Gram matrices; where there is neither
calibration nor file, tensors are encoded without. A folder is a source as good as a GGUF: what a GGUF holds then comes
from the architecture's table, and its metadata from `gguf_metadata.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType, Keys
from torch import Tensor

from quantkit.codecs import Rows, decode, decoded, encode, lookup, share_out, slabs
from quantkit.errors import BadInput, UsageError
from quantkit.files.gguf_set import SetLayout
from quantkit.files.gguf_values import Value
from quantkit.files.gguf_writer import Layout, layout_gguf, split_layout, tensor_nbytes
from quantkit.files.imatrix import Imatrix, read_imatrix
from quantkit.model import Model, in_rows
from quantkit.targets.gguf_gptq import OUTER, compensated, known, solvable
from quantkit.targets.gguf_metadata import metadata_of
from quantkit.targets.layers import require_matches
from quantkit.targets.mixtures import MIXTURES, Shape, choose, file_type, kind_of, quantizable, requires_imatrix
from quantkit.targets.target import (
    Calibration,
    Choices,
    Family,
    Output,
    Piece,
    Row,
    Solved,
    finite,
    recode,
    weight_loss,
)

UNWEIGHTED = ("F32", "F16", "BF16", "Q8_0")  # types whose encoders have no use for importance
IMATRIX_FILE = "imatrix.gguf"


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """A file of the mixture that the target is named after."""
    return plan_mixture(match[0].upper(), match[0].upper(), model, calibration, choices)


def plan_mixture(
    name: str, label: str, model: Model, calibration: Calibration | None, choices: Choices, target: str | None = None
) -> Output:
    """A GGUF file of mixture `name`, or a folder of shards, called after `label`.

    The metadata are the source's but for file type and importance matrix. UsageError where a type needs an importance
    matrix and there is none for its tensor.
    """
    tensors = held(model)
    if choices.solver not in (None, "gptq"):
        raise UsageError(f"a GGUF is not solved by {choices.solver}", where=name, hint="use --solver gptq, or a folder")
    if choices.solver == "gptq" and (choices.imatrix or not calibration):
        raise UsageError("the solver gptq needs a calibration", where=name, hint="do without --imatrix, or --solver")
    given = fitting_imatrix(choices.imatrix, model) if choices.imatrix else None
    shape = shape_of(model)
    present = [(t.name, t.shape, t.type) for t in tensors]
    require_matches(choices.layers, [t.name for t in tensors if quantizable(t.name, t.shape)])
    types = choose(name, present, shape, imatrix=bool(given or calibration), choices=choices)
    rows, weighted = [], []
    for t, kind in zip(tensors, types, strict=True):
        same = kind == t.type and model.gguf is not None
        solver = "copy" if same else "cast" if lookup(kind).block == 1 else "ggml"
        if solver == "ggml" and choices.solver == "gptq" and solvable(t.name, kind, len(t.parts), shape.experts):
            solver = "gptq"
        rows.append(Row(t.name, t.source, t.shape, t.type, kind, solver, tensor_nbytes(t.name, t.shape, kind)))
        seen = t.name in given.sums if given else bool(calibration and t.reads)
        if solver == "ggml" and not seen and requires_imatrix(name, t.name, kind):
            raise _blind(name, t.name, kind, choices.imatrix)
        weighted += [t.name] if seen and solver in ("ggml", "gptq") and kind not in UNWEIGHTED else []
    calibrated = bool(weighted) and given is None
    behind = any(r.solver == "gptq" for r in rows) and choices.inputs == "quantized" and not shape.experts
    metadata = described(model, name)
    if choices.imatrix and given and weighted:
        metadata |= imatrix_keys(choices.imatrix.name, given.datasets, len(given.sums), given.chunks)
    elif calibration and weighted and not behind:  # there the source's activations are not measured
        metadata |= imatrix_keys(IMATRIX_FILE, (calibration.text,), len(readers(model)), calibration.rows)
    alignment = model.gguf.alignment if model.gguf else GGUF_DEFAULT_ALIGNMENT
    path, layout = laid_out(f"{model.name}-{label}", metadata, rows, alignment, choices.split_bytes)

    outer = any(r.solver == "gptq" and r.name in OUTER for r in rows)

    def solve(piece: Piece) -> Iterator[Solved]:
        yield from compensated(piece, [r for r in rows if r.solver == "gptq"])
        for tensor, row in zip(tensors, rows, strict=True):
            if row.solver != "gptq" and tensor.parts[0] in piece.refs:
                importance = _importance(piece, tensor, given, calibrated) if row.name in weighted else None
                solved = encoded(piece, tensor, row, importance)
                yield known(piece, row, solved) if behind else solved

    copied = sum(r.solver == "copy" for r in rows)
    note = f"{describe(rows)}; {copied} of {len(rows)} tensors copied byte for byte"
    return Output(
        target or name,
        "gguf",
        path,
        note,
        tuple(rows),
        layout,
        solve,
        calibrated,
        sealed=True,
        behind=behind,
        outer=outer,
    )


@dataclass(frozen=True)
class Held:
    """One tensor of the new file: its name there, shape and present type, and the HF tensors it is made of.

    These are one, or all experts of a stack, and are solved in one piece. A tensor that only a GGUF has is `computed`
    and rides along with the embedding.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    parts: tuple[str, ...]
    reads: tuple[str, ...] = ()  # the activation that each part is fed
    computed: Tensor | None = None

    @property
    def source(self) -> str:
        """Its one name among the source's tensors."""
        return self.parts[0] if self.computed is None else self.name


def held(model: Model) -> list[Held]:
    """Every tensor of the new file: in the order of a GGUF source, or from a folder as the architecture's rows stand.

    From a folder, what llama.cpp does not quantize becomes float32, as its own converter has it.
    """
    parts: dict[str, list[str]] = {}
    for source, ref in model.tensors.items():
        parts.setdefault(ref.placed.gguf, []).append(source)
    made = {}
    for name, sources in parts.items():
        ref = model.tensors[sources[0]]
        shape = ref.shape if ref.placed.expert is None else (len(sources), *ref.shape)
        fed = tuple(a for s in sources if (a := model.tensors[s].placed.reads))
        made[name] = Held(name, shape, ref.type, tuple(sources), fed)
    embedding = next(iter(model.tensors))
    for name, value in model.arch.computed(model.config).items():
        made[name] = Held(name, tuple(value.shape), "F32", (embedding,), (), value)
    if model.gguf is not None:
        return [replace(made[n], type=t.type) for n, t in model.gguf.tensors.items()]
    return [t if quantizable(t.name, t.shape) else replace(t, type="F32") for t in made.values()]


def laid_out(
    stem: str, metadata: dict[str, Value], rows: list[Row], alignment: int, split_bytes: int | None
) -> tuple[str, Layout | SetLayout]:
    """Path and layout of one file, or where a set was asked for and is needed, of its first shard and all of them."""
    tensors = [(r.name, r.shape, r.type) for r in rows]
    if split_bytes is None:
        return f"{stem}.gguf", layout_gguf(metadata, tensors, alignment)
    shards = {stem + end: layout for end, layout in split_layout(metadata, tensors, split_bytes, alignment)}
    first = next(iter(shards))
    return (first, shards[first]) if len(shards) == 1 else (f"{stem}/{first}", SetLayout(shards))


def fitting_imatrix(path: Path, model: Model) -> Imatrix:
    """The importance matrix at `path`; BadInput where it is another model's."""
    imatrix = read_imatrix(path)
    shapes = {t.name: t.shape for t in held(model)}
    for name in imatrix.sums.keys() & shapes.keys():
        experts, columns = prod(shapes[name][:-2]), shapes[name][-1]
        if imatrix.sums[name].numel() != experts * columns:
            found = imatrix.sums[name].numel()
            what = f"its entry for {name} has {found:,} values where the tensor has {experts * columns:,} columns"
            raise BadInput(what, where=path, hint="give one of this very model")
    if not imatrix.sums.keys() & shapes.keys():
        raise BadInput("has no entry for any tensor of this model", where=path, hint="give one of this very model")
    return imatrix


def _blind(mixture: str, tensor: str, kind: str, imatrix: Path | None) -> UsageError:
    """What to say of a tensor that would be garbage, or abort ggml, for want of an importance matrix."""
    if kind_of(tensor) in ("output", "token_embd"):
        hint = "it has none: choose --output-type or --token-embedding-type, or do without --pure"
    else:
        hint = f"{imatrix.name} has no entry for it" if imatrix else "calibrate, or give one with --imatrix"
    return UsageError(f"{kind} in {mixture} needs an importance matrix", where=tensor, hint=hint)


def readers(model: Model) -> dict[str, list[str]]:
    """The tensors that a calibration has an importance matrix for, by GGUF name, and what each of its parts is fed."""
    fed: dict[str, list[str]] = {}
    for ref in model.tensors.values():
        if ref.placed.reads:
            fed.setdefault(ref.placed.gguf, []).append(ref.placed.reads)
    return fed


def _importance(piece: Piece, tensor: Held, given: Imatrix | None, calibrated: bool) -> Tensor | None:
    if given:
        return given.importance(tensor.name).reshape(-1, tensor.shape[-1])
    stats = [piece.stats[name] for name in tensor.reads] if calibrated else []
    return torch.stack([s.importance for s in stats]) if stats else None


def encoded(piece: Piece, tensor: Held, row: Row, importance: Tensor | None) -> Solved:
    """One tensor as bytes of its type in GGUF's row order, and the error that makes.

    `importance` is (experts, width), one row for a matrix that is no stack of experts.
    """
    rows, width = gguf_rows(piece, tensor), row.shape[-1]
    count = prod(row.shape) // width
    if row.solver == "copy" and piece.model.gguf is not None:
        read_through(rows, slabs(count, width))
        return Solved(row.source, {row.name: piece.model.gguf.raw(row.name)}, None, 0.0)
    try:
        raw, loss = encode_rows(row.type, rows, count, width, importance, piece.device)
    except BadInput as e:
        raise BadInput(e.what, where=e.where or row.name, hint=e.hint) from e
    if piece.stats and tensor.reads:
        before, stats = rows(slice(0, count)).view(row.shape), [piece.stats[name] for name in tensor.reads]
        loss = weight_loss(before, decode(row.type, raw, row.shape), *stats)
    return Solved(row.source, {row.name: raw.flatten()}, None, loss)


def read_through(rows: Rows, parts: list[slice]) -> None:
    """Read every part for the check that reading makes, and keep none."""

    def one(part: slice) -> None:
        rows(part)

    share_out(one, parts)


def gguf_rows(piece: Piece, tensor: Held) -> Rows:
    """The rows of the tensor, float32, as a GGUF lays them out, an expert's after another's.

    Of a GGUF they are decoded as they lie there: HF's order and back again would end the same.
    """
    if piece.weights or piece.model.gguf is None:
        return in_rows(gguf_order(piece, tensor))
    row_bytes = lookup(tensor.type).row_bytes(tensor.shape[-1])
    rows = decoded(tensor.type, piece.model.gguf.raw(tensor.name).view(-1, row_bytes))
    return lambda part: finite(tensor.name, rows(part).to(piece.device))


def gguf_order(piece: Piece, tensor: Held) -> Tensor:
    """The tensor's values, float32, as a GGUF lays them out."""
    if tensor.computed is not None:
        return tensor.computed.to(piece.device)
    placed = piece.refs[tensor.parts[0]].placed
    if placed.expert is not None:
        return torch.stack([piece.weight(p) for p in tensor.parts])
    weight, layout = piece.weight(tensor.parts[0]), placed.weight.layout
    return layout.to_gguf(weight, piece.model.config) if layout else weight


def encode_rows(
    kind: str, rows: Rows, count: int, width: int, importance: Tensor | None, device: torch.device
) -> tuple[Tensor, float]:
    """`count` rows as bytes (count, row_bytes), and the relative error of them.

    They are those of as many experts as `importance` (experts, width) has rows, each with its own.
    """
    each = count // (1 if importance is None else len(importance))
    parts = [part for first in range(0, count, each) for part in slabs(each, width, device, first)]
    raw = torch.empty(count, lookup(kind).row_bytes(width), dtype=torch.uint8, device=device)
    loss = recode(
        rows,
        parts,
        lambda before, part: encode(kind, before, None if importance is None else importance[part.start // each]),
        lambda made: decode(kind, made, (len(made), width)),
        raw,
    )
    return raw, loss


def shape_of(model: Model) -> Shape:
    """What the mixtures' rules ask of a model."""
    heads, kv = model.config["num_attention_heads"], model.config["num_key_value_heads"]
    llama_70b = model.arch.gguf == "llama" and model.layers == 80 and heads != kv  # LLM_TYPE_70B, llama-model.cpp
    tied = bool(model.config.get("tie_word_embeddings"))
    experts = model.config.get("num_local_experts") or model.config.get("num_experts") or 0
    return Shape(heads // kv, experts, llama_70b, tied)


def described(model: Model, name: str) -> dict[str, Value]:
    """The metadata of the new file: a GGUF source's, in order, without what speaks of how the source was made."""
    stale = ("split.", "quantize.imatrix.")
    source = model.gguf.metadata if model.gguf else metadata_of(model)
    metadata = {k: v for k, v in source.items() if not k.startswith(stale)}
    metadata[Keys.General.FILE_TYPE] = Value(GGUFValueType.UINT32, None, file_type(name))
    metadata[Keys.General.QUANTIZATION_VERSION] = Value(GGUFValueType.UINT32, None, 2)
    return metadata


def imatrix_keys(file: str, datasets: Sequence[str], entries: int, chunks: int) -> dict[str, Value]:
    """What llama.cpp's `quantize` notes of an importance matrix: its file's name, the text, how many of what."""
    return {
        "quantize.imatrix.file": Value(GGUFValueType.STRING, None, file),
        "quantize.imatrix.dataset": Value(GGUFValueType.STRING, None, ", ".join(datasets)),
        "quantize.imatrix.entries_count": Value(GGUFValueType.UINT32, None, entries),
        "quantize.imatrix.chunks_count": Value(GGUFValueType.UINT32, None, chunks),
    }


def describe(rows: list[Row]) -> str:
    """How many tensors have which type, in words."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.type] = counts.get(row.type, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda c: -c[1]))


FAMILY = Family("Q4_K_M, Q8_0, IQ4_XS and llama.cpp's others", re.compile("|".join(MIXTURES), re.IGNORECASE), plan)
