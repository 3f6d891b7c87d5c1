"""Tokenizers: from the metadata of a GGUF to the files of an HF folder, and from those files to token ids.

`tokenizer_files` writes what `transformers.AutoTokenizer` opens without quantkit; `load_tokenizer` reads the same
texts, so a GGUF and an HF folder go one way from here on. The ids are those llama.cpp gives for the GGUF, but for the
two cases of `pretokenizers.py` in which the model's own tokenizer gives others.

Every vocabulary is expressed as BPE with ranked merges; what differs is the text that the merges see:

- `gpt2` is byte-level: `tokenizer.ggml.pre` names the cut into words (`pretokenizers.py`), bytes stand as letters.
- `llama` and `gemma4` are sentencepiece: no cut, a space is U+2581, and a character without a token becomes its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from quantkit.arch.pretokenizers import PreTokenizer
from quantkit.arch.tokenizer_gguf import Kind, Vocabulary, read_vocabulary
from quantkit.errors import BadInput

SPACE = "\u2581"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as calibration and scoring need it; `add_bos` is what its post-processor really does."""

    backend: tokenizers.Tokenizer
    bos: int | None
    eos: int | None
    add_bos: bool
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: nothing is added, and `<s>` in it is three characters (llama-perplexity's reading)."""
        return self._ids(text, special=False)

    def encode_special(self, text: str) -> list[int]:
        """The ids of a rendered chat template: special tokens written in the text are those tokens."""
        return self._ids(text, special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def _ids(self, text: str, special: bool) -> list[int]:
        self.backend.encode_special_tokens = not special  # the library's switch is per tokenizer, not per call
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids  # without offsets


def load_tokenizer(files: Mapping[str, str]) -> Tokenizer:
    """The tokenizer whose files (name -> text) are `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""
    if "tokenizer.json" not in files:
        raise BadInput("the model has no such file", where="tokenizer.json", hint="save it with a fast tokenizer first")
    try:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    except BaseException as error:  # the library raises bare Exception, and where its Rust panics not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"not a tokenizer: {error}", where="tokenizer.json", hint="get it again") from error
    try:
        config = json.loads(files.get("tokenizer_config.json", "{}"))
    except ValueError as error:
        raise BadInput(f"not JSON: {error}", where="tokenizer_config.json") from error
    if not isinstance(config, dict):
        raise BadInput("not a JSON object", where="tokenizer_config.json", hint="get it again")
    backend.no_truncation()  # some folders carry the settings of a training run
    backend.no_padding()
    added, plain = (backend.encode("a", add_special_tokens=flag).ids for flag in (True, False))
    add_bos = added[:1] != plain[:1]
    return Tokenizer(
        backend=backend,
        bos=added[0] if add_bos else named_id(backend, config, "bos_token"),
        eos=named_id(backend, config, "eos_token"),
        add_bos=add_bos,
        chat_template=files.get("chat_template.jinja") or _template(config),
    )


def named_id(backend: tokenizers.Tokenizer, config: Mapping[str, Any], name: str) -> int | None:
    """The id of `bos_token` and its like, given as a text or as the record of an added token."""
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _template(config: Mapping[str, Any]) -> str | None:
    """The chat template kept in tokenizer_config.json: one text, or the one named `default` of several."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next((each.get("template") for each in named), None)
    if template is not None and not isinstance(template, str):
        raise BadInput("chat_template is no text", where="tokenizer_config.json", hint="mend that value")
    return template


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The HF tokenizer files, by name, of the GGUF whose metadata is given."""
    vocabulary = read_vocabulary(metadata)
    files = {
        "tokenizer.json": json.dumps(_tokenizer_json(vocabulary), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_config_json(vocabulary), ensure_ascii=False, indent=2) + "\n",
    }
    if vocabulary.chat_template is not None:
        files["chat_template.jinja"] = vocabulary.chat_template
    return files


def _tokenizer_json(v: Vocabulary) -> dict[str, Any]:
    text = _sentencepiece(v) if v.pre is None else _byte_level(v.pre)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(v),
        "normalizer": text["normalizer"],
        "pre_tokenizer": text["pre_tokenizer"],
        "post_processor": _post_processor(v),
        "decoder": text["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(v.tokens)},
            "merges": v.merges,
        }
        | text["model"],
    }


def _byte_level(pre: PreTokenizer) -> dict[str, Any]:
    return {
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"ignore_merges": pre.ignore_merges},
    }


def _sentencepiece(v: Vocabulary) -> dict[str, Any]:
    """Normalizer and decoder are each other's inverse: the prefix and U+2581 put on, and taken off."""
    prepend = [{"type": "Prepend", "prepend": SPACE}] if v.add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if v.add_space_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "unk_token": None if v.unknown is None else v.tokens[v.unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _added_tokens(v: Vocabulary) -> list[dict[str, Any]]:
    """Tokens found in the text before anything else; `special` ones only where special tokens are parsed."""
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": v.strips_right and token not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": kind in (Kind.CONTROL, Kind.UNKNOWN),
        }
        for i, (token, kind) in enumerate(zip(v.tokens, v.kinds, strict=True))
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ]


def _post_processor(v: Vocabulary) -> dict[str, Any] | None:
    """BOS before every sequence and EOS after it, where the vocabulary asks for them."""
    before = [v.bos] if v.add_bos and v.bos is not None else []
    after = [v.eos] if v.add_eos and v.eos is not None else []
    if not before and not after:
        return None

    def sequence(name: str, segment: int) -> list[dict[str, Any]]:
        special = [{"SpecialToken": {"id": v.tokens[i], "type_id": segment}} for i in (*before, *after)]
        middle = {"Sequence": {"id": name, "type_id": segment}}
        return [*special[: len(before)], middle, *special[len(before) :]]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {
            v.tokens[i]: {"id": v.tokens[i], "ids": [i], "tokens": [v.tokens[i]]} for i in (*before, *after)
        },
    }


def _config_json(v: Vocabulary) -> dict[str, Any]:
    """What transformers keeps beside tokenizer.json.

    The class is the plain one on purpose: the named ones (`LlamaTokenizer`, ...) rebuild normalizer and pre-tokenizer
    from their own code and so lose the cut that this file needs.
    """
    named = {"bos_token": v.bos, "eos_token": v.eos, "unk_token": v.unknown, "pad_token": v.padding}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: v.tokens[i] for name, i in named.items() if i is not None}
    config |= {"add_bos_token": v.add_bos, "add_eos_token": v.add_eos, "clean_up_tokenization_spaces": False}
    if v.context_length is not None:
        config["model_max_length"] = v.context_length
    return config
