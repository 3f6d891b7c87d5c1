"""Writes GGUF (version 3, little-endian): the layout first, as pure arithmetic, then the bytes in any order.

A `Layout` is complete before a single weight is read, so a dry run knows a file's size to the byte and a writer knows
where every tensor goes. Shards are named and keyed as llama.cpp's `llama-gguf-split` does it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)

from quantkit.files.atomic import disk_errors, require_space
from quantkit.files.gguf_header import KEY_NAME, MAX_ALIGNMENT, MAX_DIMS, MAX_NAME_BYTES, TENSOR_NAME
from quantkit.files.gguf_values import Value, pack_string, pack_value
from quantkit.files.raw import put, raw_bytes

__all__ = ["GGUFWriter", "Layout", "Planned", "layout_gguf", "split_layout"]

Planned = tuple[str, tuple[int, ...], str]  # a tensor to come: name, shape in torch order, type such as "Q4_K"

_SPLIT_KEYS = (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
_MAX_SHARDS = 65535  # split.count is a UINT16


@dataclass(frozen=True)
class Layout:
    """Where all goes in one file: the header's bytes, each tensor's absolute offset and size, the file's size."""

    header: bytes
    offsets: dict[str, int]
    sizes: dict[str, int]
    nbytes: int


def layout_gguf(
    metadata: Mapping[str, Value], tensors: Sequence[Planned], alignment: int = GGUF_DEFAULT_ALIGNMENT
) -> Layout:
    """Lay out a file of `metadata` (kept as it is, but for general.alignment) and `tensors` in the order given.

    Raises ValueError for what the format cannot hold: a name twice, too long or with other characters than the reader
    lets through, more than 4 dims, a width that its block does not divide, a value that is not of its type.
    """
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment} is not a power of two up to {MAX_ALIGNMENT}")
    entries, sizes, relative, end = [], {}, {}, 0
    for name, shape, kind in tensors:
        if name in sizes:
            raise ValueError(f"tensor {name} is there twice")
        sizes[name], relative[name] = tensor_nbytes(name, shape, kind), end
        entries.append(_entry(name, shape, kind, end))
        end = _pad(end + sizes[name], alignment)
    pairs = _metadata(metadata, alignment)
    counts = struct.pack("<4sIQQ", b"GGUF", GGUF_VERSION, len(entries), len(pairs))
    header = b"".join([counts, *pairs, *entries])
    header = header.ljust(_pad(len(header), alignment), b"\0")
    return Layout(header, {name: len(header) + at for name, at in relative.items()}, sizes, len(header) + end)


def split_layout(
    metadata: Mapping[str, Value],
    tensors: Sequence[Planned],
    max_bytes: int,
    alignment: int = GGUF_DEFAULT_ALIGNMENT,
) -> list[tuple[str, Layout]]:
    """Lay out files of at most `max_bytes` each, in order: (end of the file's name, layout).

    One file if all fits: [(".gguf", layout)]. Else "-00001-of-0000N.gguf" and so on, the first with all the metadata.
    A shard holds at least one tensor, so a tensor (or a vocabulary) larger than `max_bytes` makes a larger file.
    """
    whole = {key: value for key, value in metadata.items() if key not in _SPLIT_KEYS}
    single = layout_gguf(whole, tensors, alignment)
    if single.nbytes <= max_bytes or len(tensors) < 2:
        return [(".gguf", single)]
    groups = _groups(whole, tensors, max_bytes, alignment)
    if len(groups) > _MAX_SHARDS:
        raise ValueError(f"{len(groups):,} shards of {max_bytes:,} bytes are more than {_MAX_SHARDS:,}")
    shards = []
    for i, group in enumerate(groups):
        keys = (whole if i == 0 else {}) | _split_keys(i, len(groups), len(tensors))
        shards.append((f"-{i + 1:05d}-of-{len(groups):05d}.gguf", layout_gguf(keys, group, alignment)))
    return shards


class GGUFWriter:
    """Streams tensors to their places in one file: `with GGUFWriter(path, layout) as out: out.write(name, raw)`.

    Tensors come in any order and none is kept. The room is checked on entry (Resumable where the disk is too full); a
    tensor still missing on a clean exit is a ValueError. The file at `path` is no good until then: write to a path from
    `atomic.staged`, which also removes it after an error.
    """

    def __init__(self, path: str | os.PathLike[str], layout: Layout) -> None:
        self.path, self.layout = Path(path), layout
        self._missing = set(layout.sizes)
        self._file = -1

    def __enter__(self) -> GGUFWriter:
        require_space(self.path, self.layout.nbytes)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with disk_errors(self.path):
                os.truncate(self._file, self.layout.nbytes)  # the padding between tensors is zeros from here on
                put(self._file, memoryview(self.layout.header), 0)
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        if kind is None and self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise ValueError(f"{self.path}: {len(self._missing)} tensors were not written: {some}")

    def write(self, name: str, raw: Any) -> None:
        """Write one tensor's bytes (a uint8 tensor or array of any shape, or bytes-like): as planned, and once."""
        if name not in self._missing:
            state = "was written already" if name in self.layout.sizes else "is not in the layout"
            raise ValueError(f"{self.path}: tensor {name} {state}")
        if str(getattr(raw, "dtype", "uint8")).removeprefix("torch.") != "uint8":
            raise TypeError(f"tensor {name} is given as {raw.dtype}, not as uint8 bytes")
        data = raw_bytes(raw)
        if data.nbytes != self.layout.sizes[name]:
            raise ValueError(f"{self.path}: tensor {name} takes {self.layout.sizes[name]:,} bytes, not {data.nbytes:,}")
        with disk_errors(self.path):
            put(self._file, data, self.layout.offsets[name])
        self._missing.discard(name)


def tensor_nbytes(name: str, shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of `shape` (torch order) in the type `kind`; ValueError where GGUF cannot hold it so."""
    if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
        raise ValueError(f"tensor {name} has the shape {shape}; GGUF holds 1 to {MAX_DIMS} dims of at least 1")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if shape[-1] % block:
        raise ValueError(f"tensor {name} has rows of {shape[-1]}, which do not divide into {kind} blocks of {block}")
    return prod(shape) // block * block_bytes


def _entry(name: str, shape: tuple[int, ...], kind: str, offset: int) -> bytes:
    """A row of the tensor table; `offset` counts from the start of the data."""
    if not TENSOR_NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES:
        raise ValueError(f"{name!r} is no tensor name: 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ . -")
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return pack_string(name) + dims + struct.pack("<IQ", GGMLQuantizationType[kind], offset)


def _metadata(metadata: Mapping[str, Value], alignment: int) -> list[bytes]:
    """The keys as the file holds them; general.alignment is a fact of this file, there only if not the default."""
    kept = {key: value for key, value in metadata.items() if key != Keys.General.ALIGNMENT}
    if alignment != GGUF_DEFAULT_ALIGNMENT:
        kept[Keys.General.ALIGNMENT] = Value(GGUFValueType.UINT32, None, alignment)
    pairs = []
    for key, value in kept.items():
        if not KEY_NAME.fullmatch(key):
            raise ValueError(f"{key!r} is no metadata key: plain ASCII without spaces")
        try:
            pairs.append(pack_string(key) + pack_value(value))
        except ValueError as e:
            raise ValueError(f"key {key}: {e}") from None
    return pairs


def _groups(
    metadata: Mapping[str, Value], tensors: Sequence[Planned], max_bytes: int, alignment: int
) -> list[list[Planned]]:
    """Consecutive runs of tensors, each filling a file of `max_bytes` as far as it goes."""
    header = len(layout_gguf(dict(metadata) | _split_keys(0, 1, len(tensors)), [], alignment).header)
    later = len(layout_gguf(_split_keys(0, 1, len(tensors)), [], alignment).header)
    groups: list[list[Planned]] = [[]]
    data = 0
    for name, shape, kind in tensors:
        entry = len(_entry(name, shape, kind, 0))
        size = _pad(tensor_nbytes(name, shape, kind), alignment)
        if groups[-1] and _pad(header + entry, alignment) + data + size > max_bytes:
            groups.append([])
            header, data = later, 0
        groups[-1].append((name, shape, kind))
        header, data = header + entry, data + size
    return groups


def _split_keys(index: int, count: int, tensors: int) -> dict[str, Value]:
    no, of, total = _SPLIT_KEYS
    return {
        no: Value(GGUFValueType.UINT16, None, index),
        of: Value(GGUFValueType.UINT16, None, count),
        total: Value(GGUFValueType.INT32, None, tensors),
    }


def _pad(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
