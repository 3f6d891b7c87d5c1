"""GGUF files built byte by byte for tests, by the specification and not by quantkit's writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # enum gguf_type
T_F32, T_F16, T_Q4_0, T_Q8_0, T_Q4_K = 0, 1, 2, 8, 12  # enum ggml_type


@dataclass(frozen=True)
class Craft:
    """Pieces of a file in one byte order and version; nothing is checked, so that any lie can be told."""

    order: str = "<"
    version: int = 3

    @property
    def length(self) -> str:
        return "I" if self.version == 1 else "Q"

    def pack(self, codes: str, *numbers: float) -> bytes:
        return struct.pack(self.order + codes, *numbers)

    def string(self, text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return self.pack(self.length, len(raw)) + raw

    def key(self, name: str | bytes, kind: int, payload: bytes) -> bytes:
        return self.string(name) + self.pack("I", kind) + payload

    def array(self, name: str, item: int, count: int, payload: bytes) -> bytes:
        return self.key(name, ARRAY, self.pack("I" + self.length, item, count) + payload)

    def tensor(self, name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
        return self.string(name) + self.pack(f"I{len(dims)}{self.length}IQ", len(dims), *dims, kind, offset)

    def file(
        self,
        keys: Sequence[bytes] = (),
        tensors: Sequence[bytes] = (),
        data: bytes = b"",
        *,
        alignment: int = 32,
        n_keys: int | None = None,
        n_tensors: int | None = None,
    ) -> bytes:
        counts = len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
        head = b"GGUF" + self.pack("I" + 2 * self.length, self.version, *counts) + b"".join([*keys, *tensors])
        return head + bytes(-len(head) % alignment) + data
