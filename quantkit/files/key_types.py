"""The types of the metadata values that are read as they stand in a GGUF, held against the file before any is used.

The specification (ggml `docs/gguf.md`) fixes them; a damaged or hostile file may hold anything. Numbers under an
architecture's own name are checked where they are read (`Architecture.config_from_gguf`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantkit.errors import FormatError
from quantkit.files.gguf_values import Value

TYPES = {
    "general.type": str,
    "general.architecture": str,
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.bos_token_id": int,
    "tokenizer.ggml.eos_token_id": int,
    "tokenizer.ggml.unknown_token_id": int,
    "tokenizer.ggml.padding_token_id": int,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
    "imatrix.chunk_count": int,
    "imatrix.chunk_size": int,
}
ITEMS = {
    "tokenizer.ggml.tokens": str,
    "tokenizer.ggml.merges": str,
    "tokenizer.ggml.token_type": int,
    "tokenizer.ggml.scores": float,
    "imatrix.datasets": str,
}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
NUMPY = {int: "iu", float: "f"}  # the kinds of an array's items


def require_types(metadata: Mapping[str, Value]) -> None:
    """FormatError for the first value, or list of values, of another type than its key has."""
    for key, kind in TYPES.items():
        if key in metadata and type(metadata[key].data) is not kind:
            raise FormatError(f"holds no {WORDS[kind]}", where=key, hint="the file is damaged; get it again")
    for key, kind in ITEMS.items():
        if key in metadata and not _all(kind, metadata[key].data):
            raise FormatError(f"holds no list of {WORDS[kind]}s", where=key, hint="the file is damaged; get it again")


def _all(kind: type, values: Any) -> bool:
    """Whether an array holds values of this type."""
    if isinstance(values, np.ndarray):
        return values.dtype.kind in NUMPY.get(kind, "")
    return isinstance(values, list) and kind is str
