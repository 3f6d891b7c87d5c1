"""Rows of one type straight to another on the CPU, by libggml and numpy: what a GGUF made of a GGUF takes, no torch.

Each thread takes a slab of rows: decodes it, encodes it, decodes every eighth row of what came out of that, and
measures the difference. The two buffers of a thread are all that is made beside the result, and they stay in caches.
Sums of squares tell whether all is finite as well as how large the error is: no pass over the weights is made for the
check alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from threading import local

import numpy as np

from quantkit.codecs import cpu, ggml
from quantkit.codecs.codec import Bytes, Floats
from quantkit.codecs.limits import LARGEST_WEIGHT, check_bounds, check_importance, check_rows, too_large
from quantkit.codecs.registry import lookup
from quantkit.codecs.sharing import share_out, slabs
from quantkit.errors import BadInput

EVERY = 8  # of so many rows of a slab one is read back: all of them take a tenth of the time that Q6_K takes to encode
HALF_HOLDS = 1 << 14  # weights up to here have scales that half precision holds: none exceeds its block's largest

Numbers = Callable[[slice, Floats], Floats]  # rows of a matrix as float32; a buffer of their size may be used for them


def in_bytes(kind: str, stored: Bytes) -> Numbers:
    """The rows that `stored` (rows, row_bytes) holds as type `kind`."""
    codec = lookup(kind)
    return lambda part, buffer: ggml.decode(codec, stored[part], buffer)


def in_floats(weight: Floats) -> Numbers:
    """The rows of an array in memory (rows, width)."""
    return lambda part, buffer: weight[part]


def recode(kind: str, numbers: Numbers, rows: int, width: int, importance: Floats | None = None) -> tuple[Bytes, float]:
    """`rows` rows of `width` as type `kind` (rows, row_bytes), and the share of their energy that this costs.

    The share is that of every eighth row of each slab, of all rows where there is one slab. The rows are those of as
    many experts as `importance` (experts, width) has rows, each with its own. Raises BadInput for what the type cannot
    hold.
    """
    codec = lookup(kind)
    check_rows(codec, rows, width)
    for each in [None] if importance is None else importance:
        check_importance(codec, each, width)
    of_one = rows // (1 if importance is None else len(importance))
    out = np.empty((rows, codec.row_bytes(width)), np.uint8)

    def one(part: slice) -> tuple[float, float]:
        before, after = _buffers(part.stop - part.start, width)
        before = numbers(part, before)
        energy = _energy(before)
        if not isfinite(energy):
            raise _damaged()
        if energy > LARGEST_WEIGHT**2:  # or else no single weight is larger
            check_bounds(codec, before.min().item(), before.max().item())
        cpu.encode(codec, before, None if importance is None else importance[part.start // of_one], out[part])
        step = every if energy <= HALF_HOLDS**2 else 1  # else a scale of any row may have overflowed
        chosen = before[::step]
        read = ggml.decode(codec, out[part][::step], after[: len(chosen)])
        error = _energy(np.subtract(read, chosen, out=read))
        if not isfinite(error):
            raise too_large(codec)
        return error, energy if step == 1 else _energy(chosen)

    parts = [part for first in range(0, rows, of_one) for part in slabs(of_one, width, first=first)]
    every = EVERY if len(parts) > 1 else 1
    made, full = (sum(column) for column in zip(*share_out(one, parts), strict=True))
    return out, made / max(full, 1e-30)


def read_through(numbers: Numbers, rows: int, width: int) -> None:
    """Read `rows` rows of `width` and keep nothing; BadInput where something is not finite."""

    def one(part: slice) -> None:
        if not isfinite(_energy(numbers(part, _buffers(part.stop - part.start, width)[0]))):
            raise _damaged()

    share_out(one, slabs(rows, width))


def _damaged() -> BadInput:
    return BadInput("holds values that are not finite", hint="the source is damaged; get it again")


_here = local()


def _buffers(rows: int, width: int) -> tuple[Floats, Floats]:
    """Two float32 arrays (rows, width) of this thread's own, whose contents are anything."""
    have = getattr(_here, "room", None)
    if have is None or have.shape[1] < rows * width:
        have = _here.room = np.empty((2, rows * width), np.float32)
    first, second = have[:, : rows * width].reshape(2, rows, width)
    return first, second


def _energy(x: Floats) -> float:
    """The sum of squares of x (rows, width): finite where, and only where, all of x is."""
    total = float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64))
    return total if isfinite(total) else float(np.square(x, dtype=np.float64).sum())
