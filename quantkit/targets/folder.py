"""What HF folders have in common: which tensors are solved, whether a group size fits them, and the plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quantkit.errors import UsageError
from quantkit.files import safetensors
from quantkit.later import torch
from quantkit.model import Model, Ref
from quantkit.targets.target import Output, Piece, Row, Solved


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


SCARCE = 0.005  # of the calibration tokens: a Gram matrix of fewer says little of an expert


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
