"""What the keys of a GGUF and the files of a folder mean to a tokenizer, on vocabularies of a few tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from quantkit.arch.tokenizer import load_tokenizer, tokenizer_files
from quantkit.arch.tokenizer_gguf import merges_from_scores
from quantkit.errors import BadInput, Unsupported

G = "tokenizer.ggml."
SPACE = "\u2581"
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{b:02X}>" for b in range(256)),
    SPACE,
    "a",
    "b",
    "ab",
    f"{SPACE}a",
    f"{SPACE}ab",
]
SENTENCEPIECE = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    G + "model": "llama",
    G + "tokens": PIECES,
    G + "scores": np.array([0.0] * 259 + [-9, -9, -9, -1, -2, -3], np.float32),
    G + "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 6, np.int32),
}
BYTE_LEVEL = {
    "general.architecture": "qwen2",
    G + "model": "gpt2",
    G + "pre": "gpt-2",
    G + "tokens": ["a", "b", "Ġ", "ab", "Ġab", "<|end|>", "<tool>", "[PAD7]"],
    G + "merges": ["a b", "Ġ ab"],
    G + "token_type": [1, 1, 1, 1, 1, 3, 4, 5],
    G + "eos_token_id": 5,
}


def load(metadata: dict[str, Any]) -> Any:
    return load_tokenizer(tokenizer_files(metadata))


def ids(metadata: dict[str, Any], text: str) -> list[int]:
    """With BOS and EOS where the vocabulary adds them."""
    return load(metadata).backend.encode(text, add_special_tokens=True).ids


def test_a_sentencepiece_vocabulary_adds_bos_unless_told_otherwise() -> None:
    assert ids(SENTENCEPIECE, "ab") == [1, PIECES.index(f"{SPACE}ab")]
    assert load(SENTENCEPIECE).add_bos
    without = SENTENCEPIECE | {G + "add_bos_token": False}
    assert ids(without, "ab") == [PIECES.index(f"{SPACE}ab")]
    assert not load(without).add_bos


def test_eos_is_added_where_the_key_says_so() -> None:
    both = SENTENCEPIECE | {G + "add_eos_token": True}
    assert ids(both, "ab") == [1, PIECES.index(f"{SPACE}ab"), 2]
    assert ids(both | {G + "add_bos_token": False}, "ab") == [PIECES.index(f"{SPACE}ab"), 2]
    pair = load(both).backend.encode("a", "b").ids
    assert [i for i in pair if i in (1, 2)] == [1, 2, 1, 2]


def test_a_byte_level_vocabulary_adds_nothing_but_where_its_cut_is_llama_3s() -> None:
    assert ids(BYTE_LEVEL, "ab ab") == [3, 4]
    llama3 = BYTE_LEVEL | {G + "pre": "llama-bpe", G + "bos_token_id": 5}
    assert ids(llama3, "ab") == [5, 3]
    assert load(llama3).add_bos and load(llama3).bos == 5


def test_the_space_before_a_text_can_be_left_off() -> None:
    assert load(SENTENCEPIECE).encode("ab") == [PIECES.index(f"{SPACE}ab")]
    bare = load(SENTENCEPIECE | {G + "add_space_prefix": False})
    assert bare.encode("ab") == [PIECES.index("ab")]
    assert bare.decode(bare.encode(" ab")) == " ab"


def test_a_character_without_a_token_becomes_its_bytes() -> None:
    tokenizer = load(SENTENCEPIECE)
    assert tokenizer.encode("aé") == [PIECES.index(f"{SPACE}a"), 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("aé")) == "aé"


def test_gemma_4_lists_the_merges_of_a_sentencepiece_text() -> None:
    listed = {k: v for k, v in SENTENCEPIECE.items() if k != G + "scores"}
    tokenizer = load(listed | {G + "model": "gemma4", G + "merges": ["a b"], G + "bos_token_id": 1})
    assert tokenizer.encode("ab ab") == [PIECES.index(piece) for piece in ("ab", SPACE, "ab")]
    assert tokenizer.add_bos


def test_special_tokens_are_parsed_only_when_asked_for_and_user_defined_ones_always() -> None:
    tokenizer = load(BYTE_LEVEL)
    assert tokenizer.encode_special("ab<|end|>") == [3, 5]
    assert 5 not in tokenizer.encode("ab<|end|>")
    assert tokenizer.encode("a<tool>b") == tokenizer.encode_special("a<tool>b") == [0, 6, 1]
    added = json.loads(tokenizer_files(BYTE_LEVEL)["tokenizer.json"])["added_tokens"]
    assert [(t["id"], t["special"], t["normalized"]) for t in added] == [(5, True, False), (6, False, False)]


def test_a_control_token_is_known_by_its_text() -> None:
    mistyped = BYTE_LEVEL | {G + "token_type": [1] * 8}
    assert load(mistyped).encode_special("ab<|end|>") == [3, 5]


def test_a_token_without_text_keeps_its_id() -> None:
    assert load(BYTE_LEVEL | {G + "tokens": ["", *BYTE_LEVEL[G + "tokens"][1:]], G + "merges": []}).encode("b") == [1]


def test_a_template_is_written_only_where_the_file_has_one() -> None:
    assert "chat_template.jinja" not in tokenizer_files(BYTE_LEVEL)
    assert tokenizer_files(BYTE_LEVEL | {"tokenizer.chat_template": "{{ x }}\n"})["chat_template.jinja"] == "{{ x }}\n"


def test_the_configuration_names_the_tokens_and_the_context() -> None:
    config = json.loads(tokenizer_files(SENTENCEPIECE | {G + "padding_token_id": 2**32 - 1})["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert config["model_max_length"] == 4096
    assert "pad_token" not in config


@pytest.mark.parametrize(
    ("base", "change", "key", "what"),
    [
        (SENTENCEPIECE, {"model": None}, "model", "no such key"),
        (SENTENCEPIECE, {"tokens": None}, "tokens", "no such key"),
        (SENTENCEPIECE, {"tokens": []}, "tokens", "empty"),
        (SENTENCEPIECE, {"tokens": [*PIECES[:-1], "a"]}, "tokens", "'a' stands there 2 times"),
        (SENTENCEPIECE, {"scores": None}, "scores", "no such key"),
        (SENTENCEPIECE, {"scores": [0.0]}, "scores", "1 entries for 265 tokens"),
        (SENTENCEPIECE, {"token_type": [1, 2]}, "token_type", "2 entries for 265 tokens"),
        (SENTENCEPIECE, {"bos_token_id": 265}, "bos_token_id", "265 is no id in a vocabulary of 265 tokens"),
        (BYTE_LEVEL, {"eos_token_id": 8}, "eos_token_id", "8 is no id"),
        (BYTE_LEVEL, {"unknown_token_id": -1}, "unknown_token_id", "-1 is no id"),
        (BYTE_LEVEL, {"padding_token_id": 999}, "padding_token_id", "999 is no id"),
        (BYTE_LEVEL, {"merges": None}, "merges", "no such key"),
        (BYTE_LEVEL, {"merges": ["ab"]}, "merges", "'ab' is not made of tokens"),
        (BYTE_LEVEL, {"merges": ["b a"]}, "merges", "'b a' is not made of tokens"),
        (BYTE_LEVEL, {"add_bos_token": True}, "add_bos_token", "does not say which token"),
        (BYTE_LEVEL, {"eos_token_id": None, "add_eos_token": True}, "add_eos_token", "does not say which token"),
    ],
)
def test_what_contradicts_itself_is_refused_by_its_key(
    base: dict[str, Any], change: dict[str, Any], key: str, what: str
) -> None:
    metadata = {k: v for k, v in (base | {G + k: v for k, v in change.items()}).items() if v is not None}
    with pytest.raises(BadInput, match=what) as error:
        tokenizer_files(metadata)
    assert error.value.where == G + key


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"tokenizer\.ggml\.model: .*'bert'.*gpt2, llama"):
        tokenizer_files(SENTENCEPIECE | {G + "model": "bert"})


def test_merges_are_all_pairs_that_make_a_token_best_score_first() -> None:
    tokens, scores = ["a", "b", "ab", "ba", "aba", "x"], [-9, -9, -2, -1, -3, -9]
    closed_form = [
        (left, right)
        for whole in ("ba", "ab", "aba")
        for left in sorted(tokens, key=len)
        for right in tokens
        if left + right == whole
    ]
    assert merges_from_scores(tokens, scores) == closed_form


def test_merges_of_a_large_vocabulary_take_time_in_its_letters() -> None:
    """A quarter of a million tokens: pairs of tokens tried one by one would be 6e10."""
    letters = [chr(0x4E00 + i) for i in range(512)]
    tokens = letters + [a + b for a in letters for b in letters]
    merges = merges_from_scores(tokens, range(0, -len(tokens), -1))
    assert len(merges) == 512**2 and merges[0] == (letters[0], letters[0])


def test_the_files_of_a_folder_are_read_as_they_are() -> None:
    files = tokenizer_files(SENTENCEPIECE)
    config = json.loads(files["tokenizer_config.json"])
    config["bos_token"] = {"content": "<s>", "special": True}
    config["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    del config["eos_token"]
    tokenizer = load_tokenizer({"tokenizer.json": files["tokenizer.json"], "tokenizer_config.json": json.dumps(config)})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos, tokenizer.chat_template) == (1, None, True, "d")
    bare = load_tokenizer({"tokenizer.json": files["tokenizer.json"]})
    assert (bare.bos, bare.eos, bare.add_bos, bare.chat_template) == (1, None, True, None)


def test_truncation_and_padding_of_a_folder_are_left_behind() -> None:
    stored = json.loads(tokenizer_files(SENTENCEPIECE)["tokenizer.json"])
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
    stored["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    text = "a b a b a b"
    assert load_tokenizer({"tokenizer.json": json.dumps(stored)}).encode(text) == load(SENTENCEPIECE).encode(text)


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{"}, {"tokenizer.json": "{}"}])
def test_a_folder_without_a_fast_tokenizer_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        load_tokenizer(files)


def test_a_broken_configuration_is_refused_by_its_name() -> None:
    files = tokenizer_files(SENTENCEPIECE) | {"tokenizer_config.json": "{"}
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(files)


@pytest.mark.parametrize("prefix", ["##", "a prefix that is longer than any token"])
def test_a_tokenizer_that_the_library_cannot_bear_is_refused(prefix: str) -> None:
    """Of the second its Rust panics, which Python sees as no Exception."""
    files = tokenizer_files(BYTE_LEVEL)
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["model"]["continuing_subword_prefix"] = prefix
    with pytest.raises(BadInput, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(files | {"tokenizer.json": json.dumps(tokenizer)})
