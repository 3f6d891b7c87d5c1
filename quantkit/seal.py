"""Verification of outputs whose bytes are their meaning - GGUF files and folders of plain floats - by those bytes.

What was handed to the writer is hashed, and hashed again as it lies on the disk where the reopened file says it lies:
every byte of every tensor, which finds one that is damaged, cut off or in another's place. Its type must be the planned
one. That a block's bytes stand for what libggml says is a fact about block types, which the tests prove for all kinds
of blocks; here gguf-py's decoder, which has no part in writing, is held against libggml on rows from all over each
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from quantkit.codecs import Bytes, Codec, Floats, decode_torch, in_bytes, lookup, native
from quantkit.codecs.sharing import thread_count
from quantkit.errors import QuantkitError, VerifyError
from quantkit.files.gguf import GGUF
from quantkit.files.raw import seal
from quantkit.files.safetensors import TYPES, open_folder
from quantkit.later import torch
from quantkit.targets import Output, Row
from quantkit.verify import check_size, reopened

SAMPLE = 1 << 13  # weights of a tensor that both decoders are given, in whole rows


@dataclass(frozen=True)
class _Written:
    """A finished output as it lies on the disk: type and shape of every tensor, and a way to read what is stored."""

    kinds: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], Bytes]
    gguf: GGUF | None = None


def check_seals(output: Output, path: Path, seals: Mapping[str, str]) -> Iterator[str]:
    """Reopen `output` at `path` and hold every tensor against its seal (by HF name), yielding each name when done.

    A GGUF is opened as a source is, which holds its names, shapes and keys against the architecture; of a folder, the
    small files must be the planned ones. Raises VerifyError.
    """
    written = _gguf(output, path) if output.format == "gguf" else _folder(output, path)

    def check(row: Row) -> str | None:
        kind = written.kinds.get(row.name)
        if kind != (row.type, row.shape):
            found = f"{kind[0]} {kind[1]}" if kind else "missing"
            return f"the tensor {row.name} is {found} where {row.type} {row.shape} was planned"
        if seal([written.read(row.name)]) != seals[row.source]:
            return f"the tensor {row.name} does not read back as it was written"
        if written.gguf and not _both_decoders_agree(written.gguf, row.name):
            return f"two decoders read the tensor {row.name} differently"
        return None

    with ThreadPoolExecutor(thread_count()) as pool:
        for row, fault in zip(output.rows, pool.map(check, output.rows), strict=True):
            if fault:
                raise VerifyError(fault, where=output.path)
            yield row.name


def _gguf(output: Output, path: Path) -> _Written:
    gguf = reopened(output, path).gguf
    assert gguf is not None
    return _Written({name: (t.type, t.shape) for name, t in gguf.tensors.items()}, gguf.stored, gguf)


def _folder(output: Output, path: Path) -> _Written:
    check_size(output, path)
    for name, text in output.texts.items():
        if (path / name).read_bytes() != text.encode():
            raise VerifyError(f"the file {name} does not read back as it was written", where=output.path)
    try:
        folder = open_folder(path)
    except QuantkitError as e:
        raise VerifyError(f"does not open again ({e})", where=output.path) from e
    return _Written({name: (TYPES[e.type][0], e.shape) for name, e in folder.entries.items()}, folder.stored)


def _both_decoders_agree(gguf: GGUF, name: str) -> bool:
    info = gguf.tensors[name]
    codec, width = lookup(info.type), info.shape[-1]
    rows = gguf.stored(name).reshape(prod(info.shape) // width, -1)
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), -(-SAMPLE // width))).astype(int)]
    ours = in_bytes(info.type, some)(slice(None), np.empty((len(some), width), np.float32)) if native("cpu") else None
    return np.array_equal(_other(codec, some), _by_torch(codec, some) if ours is None else ours)


def _other(codec: Codec, rows: Bytes) -> Floats:
    """Rows as a decoder that is not libggml reads them."""
    try:
        return dequantize(rows, GGMLQuantizationType[codec.name])
    except NotImplementedError:  # gguf-py reads Q1_0 no more than llama.cpp writes it
        return _by_torch(codec, rows)


def _by_torch(codec: Codec, rows: Bytes) -> Floats:
    return decode_torch(codec, torch.from_numpy(rows)).view(len(rows), -1).numpy()
