"""The CPU's encoders: libggml's, and for the types where numpy is quicker and gives the same bytes, numpy's."""

from __future__ import annotations

import numpy as np

from quantkit.codecs import ggml
from quantkit.codecs.codec import Bytes, Codec, Floats
from quantkit.codecs.iquants_numpy import ENCODERS
from quantkit.codecs.sharing import share_out, slabs

IN_CACHE = 1 << 18  # weights: each of numpy's many steps makes an array of so many, and the next one reads it


def encode(codec: Codec, weight: Floats, importance: Floats | None, out: Bytes | None = None) -> Bytes:
    """Weight (rows, width) and importance (width,), both finite float32 -> (rows, row_bytes) uint8, in `out` if given.

    What is given as `out` lies in one piece.
    """
    by_numpy = ENCODERS.get(codec.name)
    if by_numpy is None:
        return ggml.encode(codec, weight, importance, out)
    rows, width = weight.shape
    made = np.empty((rows, codec.row_bytes(width)), np.uint8) if out is None else out
    step = max(1, IN_CACHE // width)

    def work(part: slice) -> None:
        for start in range(part.start, part.stop, step):
            some = slice(start, min(part.stop, start + step))
            by_numpy(weight[some], importance, made[some])

    share_out(work, slabs(rows, width))
    return made
