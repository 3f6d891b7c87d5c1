"""GGUF files of any llama.cpp mixture: `Q8_0`, `Q4_K_M`, `IQ4_XS`, `F16`. Types by `mixtures.py`, bytes by the codecs.

A tensor whose type already fits is copied byte for byte: the same type again is not idempotent through floats. The
importance matrix is the diagonal of the calibration's Gram matrices, handed to ggml as llama.cpp hands it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gguf.constants import GGUFValueType, Keys
from torch import Tensor

from quantkit.codecs import decode, encode, lookup
from quantkit.errors import UsageError
from quantkit.files.gguf_values import Value
from quantkit.files.gguf_writer import layout_gguf, tensor_nbytes
from quantkit.model import Model, Ref
from quantkit.targets.mixtures import MIXTURES, Shape, choose, file_type
from quantkit.targets.target import Calibration, Family, Output, Piece, Row, Solved, weight_loss

UNWEIGHTED = ("F32", "F16", "BF16", "Q8_0")  # types whose encoders have no use for importance
IMATRIX_FILE = "imatrix.gguf"


def plan(match: re.Match[str], model: Model, calibration: Calibration | None) -> Output:
    """A GGUF file; its metadata are the source's, but for the file type and what the calibration adds."""
    name = match[0].upper()
    if model.gguf is None:
        raise UsageError(
            "GGUF targets need a GGUF source",
            where=name,
            hint="give the GGUF this folder was made from, or choose an HF target",
        )
    by_gguf = {r.placed.gguf: (n, r) for n, r in model.tensors.items()}
    tensors = [(n, t.shape, t.type) for n, t in model.gguf.tensors.items()]
    types = choose(name, tensors, shape_of(model), imatrix=True)
    rows = []
    for (tensor, shape, present), kind in zip(tensors, types, strict=True):
        solver = "copy" if kind == present else "cast" if lookup(kind).block == 1 else "ggml"
        rows.append(
            Row(tensor, by_gguf[tensor][0], shape, present, kind, solver, tensor_nbytes(tensor, shape, kind))
        )
    weighted = [r for r in rows if r.solver == "ggml" and r.type not in UNWEIGHTED and reads(by_gguf[r.name][1])]
    metadata = described(model, name, calibration if weighted else None, len(weighted))
    layout = layout_gguf(metadata, [(r.name, r.shape, r.type) for r in rows], model.gguf.alignment)
    by_source = {r.source: r for r in rows}

    def solve(piece: Piece) -> Iterator[Solved]:
        for source, weight in piece.weights.items():
            yield encoded(piece, by_source[source], weight)

    copied = sum(r.solver == "copy" for r in rows)
    note = f"{describe(rows)}; {copied} of {len(rows)} tensors copied byte for byte"
    path = f"{model.name}-{name}.gguf"
    return Output(name, "gguf", path, note, tuple(rows), layout, solve, bool(weighted))


def reads(ref: Ref) -> str | None:
    """The activation whose statistics weigh this tensor's columns."""
    return ref.placed.weight.reads if len(ref.shape) > 1 else None


def encoded(piece: Piece, row: Row, weight: Tensor) -> Solved:
    """One tensor as bytes of its type, and what those bytes stand for, both in GGUF's row order."""
    ref, gguf = piece.refs[row.source], piece.model.gguf
    assert gguf is not None  # planned from a GGUF
    layout = ref.placed.weight.layout
    ordered = layout.to_gguf(weight, piece.model.config) if layout else weight
    stats = piece.stats.get(reads(ref) or "")
    if row.solver == "copy":
        raw = gguf.raw(row.name)
        return Solved(row.source, {row.name: raw}, ordered, 0.0)
    importance = stats.importance if stats and row.type not in UNWEIGHTED else None
    raw = encode(row.type, ordered, importance).reshape(-1)
    value = decode(row.type, raw, row.shape)
    return Solved(row.source, {row.name: raw}, value, weight_loss(ordered, value, stats))


def shape_of(model: Model) -> Shape:
    """What the mixtures' rules ask of a model."""
    heads, kv = model.config["num_attention_heads"], model.config["num_key_value_heads"]
    llama_70b = model.arch.gguf == "llama" and model.layers == 80 and heads != kv  # LLM_TYPE_70B, llama-model.cpp
    tied = bool(model.config.get("tie_word_embeddings"))
    return Shape(heads // kv, model.config.get("num_local_experts", 0), llama_70b, tied)


def described(model: Model, name: str, calibration: Calibration | None, entries: int) -> dict[str, Value]:
    """The metadata of the new file: the source's, in order, without what speaks of how the source was made."""
    assert model.gguf is not None
    stale = ("split.", "quantize.imatrix.")
    metadata = {k: v for k, v in model.gguf.metadata.items() if not k.startswith(stale)}
    metadata[Keys.General.FILE_TYPE] = Value(GGUFValueType.UINT32, None, file_type(name))
    metadata[Keys.General.QUANTIZATION_VERSION] = Value(GGUFValueType.UINT32, None, 2)
    if calibration:
        metadata |= {
            "quantize.imatrix.file": Value(GGUFValueType.STRING, None, IMATRIX_FILE),
            "quantize.imatrix.dataset": Value(GGUFValueType.STRING, None, calibration.text),
            "quantize.imatrix.entries_count": Value(GGUFValueType.UINT32, None, entries),
            "quantize.imatrix.chunks_count": Value(GGUFValueType.UINT32, None, calibration.rows),
        }
    return metadata


def describe(rows: list[Row]) -> str:
    """How many tensors have which type, in words."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.type] = counts.get(row.type, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda c: -c[1]))


FAMILY = Family("Q4_K_M, Q8_0, IQ4_XS and llama.cpp's others", re.compile("|".join(MIXTURES), re.IGNORECASE), plan)
