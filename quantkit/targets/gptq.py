"""GPTQ folders: `gptq`, `gptq-4bit-64g`, `gptq-8bit-pc`, `gptq-4bit-64g-asym`, `gptq-4bit-64g-desc`.

Symmetric grids in the v1 layout, which every reader takes; zero points in `gptq_v2`, since readers of v1 disagree on a
zero of 0. `pc` is one group to an output channel. `desc` groups columns by falling importance and says so in `g_idx`;
without it a group's columns are neighbours, and only the solver visits them in that order.
"""

from __future__ import annotations

import json
import re

from quantkit.codecs.grid import Quantized
from quantkit.codecs.packed import pack_gptq
from quantkit.files.safetensors import Spec
from quantkit.later import Tensor, torch
from quantkit.model import Model
from quantkit.model.mixed import dynamic
from quantkit.solvers.gptq import DAMP
from quantkit.targets.folder import linear, require_multiples
from quantkit.targets.grids import NAME, Asked, asked_of, of_stem, solved_folder
from quantkit.targets.target import Calibration, Choices, Family, Output


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """A GPTQ folder; UsageError for a bit width, a group or a shape that no reader takes."""
    asked = asked_of(match, model, choices)
    require_multiples(model, 32, 32, "GPTQ")
    layout = "gptq" if asked.symmetric else "gptq_v2"

    def pack(name: str, q: Quantized, bits: int) -> dict[str, Tensor]:
        return of_stem(name, pack_gptq(q, bits, v2=not asked.symmetric))

    config = {
        "quant_method": "gptq",
        "bits": asked.bits,
        "group_size": asked.group or -1,
        "desc_act": asked.by_activation,
        "sym": asked.symmetric,
        "lm_head": False,
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "static_groups": False,
        "true_sequential": choices.behind(model),
        "damp_percent": DAMP,
    }
    changed = dynamic({n.removesuffix(".weight"): asked.bits_of(n) for n in linear(model)}, asked.bits)
    routers = [w.hf.rpartition(".")[2] for w in model.arch.block if w.kept]
    if changed or routers:  # GPTQModel's way to say what is left as it is
        config["dynamic"] = {rf"-:.*\.{name}$": {} for name in routers} | changed
    files = {"quantize_config.json": json.dumps(config, indent=2) + "\n"}
    return solved_folder(match[0].lower(), "gptq", model, choices, asked, _parts, pack, config, files)


def _parts(name: str, shape: tuple[int, ...], asked: Asked) -> list[Spec]:
    n, k = shape
    grid, stem = asked.grid(name, k), name.removesuffix(".weight")
    groups = k // grid.group
    return [
        (f"{stem}.qweight", torch.int32, (k * grid.bits // 32, n)),
        (f"{stem}.qzeros", torch.int32, (groups, n * grid.bits // 32)),
        (f"{stem}.scales", torch.float16, (groups, n)),
        (f"{stem}.g_idx", torch.int32, (k,)),
    ]


FAMILY = Family(
    "gptq, gptq-4bit-64g, gptq-8bit-pc, -asym, -desc",
    re.compile(rf"gptq{NAME}(?P<desc>-desc)?", re.IGNORECASE),
    plan,
)
