"""The header of one GGUF file: counts, metadata, tensor table - parsed once and held against every rule of the format.

    "GGUF" | version | tensors | keys | keys of (name, typed value) | tensors of (name, dims, type, offset) | pad | data

gguf-py reads the same through one numpy view per number, which takes 19 s for a vocabulary of 262,144; this walk takes
a fraction of a second. A tensor name may become part of other names later, so only harmless characters are let through.
The rules are llama.cpp's (`ggml/src/gguf.cpp`), plus caps that no real model comes near.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys

from quantkit.errors import FormatError
from quantkit.files.gguf_values import AGAIN, Cursor, Value

MAX_TENSORS = 1 << 17  # DeepSeek-V3 with one tensor an expert would have 46,000
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's limit
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its final zero
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_DIM = 1 << 32
MAX_ALIGNMENT = 1 << 20
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", re.ASCII)
KEY_NAME = re.compile(r"[!-~]+")

# What people hand over in place of a GGUF: first bytes, what it is, what to do.
STRANGERS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run `git lfs pull`, or download the file"),
    (b"<", "a web page, not a model", "download the file itself, not the page about it"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint, not a GGUF", "unpack it, or point at its folder"),
    (b"lmgg", "a GGML file from before GGUF", "find a GGUF of the same model"),
    (b"fmgg", "a GGMF file from before GGUF", "find a GGUF of the same model"),
    (b"tjgg", "a GGJT file from before GGUF", "find a GGUF of the same model"),
)


@dataclass(frozen=True)
class TensorInfo:
    """A row of the tensor table: `shape` is torch's (rows first, GGUF's dims reversed), `offset` is in its shard."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    offset: int
    shard: int = 0


@dataclass(frozen=True)
class Header:
    """What the header of one file says; `order` is "<" or ">"."""

    version: int
    order: str
    alignment: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def parse_header(buffer: mmap | bytes, path: str | os.PathLike[str]) -> Header:
    """The header of the whole file mapped in `buffer`. Raises FormatError at the first rule broken."""
    version, order = _version(bytes(buffer[:32]), path)
    cursor = Cursor(buffer, path, order=order, wide=version > 1)
    cursor.pos = 8
    width = 8 if version > 1 else 4
    # The least a tensor takes: a name of one byte, a count of dims, one dim, a type, an offset.
    n_tensors = cursor.count("the tensor count", MAX_TENSORS, width + 1 + 4 + width + 4 + 8)
    # The least a key takes: a name of one byte, a type, a value of one byte.
    n_keys = cursor.count("the key count", MAX_KEYS, width + 1 + 4 + 1)
    metadata = _metadata(cursor, n_keys)
    alignment = metadata[Keys.General.ALIGNMENT].data if Keys.General.ALIGNMENT in metadata else GGUF_DEFAULT_ALIGNMENT
    rows = list(_table(cursor, n_tensors))
    tensors = _place(rows, -(-cursor.pos // alignment) * alignment, alignment, cursor)
    return Header(version, order, alignment, metadata, tensors)


def _version(head: bytes, path: str | os.PathLike[str]) -> tuple[int, str]:
    """The version and the byte order, which shows in it: 3 is 03 00 00 00 or 00 00 00 03."""
    if head[:4] != b"GGUF":
        for start, what, hint in STRANGERS:
            if head.startswith(start):
                raise FormatError(f"this is {what}", where=path, offset=0, hint=hint)
        raise FormatError(f"not a GGUF: it starts with {head[:4]!r}", where=path, offset=0, hint="give a .gguf file")
    if len(head) < 8:
        raise FormatError("the file ends inside its header", where=path, offset=len(head), hint=AGAIN)
    little, big = int.from_bytes(head[4:8], "little"), int.from_bytes(head[4:8], "big")
    version, order = (little, "<") if little <= big else (big, ">")
    if version not in (1, 2, 3):
        hint = AGAIN if version == 0 or version > 99 else "update quantkit"
        raise FormatError(f"GGUF version {version} is not one of 1, 2, 3", where=path, offset=4, hint=hint)
    return version, order


def _metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for i in range(count):
        at, key = cursor.pos, cursor.string(f"the name of key {i}")
        if len(key) > MAX_KEY_BYTES or not KEY_NAME.fullmatch(key):
            raise cursor.error(f"the name of key {i}, {key[:64]!r}, is not plain ASCII of 1 to 65,535 bytes", at)
        if key in metadata:
            raise cursor.error(f"key {key[:80]} is there twice", at)
        metadata[key] = value = cursor.value(f"key {key[:80]}")
        if key == Keys.General.ALIGNMENT:
            _check_alignment(cursor, value, at)
    return metadata


def _check_alignment(cursor: Cursor, value: Value, at: int) -> None:
    if value.type is not GGUFValueType.UINT32:
        raise cursor.error(f"{Keys.General.ALIGNMENT} is of type {value.type.name}, not UINT32", at)
    if not 0 < value.data <= MAX_ALIGNMENT or value.data & (value.data - 1):
        what = f"{Keys.General.ALIGNMENT} is {value.data:,}, not a power of two up to {MAX_ALIGNMENT:,}"
        raise cursor.error(what, at)


@dataclass(frozen=True)
class _Row:
    """A row of the table as it stands: `at` is where it starts, `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    nbytes: int
    offset: int
    at: int


def _table(cursor: Cursor, count: int) -> Iterator[_Row]:
    for i in range(count):
        at, name = cursor.pos, cursor.string(f"the name of tensor {i}")
        if len(name) > MAX_NAME_BYTES or not TENSOR_NAME.fullmatch(name):
            what = f"the name of tensor {i}, {name[:64]!r}, is not 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ . -"
            raise cursor.error(what, at, "ask its publisher for a file with plain names")
        n_dims = cursor.uint("I", f"the dims of tensor {name}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise cursor.error(f"tensor {name} has {n_dims:,} dims, not 1 to {MAX_DIMS}", at)
        dims = [cursor.uint(cursor.length_code, f"the dims of tensor {name}") for _ in range(n_dims)]
        if not all(1 <= dim <= MAX_DIM for dim in dims):
            raise cursor.error(f"tensor {name} has the shape {dims[::-1]}, and a dim must be 1 to 2^32", at)
        number = cursor.uint("I", f"the type of tensor {name}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            what = f"tensor {name} has type {number}, which quantkit does not know"
            raise cursor.error(what, at, "update the gguf package, or ask for the file in a current type") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if dims[0] % block:
            raise cursor.error(f"tensor {name} has rows of {dims[0]:,}, not a multiple of {kind.name}'s {block}", at)
        nbytes = block_bytes * (dims[0] // block)
        for dim in dims[1:]:
            nbytes *= dim
        offset = cursor.uint("Q", f"the offset of tensor {name}")
        yield _Row(name, tuple(reversed(dims)), kind, nbytes, offset, at)


def _place(rows: list[_Row], start: int, alignment: int, cursor: Cursor) -> dict[str, TensorInfo]:
    """The rows laid end to end from byte `start`, padded to `alignment`: no overlap, no hole, all inside the file."""
    tensors: dict[str, TensorInfo] = {}
    expected, size = 0, len(cursor.buffer)
    for row in rows:
        if row.name in tensors:
            raise cursor.error(f"tensor {row.name} is there twice", row.at)
        if row.offset != expected:
            what = (
                f"tensor {row.name} starts at {row.offset:,} of the data, not where the one before ends, {expected:,}"
            )
            raise cursor.error(what, row.at)
        end = start + row.offset + row.nbytes
        if end > size:
            what = f"the data of tensor {row.name} ends at byte {end:,}, but the file has {size:,}"
            raise cursor.error(what, row.at)
        tensors[row.name] = TensorInfo(row.name, row.shape, row.type.name, row.nbytes, start + row.offset)
        expected = -(-(row.offset + row.nbytes) // alignment) * alignment
    return tensors
