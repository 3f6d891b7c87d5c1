"""AWQ GEMM folders: `awq`, `awq-4bit-64g`. 4 bits with zero points; column scales folded into what feeds a matrix.

By default matrices are rounded, each group's range clipped; with `--solver gptq` or `awq+gptq` they are solved as those
of GPTQ folders are, without the column scales or with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from quantkit.codecs.grid import Grid, Quantized
from quantkit.codecs.packed import pack_awq
from quantkit.errors import UsageError
from quantkit.files.safetensors import Spec
from quantkit.later import Tensor, torch
from quantkit.model import Model
from quantkit.solvers.awq import awq_round, awq_scale
from quantkit.solvers.gptq import require_finite
from quantkit.solvers.rtn import rtn, weighted
from quantkit.targets.folder import fitting_group, folder_output, linear, readers_of, require_multiples, scarce
from quantkit.targets.folding import fold
from quantkit.targets.grids import Asked, of_stem, solved_folder
from quantkit.targets.target import Calibration, Choices, Family, Output, Piece, Solved
from quantkit.targets.unsolved import told_of, weight_loss


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """An AWQ folder; UsageError for a bit width, a group or a shape that no reader takes."""
    asked = int(match["group"]) if match["group"] else None
    if int(match["bits"] or 4) != 4 or (asked is not None and asked not in (16, 32, 64, 128)):
        raise UsageError("AWQ GEMM is 4-bit, in groups of 16 to 128", where=match[0], hint="use awq-4bit-64g or gptq")
    group, why = fitting_group(model, asked)
    require_multiples(model, 8, 8, "AWQ")
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "sym": False,  # AutoRound takes true where the key is absent, and then drops the zeros
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *(w.hf for w in model.arch.block if w.kept)],
    }
    wanted = Asked(4, group, False, False, f"4-bit with zero points, {why}")
    if choices.solver:
        return solved_folder(match[0].lower(), "awq", model, choices, wanted, _parts, _packed, config)
    parts = {n: _parts(n, r.shape, wanted) for n, r in linear(model).items()}
    solve = partial(_solve, wanted.grid("", group))
    return folder_output(match[0].lower(), "awq", wanted.why, model, parts, "awq", solve, torch.float16, config)


def _solve(grid: Grid, piece: Piece) -> Iterator[Solved]:
    """Scale, clip and round a block."""
    groups = readers_of(piece)
    for activation, names in groups.items():
        require_finite(piece.stats[activation], names[0])
    folded = fold(piece, lambda weights, stats: awq_scale(weights, stats, grid))
    for name in (n for n in piece.refs if not any(n in names for names in groups.values())):
        yield folded.plain(piece, name)
    for activation, name in ((activation, name) for activation, names in groups.items() for name in names):
        weight, stats, scale = folded.weights[name], piece.stats[activation], folded.column(name)
        unseen = "" if bool(stats.absum.any()) else "no calibration token reached it"
        if fallback := scarce(piece, activation) or unseen:
            q = weighted(weight, stats, grid)
        else:
            q = awq_round(weight, stats, grid, scale.expand(weight.shape[1]))
        value, plain = q.dequantize(), told_of(weight) / scale
        rounded = rtn(plain[0], grid).dequantize()[None]
        log = {
            "loss_rounded": weight_loss(plain, rounded, stats),
            "order": "columns scaled",
            "fallback": fallback or None,
        }
        yield Solved(name, _packed(name, q), value, weight_loss(plain, told_of(value) / scale, stats), log)


def _packed(name: str, q: Quantized, _: int = 4) -> dict[str, Tensor]:
    return of_stem(name, pack_awq(q))


def _parts(name: str, shape: tuple[int, ...], asked: Asked) -> list[Spec]:
    n, k = shape
    groups, stem = k // asked.grid(name, k).group, name.removesuffix(".weight")
    return [
        (f"{stem}.qweight", torch.int32, (k, n // 8)),
        (f"{stem}.qzeros", torch.int32, (groups, n // 8)),
        (f"{stem}.scales", torch.float16, (groups, n)),
    ]


FAMILY = Family("awq, awq-4bit-64g", re.compile(r"awq(?:-(?P<bits>\d+)bit)?(?:-(?P<group>\d+)g)?", re.IGNORECASE), plan)
