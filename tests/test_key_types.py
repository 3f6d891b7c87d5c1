"""Whatever a key of a GGUF or of a folder's JSON holds, opening ends in a model or in one of our errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf.constants import GGUFValueType as V
from toy import toy_model, write_family, write_toy

from quantkit.errors import FormatError, QuantkitError
from quantkit.files.gguf import GGUF, Value, read_gguf
from quantkit.files.imatrix import Imatrix, read_imatrix, write_imatrix
from quantkit.model import open_model
from quantkit.plan import make_plan
from quantkit.recipe import Recipe

VALUES = (
    Value(V.UINT32, None, 0),
    Value(V.UINT32, None, 2**32 - 1),
    Value(V.INT32, None, -7),
    Value(V.UINT64, None, 2**64 - 1),
    Value(V.FLOAT32, None, float("nan")),
    Value(V.FLOAT64, None, float("inf")),
    Value(V.BOOL, None, True),
    Value(V.STRING, None, ""),
    Value(V.STRING, None, "{% for %}"),
    Value(V.ARRAY, V.UINT32, np.array([1, 2], np.uint32)),
    Value(V.ARRAY, V.FLOAT32, np.array([np.nan, 1.0], np.float32)),
    Value(V.ARRAY, V.STRING, ["a", "a"]),
    Value(V.ARRAY, V.STRING, []),
)
ABSENT = {f"llama.rope.scaling.{k}" for k in ("type", "factor", "original_context_length", "yarn_ext_factor")} | {
    "llama.expert_count",
    "llama.vocab_size",
    "llama.rope.scale_linear",
    "llama.attention.sliding_window",
    "tokenizer.chat_template",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.add_eos_token",
    "general.name",
    "general.type",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("keys") / "Toy.Q8_0.gguf", toy_model(), T.Q8_0)


def opened(monkeypatch: pytest.MonkeyPatch, source: Path, **changes: Any) -> None:
    """Open the toy with other metadata."""
    read = read_gguf(source)
    changed: GGUF = replace(read, metadata=read.metadata | changes)
    monkeypatch.setattr("quantkit.model.from_gguf.read_gguf", lambda _: changed)
    planned(source)


def planned(source: Path) -> None:
    """All that a conversion makes before it reads a weight."""
    model = open_model(source)
    model.tokenizer().encode("a text")
    make_plan(model, Recipe(to=("fp16", "Q4_0"), calibration=None, eval_text=None), "cpu")


def test_whatever_a_key_holds_is_read_or_refused(monkeypatch, source):
    refused, raised = 0, []
    for key in sorted({*read_gguf(source).metadata, *ABSENT}):
        for value in VALUES:
            try:
                opened(monkeypatch, source, **{key: value})
            except QuantkitError:
                refused += 1
            except Exception as e:
                raised.append(f"{key} = {value.data!r}: {type(e).__name__}: {e}")
    assert not raised and refused > 200, "\n".join(raised)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.block_count", Value(V.UINT32, None, 4_000_000_000), "4000000000 blocks in a model of 30 tensors"),
        ("tokenizer.ggml.tokens", Value(V.UINT32, None, 320), "holds no list of texts"),
        ("tokenizer.ggml.tokens", Value(V.ARRAY, V.STRING, ["a", "b"]), "2 tokens for an embedding of 320 rows"),
        ("tokenizer.ggml.bos_token_id", Value(V.STRING, None, "one"), "bos_token_id: holds no whole number"),
        ("llama.rope.scaling.type", Value(V.ARRAY, V.STRING, ["yarn"]), "holds more than one value"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(monkeypatch, source, key, value, says):
    with pytest.raises(FormatError, match=says):
        opened(monkeypatch, source, **{key: value})


def test_whatever_an_importance_matrix_says_is_read_or_refused(monkeypatch, tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, Imatrix({"a": np.ones((1, 32), np.float32)}, {"a": np.array([4])}, ("text",), 1, 512))
    read, refused = read_gguf(path), 0
    for key in read.metadata:
        for value in VALUES:
            changed = replace(read, metadata=read.metadata | {key: value})
            monkeypatch.setattr("quantkit.files.imatrix.read_gguf", lambda _, changed=changed: changed)
            try:
                assert read_imatrix(path).sums.keys() == {"a"}
            except FormatError:
                refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("file", "absent"),
    [
        ("config.json", ("rope_scaling", "quantization_config", "layer_types", "num_local_experts")),
        ("tokenizer_config.json", ("chat_template", "bos_token", "pad_token")),
    ],
)
def test_whatever_a_folders_json_holds_is_read_or_refused(tmp_path, file, absent):
    write_family(tmp_path, "llama")
    sound, refused, raised = json.loads((tmp_path / file).read_text()), 0, []
    plain = [0, 2**32 - 1, -7, 1.5, float("nan"), True, "odd", [1, {"name": "default", "template": 7}], {"a": 1}]
    for changed in ([], *({**sound, key: value} for key in sorted({*sound, *absent}) for value in plain)):
        (tmp_path / file).write_text(json.dumps(changed))
        try:
            planned(tmp_path)
        except QuantkitError:
            refused += 1
        except Exception as e:
            raised.append(f"{changed}: {type(e).__name__}: {e}")
    assert not raised and refused > 5, "\n".join(raised)
