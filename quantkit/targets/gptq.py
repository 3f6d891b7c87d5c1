"""GPTQ folders: `gptq`, `gptq-4bit-64g`. Symmetric grids in the v1 layout, which every reader takes; trivial g_idx."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import torch

from quantkit.codecs.grid import Grid
from quantkit.codecs.packed import pack_gptq
from quantkit.errors import UsageError
from quantkit.files.safetensors import Spec
from quantkit.model import Model
from quantkit.solvers.gptq import DAMP, gptq
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
    readers_of,
    require_multiples,
    scarce,
    weight_loss,
)

BITS = (2, 3, 4, 8)  # what transformers' GPTQConfig accepts
GROUPS = (16, 32, 64, 128, 256, 512, 1024)


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """A GPTQ folder; UsageError for a bit width, a group or a shape that no reader takes."""
    bits, asked = int(match["bits"] or 4), int(match["group"]) if match["group"] else None
    if bits not in BITS or (asked and asked not in GROUPS):
        raise UsageError(
            "no reader takes this", where=match[0], hint=f"bits are {BITS}, groups are {GROUPS}, as in gptq-4bit-64g"
        )
    group, why = fitting_group(model, asked)
    require_multiples(model, 32, 32, "GPTQ")
    grid = Grid(bits, group)

    def solve(piece: Piece) -> Iterator[Solved]:
        groups = readers_of(piece)
        members = {name for names in groups.values() for name in names}
        for name, weight in piece.weights.items():
            if name not in members:
                yield dense(name, weight, torch.float16)
        for activation, names in groups.items():
            weights = [piece.weights[n] for n in names]
            fallback = scarce(piece, activation)
            solved = (weighted if fallback else gptq)(torch.cat(weights), piece.stats[activation], grid)
            for name, weight, q in zip(names, weights, solved.rows([len(w) for w in weights]), strict=True):
                value, stem = q.dequantize(), name.removesuffix(".weight")
                parts = {f"{stem}.{part}": t for part, t in pack_gptq(q, bits).items()}
                log = {"fallback": fallback} if fallback else {}
                yield Solved(name, parts, value, weight_loss(weight, value, piece.stats[activation]), log)

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "static_groups": False,
        "true_sequential": False,
        "damp_percent": DAMP,
    }
    parts = {n: _parts(n.removesuffix(".weight"), r.shape, bits, group) for n, r in linear(model).items()}
    return folder_output(
        match[0].lower(),
        "gptq",
        f"{bits}-bit symmetric, {why}",
        model,
        parts,
        "gptq",
        solve,
        torch.float16,
        config,
        {"quantize_config.json": json.dumps(config, indent=2) + "\n"},
    )


def _parts(stem: str, shape: tuple[int, ...], bits: int, group: int) -> list[Spec]:
    n, k = shape
    return [
        (f"{stem}.qweight", torch.int32, (k * bits // 32, n)),
        (f"{stem}.qzeros", torch.int32, (k // group, n * bits // 32)),
        (f"{stem}.scales", torch.float16, (k // group, n)),
        (f"{stem}.g_idx", torch.int32, (k,)),
    ]


FAMILY = Family(
    "gptq, gptq-4bit-64g", re.compile(r"gptq(?:-(?P<bits>\d+)bit)?(?:-(?P<group>\d+)g)?", re.IGNORECASE), plan
)
