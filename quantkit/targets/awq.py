"""AWQ GEMM folders: `awq`, `awq-4bit-64g`. 4 bits with zero points; column scales folded into what feeds a matrix."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.codecs.grid import Grid
from quantkit.codecs.packed import pack_awq
from quantkit.errors import UsageError
from quantkit.model import Model
from quantkit.solvers.awq import awq_round, awq_scale
from quantkit.solvers.rtn import weighted
from quantkit.targets.target import (
    Calibration,
    Choices,
    Family,
    Output,
    Piece,
    Solved,
    dense,
    fitting_group,
    folder_output,
    linear,
    require_multiples,
    scarce,
    weight_loss,
)


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """An AWQ folder; UsageError for a bit width, a group or a shape that no reader takes."""
    asked = int(match["group"]) if match["group"] else None
    if int(match["bits"] or 4) != 4 or (asked and asked not in (16, 32, 64, 128)):
        raise UsageError("AWQ GEMM is 4-bit, in groups of 16 to 128", where=match[0], hint="use awq-4bit-64g or gptq")
    group, why = fitting_group(model, asked)
    require_multiples(model, 8, 8, "AWQ")
    grid = Grid(4, group, symmetric=False)

    def solve(piece: Piece) -> Iterator[Solved]:
        weights, scales = fold(piece, grid)
        for name, weight in weights.items():
            placed = piece.refs[name].placed
            if not placed.reads or placed.weight.kept:
                yield dense(name, weight, torch.float16)
                continue
            stats, scale = piece.stats[placed.reads], scales.get(name, torch.ones(1, device=weight.device))
            if fallback := scarce(piece, placed.reads):
                q = weighted(weight, stats, grid)
            else:
                q = awq_round(weight, stats, grid, scale.expand(weight.shape[1]))
            value, stem = q.dequantize(), name.removesuffix(".weight")
            parts = {f"{stem}.{part}": t for part, t in pack_awq(q).items()}
            log = {"fallback": fallback} if fallback else {}
            yield Solved(name, parts, value, weight_loss(weight / scale, value / scale, stats), log)

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "sym": False,  # AutoRound takes true where the key is absent, and then drops the zeros
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *(w.hf for w in model.arch.block if w.kept)],
    }
    parts = {
        name: [
            (f"{name.removesuffix('.weight')}.qweight", torch.int32, (ref.shape[1], ref.shape[0] // 8)),
            (f"{name.removesuffix('.weight')}.qzeros", torch.int32, (ref.shape[1] // group, ref.shape[0] // 8)),
            (f"{name.removesuffix('.weight')}.scales", torch.float16, (ref.shape[1] // group, ref.shape[0])),
        ]
        for name, ref in linear(model).items()
    }
    note = f"4-bit with zero points, {why}"
    return folder_output(match[0].lower(), "awq", note, model, parts, "awq", solve, torch.float16, config)


def fold(piece: Piece, grid: Grid) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The block's weights with AWQ's scales moved in, and the scale of each matrix that has one.

    Each scale multiplies the columns of the matrices that read an activation and divides the rows of what makes it. The
    last activation of the block comes first, so that a producer's rows are final when its own columns are searched.
    A producer of another width (the value projection under grouped-query attention) leaves its activation unscaled, and
    an expert that too few tokens asked for its own.
    """
    weights, scales = dict(piece.weights), {}
    for maker, names, activation in _sites(piece):
        searched = [weights[n] for n in names if not piece.refs[n].placed.weight.kept]
        if weights[maker].shape[0] != searched[0].shape[1] or scarce(piece, activation):
            continue
        scale = awq_scale(torch.cat(searched), piece.stats[activation], grid)
        for n in names:
            weights[n] = weights[n] * scale
            scales[n] = scale
        producer = piece.refs[maker].placed.weight
        for n in (maker, maker.removesuffix(".weight") + ".bias"):
            if n in weights:
                weights[n] = producer.divided(weights[n], scale, piece.model.config)
    return weights, scales


def _sites(piece: Piece) -> Iterator[tuple[str, list[str], str]]:
    """What makes an activation, what reads it, and its name: the last of a block first, each expert's for itself.

    All experts together read what the router reads, whose statistics are of every token.
    """
    at: dict[str, list[tuple[int | None, str]]] = {}
    for name, ref in piece.refs.items():
        if name.endswith(".weight"):
            at.setdefault(ref.placed.weight.gguf, []).append((ref.placed.expert, name))
    for producer, consumers in reversed(piece.model.arch.folds()):
        for expert, maker in at.get(producer.gguf, []):
            names = [n for c in consumers for e, n in at[c.gguf] if expert is None or e == expert]
            if names:
                yield maker, names, f"{producer.writes}" if expert is None else f"{producer.writes}.{expert}"


FAMILY = Family("awq, awq-4bit-64g", re.compile(r"awq(?:-(?P<bits>\d+)bit)?(?:-(?P<group>\d+)g)?", re.IGNORECASE), plan)
