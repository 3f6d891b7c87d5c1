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
    readers_of,
    require_multiples,
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
            reads = piece.refs[name].placed.weight.reads
            if not reads or not name.endswith(".weight"):
                yield dense(name, weight, torch.float16)
                continue
            stats, scale = piece.stats[reads], scales.get(reads, torch.ones(1, device=weight.device))
            q = awq_round(weight, stats, grid, scale.expand(weight.shape[1]))
            value, stem = q.dequantize(), name.removesuffix(".weight")
            parts = {f"{stem}.{part}": t for part, t in pack_awq(q).items()}
            yield Solved(name, parts, value, weight_loss(weight / scale, value / scale, stats))

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "sym": False,  # AutoRound takes true where the key is absent, and then drops the zeros
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
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
    """The block's weights with AWQ's scales moved in, and the scales by activation.

    Each scale multiplies the columns of the matrices that read an activation and divides the rows of what makes it. The
    last activation of the block comes first, so that a producer's rows are final when its own columns are searched.
    A producer of another width (the value projection under grouped-query attention) leaves its activation unscaled.
    """
    weights, scales = dict(piece.weights), {}
    by_row = {ref.placed.weight.gguf: name for name, ref in piece.refs.items() if name.endswith(".weight")}
    readers = readers_of(piece)
    for producer, consumers in reversed(piece.model.arch.folds()):
        if not consumers or producer.gguf not in by_row:
            continue
        activation = str(consumers[0].reads)
        names, maker = readers[activation], by_row[producer.gguf]
        if weights[maker].shape[0] != weights[names[0]].shape[1]:
            continue
        scale = awq_scale(torch.cat([weights[n] for n in names]), piece.stats[activation], grid)
        for n in names:
            weights[n] = weights[n] * scale
        for n in (maker, maker.removesuffix(".weight") + ".bias"):
            if n in weights:
                weights[n] = producer.divided(weights[n], scale, piece.model.config)
        scales[activation] = scale
    return weights, scales


FAMILY = Family("awq, awq-4bit-64g", re.compile(r"awq(?:-(?P<bits>\d+)bit)?(?:-(?P<group>\d+)g)?", re.IGNORECASE), plan)
