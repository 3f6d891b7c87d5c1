"""compressed-tensors folders, `pack-quantized`: `ct-4bit-64g`, `ct-8bit-pc`, `ct-4bit-64g-asym`. vLLM's own format."""

from __future__ import annotations

import re

from quantkit.codecs.grid import Quantized
from quantkit.codecs.packed import pack_compressed
from quantkit.files.safetensors import Spec
from quantkit.later import Tensor, torch
from quantkit.model import Model
from quantkit.targets.grids import NAME, Asked, asked_of, solved_folder
from quantkit.targets.target import Calibration, Choices, Family, Output, require_multiples


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """A pack-quantized folder, solved as GPTQ is; UsageError for a bit width, a group or a shape that does not fit."""
    asked = asked_of(match, model)
    require_multiples(model, 32, 32, "compressed-tensors")

    def pack(stem: str, q: Quantized) -> dict[str, Tensor]:
        return {f"{stem}.{part}": t for part, t in pack_compressed(q, asked.bits, asked.symmetric).items()}

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
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *(rf"re:.*\.{w.hf}$" for w in model.arch.block if w.kept)],
    }
    return solved_folder(match[0].lower(), "compressed-tensors", model, choices, asked, _parts, pack, config)


def _parts(stem: str, shape: tuple[int, ...], asked: Asked) -> list[Spec]:
    n, k = shape
    groups = k // asked.grid(k).group
    parts = [
        (f"{stem}.weight_packed", torch.int32, (n, k * asked.bits // 32)),
        (f"{stem}.weight_scale", torch.float16, (n, groups)),
        (f"{stem}.weight_shape", torch.int64, (2,)),
    ]
    zeros = (f"{stem}.weight_zero_point", torch.int32, (n * asked.bits // 32, groups))
    return parts if asked.symmetric else [*parts, zeros]


FAMILY = Family("ct-4bit-64g, ct-8bit-pc, -asym", re.compile(rf"ct{NAME}", re.IGNORECASE), plan)
