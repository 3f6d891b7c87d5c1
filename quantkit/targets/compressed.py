"""compressed-tensors folders, `pack-quantized`: `ct-4bit-64g`, `ct-8bit-pc`, `ct-4bit-64g-asym`. vLLM's own format."""

from __future__ import annotations

import re

from quantkit.codecs.grid import Quantized
from quantkit.codecs.packed import pack_compressed
from quantkit.files.safetensors import Spec
from quantkit.later import Tensor, torch
from quantkit.model import Model
from quantkit.model.mixed import config_groups
from quantkit.targets.folder import linear, require_multiples
from quantkit.targets.grids import NAME, Asked, asked_of, of_stem, solved_folder
from quantkit.targets.target import Calibration, Choices, Family, Output


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """A pack-quantized folder, solved as GPTQ is; UsageError for a bit width, a group or a shape that does not fit."""
    asked = asked_of(match, model, choices)
    require_multiples(model, 32, 32, "compressed-tensors")

    def pack(name: str, q: Quantized, bits: int) -> dict[str, Tensor]:
        return of_stem(name, pack_compressed(q, bits, asked.symmetric))

    weights = {
        "num_bits": asked.bits,
        "type": "int",
        "symmetric": asked.symmetric,
        "strategy": "group" if asked.group else "channel",
        "group_size": asked.group,
        "dynamic": False,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups(weights, {n.removesuffix(".weight"): asked.bits_of(n) for n in linear(model)}),
        "ignore": ["lm_head", *(rf"re:.*\.{w.hf}$" for w in model.arch.block if w.kept)],
    }
    return solved_folder(match[0].lower(), "compressed-tensors", model, choices, asked, _parts, pack, config)


def _parts(name: str, shape: tuple[int, ...], asked: Asked) -> list[Spec]:
    n, k = shape
    grid, stem = asked.grid(name, k), name.removesuffix(".weight")
    groups = k // grid.group
    parts = [
        (f"{stem}.weight_packed", torch.int32, (n, k * grid.bits // 32)),
        (f"{stem}.weight_scale", torch.float16, (n, groups)),
        (f"{stem}.weight_shape", torch.int64, (2,)),
    ]
    zeros = (f"{stem}.weight_zero_point", torch.int32, (n * grid.bits // 32, groups))
    return parts if asked.symmetric else [*parts, zeros]


FAMILY = Family("ct-4bit-64g, ct-8bit-pc, -asym", re.compile(rf"ct{NAME}", re.IGNORECASE), plan)
