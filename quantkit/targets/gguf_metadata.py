"""The metadata of a GGUF that is made from an HF folder: general keys, the family's, the tokenizer's, in that order.

Which keys there are and what they hold is what llama.cpp's own converter writes (`conversion/base.py`,
`prepare_metadata` and `set_gguf_parameters`). Left out is what it guesses from a model card or a name.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from gguf import size_label
from gguf.constants import GGUFValueType as T
from gguf.constants import Keys

from quantkit.arch.tokenizer_to_gguf import gguf_tokenizer
from quantkit.files.gguf_values import SCALARS, Value
from quantkit.model import Model

ITEMS = {"float32": T.FLOAT32, "int32": T.INT32}


def metadata_of(model: Model) -> dict[str, Value]:
    """The keys of a model that comes from a folder; Unsupported for what a GGUF cannot say."""
    experts = [r for r in model.tensors.values() if r.placed.expert is not None]
    each = sum(prod(r.shape) for r in experts if r.placed.expert == 0)
    shared = model.parameters - sum(prod(r.shape) for r in experts)
    keys: dict[str, Any] = {
        Keys.General.ARCHITECTURE: model.arch.gguf,
        Keys.General.TYPE: "model",
        Keys.General.NAME: model.name,
        Keys.General.SIZE_LABEL: size_label(model.parameters, shared, each, model.experts),
    }
    keys |= model.arch.config_to_gguf(model.config)
    keys |= gguf_tokenizer(model.files, model.config["vocab_size"])
    return {name: typed(value) for name, value in keys.items()}


def typed(value: Any) -> Value:
    """A plain value with the type that gguf-py gives it; whole numbers are uint32, as every reader expects."""
    if isinstance(value, np.ndarray):
        return Value(T.ARRAY, ITEMS[value.dtype.name], value)
    if isinstance(value, list):
        return Value(T.ARRAY, T.STRING, value)
    return Value(SCALARS[type(value)], None, value)
