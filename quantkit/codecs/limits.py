"""What an encoder may be given: rows that divide into blocks, finite weights and importance within what ggml bears."""

from __future__ import annotations

from typing import Any

from quantkit.codecs.codec import Codec
from quantkit.errors import BadInput, UsageError

# What an encoder is given at most: beyond, the sums in ggml's searches overflow float32, which its assertions answer by
# aborting the process (so measured, for every type: weights of 1e12 under an importance of 1e20 are the first to).
LARGEST_WEIGHT = 1e8
LARGEST_IMPORTANCE = 1e15


def check_rows(codec: Codec, rows: int, width: int) -> None:
    """BadInput where `rows` rows of `width` weights do not divide into the type's blocks."""
    if not rows * width or width % codec.block:
        raise BadInput(
            f"{rows} rows of {width} weights do not divide into {codec.name} blocks of {codec.block}",
            hint="choose a type with smaller blocks (Q8_0 has 32, F16 has 1) for this tensor",
        )


def check_bounds(codec: Codec, low: float, high: float) -> None:
    """BadInput where weights of `low` to `high` cannot be encoded."""
    if not (-float("inf") < low and high < float("inf")):
        raise BadInput(f"cannot encode as {codec.name}: a weight is not finite", hint="the source tensor is damaged")
    if codec.block > 1 and max(-low, high) > LARGEST_WEIGHT:
        what = f"cannot encode as {codec.name}: a weight of {max(-low, high):g} is out of range"
        raise BadInput(what, hint="choose F32 or BF16")


def check_importance(codec: Codec, importance: Any, width: int) -> None:
    """BadInput for an importance (tensor or array) that no encoder may be given, UsageError where one is needed."""
    if importance is None:
        if codec.requires_importance:
            hint = "give one, or choose Q2_K"
            raise UsageError(f"{codec.name} cannot be encoded without an importance matrix", hint=hint)
        return
    if importance.shape != (width,):
        raise BadInput(f"the importance matrix has shape {tuple(importance.shape)} where the rows have {width} columns")
    if not ((importance >= 0) & (importance <= LARGEST_IMPORTANCE)).all():
        raise BadInput(f"the importance matrix holds a value that is not a number of 0 to {LARGEST_IMPORTANCE:g}")


def too_large(codec: Codec) -> BadInput:
    """What to say where a weight or a scale became infinite."""
    return BadInput(f"cannot encode as {codec.name}: a weight is too large for it", hint="choose BF16 or F32")
