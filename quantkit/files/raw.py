"""The bytes of what is written and of what lies in a file: views where they can be, never a copy for its own sake."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from quantkit.later import is_tensor, torch

Bytes = NDArray[np.uint8]


def raw_bytes(value: Any) -> memoryview:
    """The bytes of a tensor on any device, of an array, or of bytes, as they lie in memory."""
    if is_tensor(value):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return memoryview(value).cast("B")


def seal(parts: Iterable[Any]) -> str:
    """A hash of the bytes of tensors or arrays; of 128 bits against chance, not against malice, at the speed of RAM."""
    hashed = xxh3_128()
    for part in parts:
        hashed.update(raw_bytes(part))
    return hashed.hexdigest()


def mapped(fd: int, offset: int, nbytes: int) -> Bytes:
    """`nbytes` of an open file from `offset` on, mapped; writing into them changes neither the file nor other maps."""
    if not nbytes:
        return np.empty(0, np.uint8)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    view = mmap.mmap(fd, offset - start + nbytes, access=mmap.ACCESS_COPY, offset=start)
    return np.frombuffer(view, np.uint8, nbytes, offset - start)


def put(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; Linux takes at most 2 GiB a call."""
    while data.nbytes:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
