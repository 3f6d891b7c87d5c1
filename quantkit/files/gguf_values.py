"""Typed metadata values of GGUF: reading one (`Cursor.value`) next to its inverse, writing one (`pack_value`).

The reader trusts nothing. A length or a count is held against the bytes that are left before anything is allocated, so
a file cannot ask for more memory than a few times its own size. Nested arrays are refused, as llama.cpp refuses them.
Layout of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. In version 1, lengths and counts are
32 bits wide, from version 2 on 64.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from quantkit.errors import FormatError

# GGUF type -> (struct code, numpy code) of a number; BOOL, STRING and ARRAY have rules of their own.
NUMBERS = {
    GGUFValueType.UINT8: ("B", "u1"),
    GGUFValueType.INT8: ("b", "i1"),
    GGUFValueType.UINT16: ("H", "u2"),
    GGUFValueType.INT16: ("h", "i2"),
    GGUFValueType.UINT32: ("I", "u4"),
    GGUFValueType.INT32: ("i", "i4"),
    GGUFValueType.UINT64: ("Q", "u8"),
    GGUFValueType.INT64: ("q", "i8"),
    GGUFValueType.FLOAT32: ("f", "f4"),
    GGUFValueType.FLOAT64: ("d", "f8"),
}
# What a Python value becomes, where a key fixes nothing else.
SCALARS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
MAX_HEADER = 1 << 28  # bytes; the largest header seen (a 262,144-token vocabulary with merges) is under 2^24
MAX_ITEMS = 1 << 24  # of an array; the largest vocabularies and merge lists stay under 2^20
AGAIN = "the file is truncated or damaged: download it again"


@dataclass(frozen=True, eq=False)
class Value:
    """One metadata value: its `type`, for an array the type of its items (else None), and the plain `data`.

    `data` is an int, float, bool or str; an array is a list of str, or a 1-D numpy array of numbers or bools.
    """

    type: GGUFValueType
    item: GGUFValueType | None
    data: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value) or (self.type, self.item) != (other.type, other.item):
            return False
        if isinstance(self.data, np.ndarray) or isinstance(other.data, np.ndarray):
            return np.array_equal(self.data, other.data)
        return self.data == other.data

    __hash__ = None  # type: ignore[assignment]  # it may hold a list or an array


class Cursor:
    """A bounded walk over the header of one file: every read is checked against `end` before it is made."""

    def __init__(
        self, buffer: mmap | bytes, path: str | os.PathLike[str], *, order: str = "<", wide: bool = True
    ) -> None:
        self.buffer, self.path, self.pos = buffer, path, 0
        self.order = order  # struct's sign of the byte order: "<" or ">"
        self.length_code = "Q" if wide else "I"
        self.end = min(len(buffer), MAX_HEADER)

    def error(self, what: str, at: int | None = None, hint: str = AGAIN) -> FormatError:
        """The error to raise for what is wrong at byte `at` (by default: where the walk stands)."""
        return FormatError(what, where=self.path, offset=self.pos if at is None else at, hint=hint)

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` and return where they start."""
        start, left = self.pos, self.end - self.pos
        if nbytes > left:
            if self.end < len(self.buffer):
                raise self.error(
                    f"the header runs past {MAX_HEADER >> 20} MiB in {what}",
                    hint="no model needs that: get it from its publisher",
                )
            raise self.error(f"{what} needs {nbytes:,} bytes but the file has {left:,} left")
        self.pos += nbytes
        return start

    def number(self, code: str, what: str) -> int | float:
        """One number of struct `code`."""
        layout = struct.Struct(self.order + code)
        return layout.unpack_from(self.buffer, self.take(layout.size, what))[0]

    def uint(self, code: str, what: str) -> int:
        """One unsigned integer of struct `code`."""
        return int(self.number(code, what))

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """A count of things that take at least `least_bytes` each: no more than `most`, no more than fit."""
        at, n = self.pos, self.uint(self.length_code, what)
        if n * least_bytes > self.end - self.pos:
            raise self.error(f"{what} is {n:,}, more than fit in the {self.end - self.pos:,} bytes left", at)
        if n > most:
            raise self.error(f"{what} is {n:,}, more than the {most:,} quantkit allows", at)
        return n

    def string(self, what: str) -> str:
        """One string: its length in bytes, then UTF-8."""
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings in a row. The loop is inline because a vocabulary has hundreds of thousands."""
        buffer, pos, end, out = self.buffer, self.pos, self.end, []
        layout = struct.Struct(self.order + self.length_code)
        unpack, width = layout.unpack_from, layout.size
        try:
            for _ in range(count):
                (length,) = unpack(buffer, pos)
                start, pos = pos + width, pos + width + length
                if pos > end:
                    self.pos = start
                    self.take(length, what)
                out.append(buffer[start:pos].decode())
        except struct.error:
            self.pos = pos
            self.take(width, what)
        except UnicodeDecodeError as e:
            hint = "the file is damaged or its converter was: get a newer one"  # in 2023 some wrote tokens as raw bytes
            raise self.error(f"{what} is not UTF-8", start + e.start, hint) from None
        self.pos = pos
        return out

    def value_type(self, what: str) -> GGUFValueType:
        """The 32-bit id of a value's type."""
        at, number = self.pos, self.uint("I", f"the type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.error(f"{what} has type {number}, which GGUF does not define", at) from None

    def value(self, what: str) -> Value:
        """One typed value; the inverse of `pack_value`."""
        kind = self.value_type(what)
        if kind is GGUFValueType.ARRAY:
            at, item = self.pos, self.value_type(f"an item of {what}")
            if item is GGUFValueType.ARRAY:
                raise self.error(f"{what} is an array of arrays, which llama.cpp does not read either", at)
            return Value(kind, item, self.array(item, what))
        if kind is GGUFValueType.STRING:
            return Value(kind, None, self.string(what))
        if kind is GGUFValueType.BOOL:
            at, byte = self.pos, self.uint("B", what)
            if byte > 1:
                raise self.error(f"{what} is a bool of {byte}, not 0 or 1", at)
            return Value(kind, None, byte == 1)
        return Value(kind, None, self.number(NUMBERS[kind][0], what))

    def array(self, item: GGUFValueType, what: str) -> list[str] | np.ndarray:
        """The items of an array: their count, then one after the other."""
        name = f"the item count of {what}"
        if item is GGUFValueType.STRING:
            return self.strings(self.count(name, MAX_ITEMS, struct.calcsize(self.length_code)), what)
        dtype = np.dtype("u1" if item is GGUFValueType.BOOL else NUMBERS[item][1])
        n = self.count(name, MAX_ITEMS, dtype.itemsize)
        start = self.take(n * dtype.itemsize, what)
        stored = np.frombuffer(self.buffer[start : self.pos], np.dtype(self.order + dtype.str[1:]))
        if item is not GGUFValueType.BOOL:
            return stored.astype(dtype)
        if (stored > 1).any():
            raise self.error(f"{what} holds a bool that is not 0 or 1", start + int((stored > 1).argmax()))
        return stored.astype(bool)


def pack_string(text: str) -> bytes:
    """A string as version 3 stores it, little-endian: length in bytes, then UTF-8."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value: Value) -> bytes:
    """A typed value as version 3 stores it, little-endian; the inverse of `Cursor.value`.

    Raises ValueError where `data` does not fit `type` (an int out of range, a str for a number, a nested array).
    """
    if value.type is not GGUFValueType.ARRAY:
        return struct.pack("<I", value.type) + _pack_scalar(value.type, value.data)
    if value.item is None:
        raise ValueError("an array needs the type of its items")
    return struct.pack("<IIQ", value.type, value.item, len(value.data)) + _pack_items(value.item, value.data)


def _pack_scalar(kind: GGUFValueType, data: Any) -> bytes:
    if kind is GGUFValueType.STRING and isinstance(data, str):
        return pack_string(data)
    if kind is GGUFValueType.BOOL and isinstance(data, bool | np.bool_):
        return struct.pack("<?", data)
    if kind not in NUMBERS:
        raise ValueError(f"{type(data).__name__} {data!r} is no {kind.name}")
    try:
        return struct.pack("<" + NUMBERS[kind][0], data)
    except (struct.error, OverflowError):
        raise ValueError(f"{data!r} is no {kind.name}") from None


def _pack_items(item: GGUFValueType, data: Sequence[Any] | np.ndarray) -> bytes:
    if item not in NUMBERS or not isinstance(data, np.ndarray):
        return b"".join(_pack_scalar(item, x) for x in data)
    dtype = np.dtype(NUMBERS[item][1]).newbyteorder("<")
    if not np.can_cast(data.dtype, dtype, "safe"):
        raise ValueError(f"an array of {data.dtype} does not fit items of {item.name}")
    return data.astype(dtype).tobytes()
