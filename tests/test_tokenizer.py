"""Tokenizers against llama.cpp, sentencepiece and transformers: the same ids on every text."""

from __future__ import annotations

import functools
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from llama_oracle import Oracle
from models import VOCABS, fetch_source
from texts import DECOMPOSED, TEXTS
from transformers import AutoTokenizer

from quantkit.arch.pretokenizers import PRE_TOKENIZERS
from quantkit.arch.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from quantkit.files.gguf import read_gguf

NAMES = [
    "smollm2",
    "gemma3",
    *("llama-spm", "phi-3", "baichuan"),
    *("gpt-2", "llama-bpe", "qwen2", "deepseek-coder", "starcoder", "gpt-neox"),
]


@dataclass(frozen=True)
class Case:
    """One GGUF: what it says, what is made of it, and llama.cpp's reading."""

    name: str
    metadata: dict[str, Any]
    files: dict[str, str]
    tokenizer: Tokenizer
    oracle: Oracle

    def known_to_llama(self, text: str) -> str:
        """The text as llama.cpp must be given it, which has no normalizer."""
        row = PRE_TOKENIZERS.get(self.metadata.get("tokenizer.ggml.pre", "default"))
        return unicodedata.normalize("NFC", text) if row and row.nfc else text

    def differences(self, special: bool, texts: list[str] = TEXTS) -> list[str]:
        encode = self.tokenizer.encode_special if special else self.tokenizer.encode
        return [t for t in texts if encode(t) != self.oracle.tokenize(self.known_to_llama(t), special=special)]


@pytest.fixture(scope="session")
def vocabs() -> dict[str, Path]:
    """llama.cpp's own vocabulary-only GGUF files, by name."""
    return {path.stem.removeprefix("ggml-vocab-"): path for path in fetch_source(VOCABS)}


@dataclass(frozen=True)
class Built:
    """A GGUF's path, its metadata, and the files made of it."""

    path: Path
    metadata: dict[str, Any]
    files: dict[str, str]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Callable[[str], Built]:
    @functools.cache
    def build(name: str) -> Built:
        real = name in ("smollm2", "gemma3")
        path = request.getfixturevalue(name) if real else request.getfixturevalue("vocabs")[name]
        metadata = {key: value.data for key, value in read_gguf(path).metadata.items()}
        return Built(path, metadata, tokenizer_files(metadata))

    return build


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, built: Callable[[str], Built]) -> Iterator[Case]:
    made = built(request.param)
    oracle = Oracle(made.path, context=False)
    yield Case(request.param, made.metadata, made.files, load_tokenizer(made.files), oracle)
    oracle.close()


def test_plain_text_has_the_ids_of_llama_cpp(case: Case) -> None:
    assert case.differences(special=False) == []


def test_qwens_texts_are_composed_as_its_own_tokenizer_composes_them(built: Callable[[str], Built]) -> None:
    """The difference from llama.cpp that stays (docs/verification.md): it has no normalizer, the model's has one."""
    made = built("qwen2")
    ours, oracle = load_tokenizer(made.files), Oracle(made.path, context=False)
    differ = [t for t in TEXTS if ours.encode(t) != oracle.tokenize(t)]
    oracle.close()
    assert differ == [
        *("a\u0301", "e\u0301\u0302\u0303", "e\u0301" * 15),
        *(t for t in DECOMPOSED if "\u0995" not in t),  # Bengali stays as it is under NFC
        "a\u0301b",
    ]
    stored = json.loads(made.files["tokenizer.json"])["model"]
    own = transformers.Qwen2Tokenizer(vocab=stored["vocab"], merges=[tuple(m) for m in stored["merges"]])
    assert [own(t)["input_ids"] for t in differ] == [ours.encode(t) for t in differ]


def test_text_with_special_tokens_has_the_ids_of_llama_cpp(case: Case) -> None:
    assert case.differences(special=True) == []


def test_bos_is_added_where_llama_cpp_adds_it(case: Case) -> None:
    backend = case.tokenizer.backend
    for text in ("Hello", "a b"):
        assert backend.encode(text, add_special_tokens=True).ids == case.oracle.tokenize(text, add_special=True)
    bos = case.metadata["tokenizer.ggml.bos_token_id"]
    assert case.tokenizer.bos == bos
    assert case.tokenizer.add_bos == (case.oracle.tokenize("a", add_special=True)[0] == bos)


def test_every_id_keeps_its_token(case: Case) -> None:
    tokens = case.metadata["tokenizer.ggml.tokens"]
    vocabulary = case.tokenizer.backend.get_vocab(with_added_tokens=True)
    assert vocabulary == {token: i for i, token in enumerate(tokens)}


def test_decoding_gives_the_text_back(case: Case) -> None:
    """All but control characters, for which some vocabularies have no token, and U+2581, which stands for a space."""
    decode, encode = case.tokenizer.decode, case.tokenizer.encode
    lost = [chr(c) for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\r\n"] + ["\u2581"]
    if case.name == "deepseek-coder":  # its added tokens are letters of the byte-level alphabet, and decode as bytes
        lost += [t for t in case.metadata["tokenizer.ggml.tokens"][32000:] if len(t) == 1]
    texts = [t for t in TEXTS if not any(c in t for c in lost)]
    assert [t for t in texts if decode(encode(t)) != case.known_to_llama(t)] == []


def test_the_chat_template_is_the_files(case: Case) -> None:
    template = case.metadata.get("tokenizer.chat_template")
    assert case.files.get("chat_template.jinja") == template == case.tokenizer.chat_template
    assert "chat_template" not in json.loads(case.files["tokenizer_config.json"])


@pytest.mark.parametrize("name", ["llama-spm", "smollm2"])
def test_a_long_text_is_one_text(name: str, built: Callable[[str], Built]) -> None:
    """Without a cut into words half a megabyte is one word; its ids are still llama.cpp's, and in seconds."""
    tokenizer, oracle = load_tokenizer(built(name).files), Oracle(built(name).path, context=False)
    text = "".join(TEXTS) * 25
    assert tokenizer.encode(text) == oracle.tokenize(text)
    oracle.close()


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("smollm2", "llama"),
        ("llama-spm", "llama"),
        ("llama-spm", "mistral"),
        ("phi-3", "phi3"),
        ("qwen2", "qwen2"),
        ("starcoder", None),
    ],
)
def test_transformers_opens_the_folder(
    name: str, model_type: str | None, built: Callable[[str], Built], tmp_path: Path
) -> None:
    metadata, files = built(name).metadata, dict(built(name).files)
    if model_type:
        files["config.json"] = json.dumps({"model_type": model_type, "transformers_version": transformers.__version__})
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(files)
    start = [ours.bos] if ours.add_bos else []
    assert [t for t in TEXTS if theirs(t)["input_ids"] != start + ours.encode_special(t)] == []
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    assert theirs.chat_template == ours.chat_template
    assert theirs.pad_token_id == metadata.get("tokenizer.ggml.padding_token_id")
    assert theirs.model_max_length == metadata[f"{metadata['general.architecture']}.context_length"]


def test_a_rendered_chat_template_parses_into_its_special_tokens(built: Callable[[str], Built]) -> None:
    tokenizer = load_tokenizer(built("smollm2").files)
    ids = tokenizer.encode_special("<|im_start|>user\nHi<|im_end|>\n")
    assert ids[0] == tokenizer.bos and tokenizer.eos in ids
    assert tokenizer.bos not in tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_itself_gives_the_same_ids(prefix: bool) -> None:
    """A vocabulary trained here, with byte fallback; the library that defines the format is the oracle."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line.strip()] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=["<tool>", "[IMG]"],
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(theirs.get_piece_size())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in pieces],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in pieces],
        "tokenizer.ggml.token_type": [kind(theirs, i) for i in pieces],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    ours = load_tokenizer(tokenizer_files(metadata))
    texts = (
        [*TEXTS, "an [IMG] and a <tool>"] if not prefix else TEXTS
    )  # a prefix follows user symbols in llama.cpp only
    assert [t for t in texts if ours.encode(t) != theirs.encode(t)] == []


def kind(model: sentencepiece.SentencePieceProcessor, i: int) -> int:
    """`tokenizer.ggml.token_type` of a piece, as llama.cpp's converter sets it."""
    user = model.id_to_piece(i) in ("<tool>", "[IMG]")
    return next(
        number
        for number, applies in (
            (2, model.is_unknown(i)),
            (3, model.is_control(i)),
            (6, model.is_byte(i)),
            (4, user),
            (1, True),
        )
        if applies
    )
