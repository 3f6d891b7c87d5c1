"""llama.cpp's importance matrices as GGUF files: sums of squared activations and how many rows they were summed over.

Source: llama.cpp `tools/imatrix` (2025 and later): `general.type` is "imatrix"; for every weight NAME.in_sum2 of shape
(experts, in) and NAME.counts of shape (experts, 1), both F32. The importance of a column is in_sum2 / counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf.constants import GGUFValueType
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.files.atomic import staged
from quantkit.files.gguf import read_gguf
from quantkit.files.gguf_values import Value
from quantkit.files.gguf_writer import GGUFWriter, layout_gguf


@dataclass(frozen=True)
class Imatrix:
    """`sums` of squared inputs (in,) and `counts` of rows, by GGUF weight name; the text, its chunks and their size."""

    sums: Mapping[str, Tensor]
    counts: Mapping[str, int]
    dataset: str
    chunks: int
    chunk_size: int

    def importance(self, name: str) -> Tensor:
        """Mean squared input per column of the weight `name`, (in,) float32."""
        return self.sums[name] / self.counts[name]


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write `imatrix` so that llama.cpp's tools read it; the file appears whole or not at all."""
    strings, u32 = GGUFValueType.STRING, GGUFValueType.UINT32
    metadata = {
        "general.type": Value(strings, None, "imatrix"),
        "imatrix.datasets": Value(GGUFValueType.ARRAY, strings, [imatrix.dataset]),
        "imatrix.chunk_count": Value(u32, None, imatrix.chunks),
        "imatrix.chunk_size": Value(u32, None, imatrix.chunk_size),
    }
    tensors: dict[str, Tensor] = {}
    for name in sorted(imatrix.sums):
        tensors[f"{name}.in_sum2"] = imatrix.sums[name].reshape(1, -1)
        tensors[f"{name}.counts"] = torch.tensor([[imatrix.counts[name]]], dtype=torch.float32)
    layout = layout_gguf(metadata, [(n, tuple(t.shape), "F32") for n, t in tensors.items()])
    with staged(path, replace=True) as partial, GGUFWriter(partial, layout) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor.float().contiguous().view(torch.uint8).reshape(-1))


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix of one expert a weight; FormatError where the file is something else."""
    file = read_gguf(path)
    if file.get("general.type") != "imatrix":
        raise FormatError("not an importance matrix", where=path, hint="give one that llama-imatrix or quantkit wrote")
    sums, counts = {}, {}
    for tensor in file.tensors:
        name, _, part = tensor.rpartition(".")
        values = file.raw(tensor).view(torch.float32)
        if part == "in_sum2":
            sums[name] = values.clone()
        elif part == "counts":
            counts[name] = int(values[0])
    if sums.keys() != counts.keys():
        raise FormatError("sums and counts do not pair up", where=path, hint="the file is damaged")
    datasets = file.get("imatrix.datasets", [])
    return Imatrix(
        sums, counts, ", ".join(datasets), file.get("imatrix.chunk_count", 0), file.get("imatrix.chunk_size", 0)
    )
