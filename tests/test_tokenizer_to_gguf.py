"""The way back to a GGUF: there and back again in llama.cpp's eyes, and tokenizer.json in the forms of the Hub."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from llama_oracle import Oracle
from models import VOCABS, fetch_source
from texts import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from quantkit.arch.pretokenizers import PRE_TOKENIZERS, ROWS, pre_tokenizer
from quantkit.arch.tokenizer import tokenizer_files
from quantkit.arch.tokenizer_to_gguf import gguf_tokenizer
from quantkit.errors import BadInput, Unsupported
from quantkit.files.gguf import read_gguf
from quantkit.files.gguf_values import Value
from quantkit.files.gguf_writer import layout_gguf

SPACE = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def value(data: Any) -> Value:
    """A plain value with the GGUF type it has in tokenizer keys."""
    if isinstance(data, np.ndarray):
        return Value(
            GGUFValueType.ARRAY, GGUFValueType.FLOAT32 if data.dtype == np.float32 else GGUFValueType.INT32, data
        )
    if isinstance(data, list):
        return Value(GGUFValueType.ARRAY, GGUFValueType.STRING, data)
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
    return Value(kinds[type(data)], None, data)


@pytest.mark.parametrize("name", ["smollm2", "llama-spm", "phi-3", "deepseek-coder", "gpt-neox"])
def test_llama_cpp_reads_the_same_vocabulary_again(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if name == "smollm2":
        path = request.getfixturevalue("smollm2")
    else:
        path = next(p for p in fetch_source(VOCABS) if p.stem == f"ggml-vocab-{name}")
    metadata = read_gguf(path).metadata
    keys = gguf_tokenizer(tokenizer_files({key: v.data for key, v in metadata.items()}))
    rest = {key: v for key, v in metadata.items() if not key.startswith("tokenizer.")}
    again = tmp_path / "again.gguf"
    again.write_bytes(layout_gguf(rest | {key: value(data) for key, data in keys.items()}, []).header)
    before, after = Oracle(path, context=False), Oracle(again, context=False)
    for special in (False, True):
        assert [t for t in TEXTS if before.tokenize(t, special=special) != after.tokenize(t, special=special)] == []
    assert before.tokenize("a", add_special=True) == after.tokenize("a", add_special=True)
    before.close()
    after.close()
    assert keys["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"].data
    assert keys.get("tokenizer.chat_template") == getattr(metadata.get("tokenizer.chat_template"), "data", None)


def byte_level(pre: pre_tokenizers.PreTokenizer | None, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ignore_merges=ignore_merges))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    return tokenizer


def sentencepiece(normalizer: Any = None, pre: Any = None, merges: Any = None) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), SPACE, "a", "b", "ab", f"{SPACE}ab"]
    merges = merges or [("a", "b"), (SPACE, "ab")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def keys_of(tokenizer: Tokenizer, **config: str) -> dict[str, Any]:
    found = gguf_tokenizer({"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)})
    return {key.removeprefix("tokenizer.ggml."): data for key, data in found.items()}


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False, "smollm"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            ),
            True,
            "llama-bpe",
        ),
    ],
)
def test_a_cut_is_known_in_the_form_of_its_makers(
    pre: pre_tokenizers.PreTokenizer, ignore_merges: bool, name: str
) -> None:
    found = keys_of(byte_level(pre, ignore_merges))["pre"]
    assert pre_tokenizer(found) == pre_tokenizer(name)


def test_every_row_is_known_again() -> None:
    """By its own cut; rows that share theirs differ only in what other keys say."""
    alike = defaultdict(set)
    for row, names in ROWS:
        tokenizer = json.loads(byte_level(None, row.ignore_merges).to_str())
        tokenizer |= {"pre_tokenizer": row.pre_tokenizer, "normalizer": row.normalizer}
        alike[PRE_TOKENIZERS[gguf_tokenizer({"tokenizer.json": json.dumps(tokenizer)})["tokenizer.ggml.pre"]]].add(
            names[0]
        )
    assert {frozenset(names) for names in alike.values() if len(names) > 1} == {
        frozenset({"llama3", "glm4"}),
        frozenset({"stablelm2", "bailingmoe"}),
    }


@pytest.mark.parametrize(
    ("normalizer", "pre", "prefix"),
    [
        (normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]), None, True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (normalizers.Replace(" ", SPACE), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    ],
)
def test_sentencepiece_is_known_in_all_its_forms(normalizer: Any, pre: Any, prefix: bool) -> None:
    keys = keys_of(sentencepiece(normalizer, pre), bos_token="<s>", unk_token="<unk>")
    assert (keys["model"], keys["add_space_prefix"]) == ("llama", prefix)
    assert keys["token_type"].tolist() == [2, 3, 3, *[6] * 256, *[1] * 5]
    assert keys["scores"][[262, 263]].tolist() == [0, -1]
    assert (keys["bos_token_id"], keys["unknown_token_id"], keys["add_bos_token"]) == (1, 0, False)


def test_gaps_and_the_rows_behind_the_last_token_are_padding() -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"][0]["id"] = 5
    stored["model"]["vocab"]["<tool>"] = 5
    keys = gguf_tokenizer({"tokenizer.json": json.dumps(stored)}, size=7)
    assert keys["tokenizer.ggml.tokens"] == ["a", "b", "ab", "[PAD3]", "[PAD4]", "<tool>", "[PAD6]"]
    assert keys["tokenizer.ggml.token_type"].tolist() == [1, 1, 1, 5, 5, 4, 5]
    with pytest.raises(BadInput, match="6 tokens for an embedding of 4 rows"):
        gguf_tokenizer({"tokenizer.json": json.dumps(stored)}, size=4)


@pytest.mark.parametrize(
    ("tokenizer", "what"),
    [
        (Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "no WordPiece"),
        (byte_level(pre_tokenizers.Whitespace()), "cuts text as"),
        (byte_level(None), "cuts text as"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts text as"),
        (sentencepiece(normalizers.Replace(" ", SPACE), merges=[("a", "b")]), "no scores"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused(tokenizer: Tokenizer, what: str) -> None:
    with pytest.raises(Unsupported, match=what):
        keys_of(tokenizer)


def test_a_byte_level_normalizer_other_than_nfc_is_refused() -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(Unsupported, match="no normalizer Lowercase"):
        keys_of(tokenizer)
