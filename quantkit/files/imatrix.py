"""llama.cpp's importance matrices: sums of squared activations, and how many rows they were summed over.

Source: llama.cpp `tools/imatrix/imatrix.cpp` and `common/imatrix-loader.cpp`. As GGUF (2025 and later) `general.type`
is "imatrix", and every weight has NAME.in_sum2 of shape (experts, in) and NAME.counts of shape (experts, 1), both F32.
The older `.dat` is little-endian and has one count a weight, in chunks; it is read, not written:

    int32 entries | for each: int32 length, name, int32 chunks, int32 n, n x float32 | int32 chunks | int32 length, text
    a value is chunks * sum / rows; all experts of a weight lie one after the other; the end may be missing
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from quantkit.errors import BadInput, FormatError
from quantkit.files.atomic import staged
from quantkit.files.gguf import read_gguf
from quantkit.files.gguf_header import TENSOR_NAME
from quantkit.files.gguf_values import Value
from quantkit.files.gguf_writer import GGUFWriter, layout_gguf
from quantkit.files.key_types import require_types
from quantkit.files.raw import raw_bytes

Array = NDArray[Any]

LEGACY_CHUNK = 512  # tokens: what llama-imatrix takes where nothing else is said; a .dat does not say
AGAIN = "give one that llama-imatrix or quantkit wrote"
INACTIVE = 1e-5  # llama.cpp's `compute_statistics`: the mean square up to which a column counts as silent


@dataclass(frozen=True)
class Imatrix:
    """By GGUF weight name, `sums` of squared inputs (experts, in) float32 and `counts` of rows (experts,) int64.

    `datasets` are the texts, `chunks` how many sequences of `chunk_size` tokens were seen.
    """

    sums: Mapping[str, Array]
    counts: Mapping[str, Array]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    def importance(self, name: str) -> Array:
        """Mean squared input per column, (experts, in); 1 everywhere for an expert that saw no row, as in llama.cpp."""
        sums, counts = self.sums[name], self.counts[name][:, None].astype(np.float32)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))


@dataclass(frozen=True)
class Spread:
    """How a weight's importance lies over its columns: llama-imatrix's statistics of one entry.

    `active` is the share of columns above 1e-5; `entropy`, in bits, is log2 of the width where all count alike.
    """

    rows: int
    columns: int
    total: float
    mean: float
    stddev: float
    min: float
    max: float
    active: float
    entropy: float


def spread(imatrix: Imatrix, name: str) -> Spread:
    """The statistics of one entry, over the columns of all experts that saw a row."""
    counts = imatrix.counts[name]
    x = imatrix.importance(name)[counts > 0].astype(np.float64).ravel()
    if not len(x):
        return Spread(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    share = x[x > 0] / x.sum()
    return Spread(
        rows=int(counts.sum()),
        columns=len(x),
        total=x.sum().item(),
        mean=x.mean().item(),
        stddev=x.std().item(),
        min=x.min().item(),
        max=x.max().item(),
        active=(x > INACTIVE).mean().item(),
        entropy=-(share * np.log2(share)).sum().item(),
    )


def merge(parts: Sequence[Imatrix]) -> Imatrix:
    """The importance of all rows together; a weight that some parts lack is taken from the others.

    BadInput where two parts are not of the same model.
    """
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for part in parts:
        for name, values in part.sums.items():
            if name not in sums:
                sums[name], counts[name] = values, part.counts[name]
                continue
            if sums[name].size != values.size:
                what = f"{name} has {values.size:,} values here and {sums[name].size:,} there"
                raise BadInput(what, hint="merge importance matrices of one model")
            experts = max(len(counts[name]), len(part.counts[name]))
            sums[name] = sums[name].reshape(experts, -1) + values.reshape(experts, -1)
            counts[name] = np.broadcast_to(counts[name], experts) + np.broadcast_to(part.counts[name], experts)
    size = parts[0].chunk_size
    datasets = tuple(dict.fromkeys(d for part in parts for d in part.datasets))
    rows = max((int(c.max()) for c in counts.values()), default=0)
    return Imatrix(sums, counts, datasets, rows // size if size else 0, size)


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write `imatrix` so that llama.cpp's tools read it; the file appears whole or not at all."""
    strings, u32 = GGUFValueType.STRING, GGUFValueType.UINT32
    metadata = {
        "general.type": Value(strings, None, "imatrix"),
        "imatrix.datasets": Value(GGUFValueType.ARRAY, strings, list(imatrix.datasets)),
        "imatrix.chunk_count": Value(u32, None, imatrix.chunks),
        "imatrix.chunk_size": Value(u32, None, imatrix.chunk_size),
    }
    tensors: dict[str, Array] = {}
    for name in sorted(imatrix.sums):
        tensors[f"{name}.in_sum2"] = imatrix.sums[name]
        tensors[f"{name}.counts"] = imatrix.counts[name][:, None]
    layout = layout_gguf(metadata, [(n, tuple(t.shape), "F32") for n, t in tensors.items()])
    with staged(path, replace=True) as partial, GGUFWriter(partial, layout) as out:
        for name, tensor in tensors.items():
            out.write(name, raw_bytes(tensor.astype(np.float32)))


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix of either format.

    Raises BadInput where there is no file, FormatError where it is something else or holds what no sum of squares is.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as e:
        raise BadInput(f"cannot be opened: {e.strerror or e}", where=path, hint="check the path") from None
    imatrix = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)
    for name, values in imatrix.sums.items():
        if not ((values >= 0) & np.isfinite(values)).all() or (imatrix.counts[name] < 0).any():
            raise FormatError(f"the entry {name} holds what is no sum of squares", where=path, hint=AGAIN)
    return imatrix


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    require_types(file.metadata)
    if file.get("general.type") != "imatrix":
        raise FormatError("not an importance matrix", where=path, hint=AGAIN)
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for tensor, info in file.tensors.items():
        name, _, part = tensor.rpartition(".")
        if part not in ("in_sum2", "counts"):
            continue
        if info.type != "F32":
            raise FormatError(f"{tensor} is {info.type}, not F32", where=path, hint=AGAIN)
        values = file.stored(tensor).view(np.float32)
        if part == "in_sum2":
            sums[name] = values.copy()
        else:
            counts[name] = values.round().astype(np.int64)
    if sums.keys() != counts.keys() or any(len(s) % len(counts[n]) for n, s in sums.items()):
        raise FormatError("sums and counts do not pair up", where=path, hint="the file is damaged")
    return Imatrix(
        {name: values.reshape(len(counts[name]), -1) for name, values in sums.items()},
        counts,
        tuple(map(str, file.get("imatrix.datasets", []))),
        int(file.get("imatrix.chunk_count", 0)),
        int(file.get("imatrix.chunk_size", 0)),
    )


class _Legacy:
    """A walk over a `.dat` that never reads past its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.raw, self.pos = path, path.read_bytes(), 0

    @property
    def done(self) -> bool:
        return self.pos == len(self.raw)

    def take(self, nbytes: int) -> bytes:
        if not 0 <= nbytes <= len(self.raw) - self.pos:
            raise FormatError("neither a GGUF nor a whole .dat", where=self.path, offset=self.pos, hint=AGAIN)
        self.pos += nbytes
        return self.raw[self.pos - nbytes : self.pos]

    def int32(self) -> int:
        return struct.unpack("<i", self.take(4))[0]

    def text(self) -> str:
        return self.take(self.int32()).decode(errors="replace")


def _read_legacy(path: Path) -> Imatrix:
    file = _Legacy(path)
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for _ in range(file.int32()):
        name, chunks = file.text(), file.int32()
        values = np.frombuffer(file.take(4 * file.int32()), dtype="<f4").copy()
        if not TENSOR_NAME.fullmatch(name) or not len(values):
            raise FormatError("neither a GGUF nor a whole .dat", where=path, offset=file.pos, hint=AGAIN)
        # a weight that was written with no chunk at all is divided by nothing, as llama.cpp's quantize does it
        sums[name], counts[name] = values[None] * LEGACY_CHUNK, np.array([max(chunks, 1) * LEGACY_CHUNK])
    if not sums:
        raise FormatError("holds no entry", where=path, hint=AGAIN)
    chunks = 0 if file.done else file.int32()
    datasets = () if file.done else (file.text(),)
    return Imatrix(sums, counts, datasets, chunks, LEGACY_CHUNK)
