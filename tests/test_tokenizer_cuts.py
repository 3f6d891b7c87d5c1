"""Every row of the pre-tokenizers against llama.cpp, which takes any cut with any vocabulary: only the name changes."""

from __future__ import annotations

import json
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llama_oracle import Oracle
from models import VOCABS, fetch_source
from texts import TEXTS

from quantkit.arch.pretokenizers import PRE_TOKENIZERS, ROWS, pre_tokenizer
from quantkit.arch.tokenizer import load_tokenizer, tokenizer_files
from quantkit.errors import Unsupported
from quantkit.files.gguf import read_gguf

EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
KEY = b"tokenizer.ggml.pre"
APPROXIMATED = {"tekken", "gpt-4o"}  # llama.cpp's own expression differs from the model's


@pytest.fixture(scope="module")
def vocabulary() -> tuple[Path, dict[str, Any]]:
    """32,256 tokens with merges in Chinese and in code, so that most cuts show."""
    path = next(p for p in fetch_source(VOCABS) if "deepseek-coder" in p.name)
    return path, {key: value.data for key, value in read_gguf(path).metadata.items()}


def with_name(gguf: bytes, name: str) -> bytes:
    """The same file with another `tokenizer.ggml.pre`: after the key its type (uint32), then length and text."""
    at = gguf.index(struct.pack("<Q", len(KEY)) + KEY) + 8 + len(KEY) + 4
    (length,) = struct.unpack_from("<Q", gguf, at)
    return gguf[:at] + struct.pack("<Q", len(name)) + name.encode() + gguf[at + 8 + length :]


def comparable(name: str, text: str) -> bool:
    """Whether llama.cpp reads the text as the model's own tokenizer does.

    Its approximations fail on marks and on letters beyond ASCII, and it does not compose characters.
    """
    if name in APPROXIMATED:
        return not any(ord(c) > 127 and unicodedata.category(c)[0] in "LM" for c in text)
    return not pre_tokenizer(name).nfc or unicodedata.is_normalized("NFC", text)


@pytest.mark.parametrize("name", [names[0] for _, names in ROWS])
def test_the_cut_is_llama_cpps(name: str, vocabulary: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, metadata = vocabulary
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(with_name(path.read_bytes(), name))
    tokenizer = load_tokenizer(tokenizer_files(metadata | {"tokenizer.ggml.pre": name}))
    oracle = Oracle(renamed, context=False)
    texts = [t for t in TEXTS if comparable(name, t)]
    wrong = [t for t in texts if tokenizer.encode(t) != oracle.tokenize(t)]
    oracle.close()
    assert wrong == []
    assert len(texts) > 200


def test_case_is_seen_beyond_ascii() -> None:
    """Tekken cuts before a capital and never before a mark; llama.cpp's approximation does neither."""
    cased = ("écoleÉCOLE", "हिन्दी में")
    cut = tokenizers.Tokenizer.from_str(json.dumps(EMPTY | {"pre_tokenizer": pre_tokenizer("tekken").pre_tokenizer}))
    pieces = [[text[a:b] for _, (a, b) in cut.pre_tokenizer.pre_tokenize_str(text)] for text in cased]
    assert pieces == [["école", "ÉCOLE"], ["हिन्दी", " में"]]


def test_no_name_stands_in_two_rows() -> None:
    assert len(PRE_TOKENIZERS) == sum(len(names) for _, names in ROWS)


def test_an_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"tokenizer\.ggml\.pre: .*'klingon'.*llama-bpe.*qwen2"):
        pre_tokenizer("klingon")
