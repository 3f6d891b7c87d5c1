"""GGUF files of any llama.cpp mixture: `Q8_0`, `Q4_K_M`, `IQ4_XS`, `F16`. Types by `mixtures.py`, bytes by the codecs.

A tensor whose type already fits is copied byte for byte: the same type again is not idempotent through floats. The
importance matrix is one that the user gives, or the diagonal of the calibration's Gram matrices; where there is neither
calibration nor file, tensors are encoded without. A folder is a source as good as a GGUF: what a GGUF holds then comes
from the architecture's table, and its metadata from `gguf_metadata.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType, Keys

from quantkit.codecs import lookup
from quantkit.errors import BadInput, UsageError
from quantkit.files.gguf_set import SetLayout
from quantkit.files.gguf_values import Value
from quantkit.files.gguf_writer import Layout, layout_gguf, split_layout, tensor_nbytes
from quantkit.files.imatrix import Imatrix, read_imatrix
from quantkit.model import Model
from quantkit.targets.gguf_gptq import COMPENSATED, OUTER, compensated, known, solvable
from quantkit.targets.gguf_metadata import metadata_of
from quantkit.targets.gguf_tensors import Held, encoded, held, importance_of
from quantkit.targets.layers import require_found, require_matches
from quantkit.targets.learned import learned, require_behind
from quantkit.targets.mixture_rules import MIXTURES, Shape
from quantkit.targets.mixtures import choose, file_type, kind_of, quantizable, requires_imatrix
from quantkit.targets.target import LEARNED, Calibration, Choices, Family, Output, Piece, Row, Solved

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
    _require_solvable(name, calibration, choices)
    given = fitting_imatrix(choices.imatrix, model) if choices.imatrix else None
    named = [t.name for t in tensors if quantizable(t.name, t.shape)]
    require_matches(choices.layers, named)
    require_found([pattern for pattern, _ in choices.tensor_types], named)
    rows = _rows(name, tensors, model, choices, weighing=bool(given or calibration))
    weighted = _weighted(name, tensors, rows, given, calibration, choices)
    calibrated = bool(weighted) and given is None
    compensating = [r for r in rows if r.solver in COMPENSATED]
    behind = bool(compensating) and choices.behind(model)
    metadata = described(model, name)
    if choices.imatrix and given and weighted:
        metadata |= imatrix_keys(choices.imatrix.name, given.datasets, len(given.sums), given.chunks)
    elif calibration and weighted and not behind:  # there the source's activations are not measured
        metadata |= imatrix_keys(IMATRIX_FILE, (calibration.text,), len(readers(model)), calibration.rows)
    alignment = model.gguf.alignment if model.gguf else GGUF_DEFAULT_ALIGNMENT
    path, layout = laid_out(f"{model.name}-{label}", metadata, rows, alignment, choices.split_bytes)

    outer = any(r.name in OUTER for r in compensating)
    compensate: Callable[[Piece], Iterator[Solved]] = partial(compensated, rows=compensating)
    if choices.solver == LEARNED and compensating:
        require_behind(behind, name)
        compensate = learned(compensate)

    def solve(piece: Piece) -> Iterator[Solved]:
        yield from compensate(piece)
        for tensor, row in zip(tensors, rows, strict=True):
            if row.solver not in COMPENSATED and tensor.parts[0] in piece.refs:
                importance = importance_of(piece, tensor, given, calibrated) if row.name in weighted else None
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


def _require_solvable(name: str, calibration: Calibration | None, choices: Choices) -> None:
    """UsageError for a solver that no GGUF has, or that has nothing to calibrate on."""
    if choices.solver not in (None, *COMPENSATED):
        raise UsageError(f"a GGUF is not solved by {choices.solver}", where=name, hint="use --solver gptq, or a folder")
    if choices.solver and (choices.imatrix or not calibration):
        what = f"the solver {choices.solver} needs a calibration"
        raise UsageError(what, where=name, hint="do without --imatrix, or --solver")


def _rows(name: str, tensors: Sequence[Held], model: Model, choices: Choices, weighing: bool) -> list[Row]:
    """Each tensor with the type that the mixture gives it, and who encodes it."""
    shape, rows = shape_of(model), []
    types = choose(name, [(t.name, t.shape, t.type) for t in tensors], shape, weighing, choices)
    for t, kind in zip(tensors, types, strict=True):
        same = kind == t.type and model.gguf is not None
        solver = "copy" if same else "cast" if lookup(kind).block == 1 else "ggml"
        if solver == "ggml" and choices.solver and solvable(t.name, kind, len(t.parts), shape.experts):
            solver = choices.solver
        rows.append(Row(t.name, t.source, t.shape, t.type, kind, solver, tensor_nbytes(t.name, t.shape, kind)))
    return rows


def _weighted(
    name: str,
    tensors: Sequence[Held],
    rows: Sequence[Row],
    given: Imatrix | None,
    calibration: Calibration | None,
    choices: Choices,
) -> set[str]:
    """The tensors that are encoded under importance; UsageError where a type needs it and there is none."""
    weighted = set()
    for t, row in zip(tensors, rows, strict=True):
        seen = t.name in given.sums if given else bool(calibration and t.reads)
        if row.solver == "ggml" and not seen and requires_imatrix(name, t.name, row.type):
            raise _blind(name, t.name, row.type, choices.imatrix)
        if seen and row.solver in ("ggml", *COMPENSATED) and row.type not in UNWEIGHTED:
            weighted.add(t.name)
    return weighted


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
        if imatrix.sums[name].size != experts * columns:
            found = imatrix.sums[name].size
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


def shape_of(model: Model) -> Shape:
    """What the mixtures' rules ask of a model."""
    heads, kv = model.config["num_attention_heads"], model.config["num_key_value_heads"]
    llama_70b = model.arch.gguf == "llama" and model.layers == 80 and heads != kv  # LLM_TYPE_70B, llama-model.cpp
    tied = bool(model.config.get("tie_word_embeddings"))
    return Shape(heads // kv, model.experts, llama_70b, tied)


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
