"""Plain floats in an HF folder: `fp16`, `bf16`, `fp32`. The way back from a quantized GGUF to what other tools take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod

from quantkit.later import torch
from quantkit.model import Model
from quantkit.targets.folder import folder_output
from quantkit.targets.target import Calibration, Choices, Family, Output, Piece, Solved
from quantkit.targets.unsolved import dense, straight

TYPES = {"fp16": ("float16", "F16"), "bf16": ("bfloat16", "BF16"), "fp32": ("float32", "F32")}  # torch's name, ggml's


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """A folder with every tensor as one float type; nothing is calibrated."""
    name = match[0].lower()
    dtype, kind = TYPES[name]

    def solve(piece: Piece) -> Iterator[Solved]:
        for tensor, ref in piece.refs.items():
            if numbers := piece.numbers(tensor):
                width = ref.shape[-1]
                yield straight(tensor, tensor, kind, numbers, prod(ref.shape) // width, width)
            else:
                yield dense(tensor, piece.rows(tensor), ref.shape, getattr(torch, dtype), piece.device)

    return folder_output(name, name, f"every tensor as {name}", model, {}, "cast", solve, dtype)


# In capitals, BF16 is a GGUF, as F16 is.
FAMILY = Family("fp16, bf16, fp32", re.compile(r"(?i:fp16|fp32)|bf16"), plan)
