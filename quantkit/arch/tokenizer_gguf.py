"""The `tokenizer.ggml.*` keys of a GGUF, checked and completed, as one frozen `Vocabulary`.

The defaults for absent keys, the kinds corrected by a token's text and the meaning of every key are llama.cpp's
(`llama_vocab::impl::load` in `src/llama-vocab.cpp`): what that program reads is what a GGUF means. Left out are the
vocabularies of encoder models (`bert`, `t5`) and of recurrent ones (`rwkv`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from quantkit.arch.pretokenizers import PreTokenizer, pre_tokenizer
from quantkit.errors import BadInput, Unsupported

PREFIX = "tokenizer.ggml."
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"


class Kind(IntEnum):
    """`tokenizer.ggml.token_type` (enum llama_token_type in `include/llama.h`)."""

    UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)


# Texts that llama.cpp takes for control tokens whatever the file calls them, by their use: end of a turn or a text,
# and the parts of fill-in-the-middle.
# fmt: off
CONTROL_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "[EOS]", "</s>", "<|eom_id|>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "[e~[", "<eos>", "<turn|>", "<|tool_response>",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))
# fmt: on


@dataclass(frozen=True)
class Vocabulary:
    """Everything a GGUF says about its tokenizer; ids index `tokens`, `kinds` and `scores`."""

    model: str
    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    pre: PreTokenizer | None
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strips_right: bool
    chat_template: str | None
    context_length: int | None


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that `metadata` describes; `BadInput` names the key that is missing or contradicts another."""
    model = str(_required(metadata, PREFIX + "model"))
    if model not in (SENTENCEPIECE, BYTE_LEVEL):
        raise Unsupported(
            f"unknown tokenizer model {model!r}",
            where=PREFIX + "model",
            hint=f"known are {BYTE_LEVEL}, {SENTENCEPIECE}",
        )
    sentencepiece = model == SENTENCEPIECE
    tokens = _tokens(metadata)
    pre = None if sentencepiece else pre_tokenizer(str(metadata.get(PREFIX + "pre", "default")))
    vocabulary = Vocabulary(
        model=model,
        tokens=tokens,
        kinds=_kinds(metadata, tokens),
        scores=_array(metadata, "scores", len(tokens), float) if sentencepiece else (),
        merges=() if sentencepiece else _merges(metadata, frozenset(tokens)),
        pre=pre,
        bos=_id(metadata, "bos_token_id", len(tokens), 1 if sentencepiece else None),
        eos=_id(metadata, "eos_token_id", len(tokens), 2 if sentencepiece else None),
        unknown=_id(metadata, "unknown_token_id", len(tokens), 0 if sentencepiece else None),
        padding=_id(metadata, "padding_token_id", len(tokens), None),
        add_bos=bool(metadata.get(PREFIX + "add_bos_token", sentencepiece or bool(pre and pre.add_bos))),
        add_eos=bool(metadata.get(PREFIX + "add_eos_token", False)),
        add_space_prefix=sentencepiece and bool(metadata.get(PREFIX + "add_space_prefix", True)),
        strips_right=_is_phi3(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        context_length=_context_length(metadata),
    )
    for flag, value, key in (("add_bos", vocabulary.bos, "bos_token_id"), ("add_eos", vocabulary.eos, "eos_token_id")):
        if getattr(vocabulary, flag) and value is None:
            raise BadInput(f"missing, and {PREFIX}{flag}_token asks for it", where=PREFIX + key)
    return vocabulary


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise BadInput("the file has no such key", where=key, hint="it carries no usable tokenizer")
    return metadata[key]


def _tokens(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    raw = _required(metadata, PREFIX + "tokens")
    tokens = tuple(str(token) or f"[EMPTY_{i}]" for i, token in enumerate(raw))  # llama.cpp's name for an empty one
    if len(set(tokens)) != len(tokens):
        first = next(token for i, token in enumerate(tokens) if tokens.index(token) != i)
        raise BadInput(f"token {first!r} stands there more than once", where=PREFIX + "tokens")
    return tokens


def _array(metadata: Mapping[str, Any], name: str, length: int, kind: type) -> tuple[Any, ...]:
    raw = _required(metadata, PREFIX + name)
    if len(raw) != length:
        raise BadInput(f"{len(raw)} entries for {length} tokens", where=PREFIX + name)
    return tuple(map(kind, raw))


def _kinds(metadata: Mapping[str, Any], tokens: tuple[str, ...]) -> tuple[Kind, ...]:
    """Every token's kind, with those that only look like text made control tokens."""
    if PREFIX + "token_type" not in metadata:
        raw: tuple[int, ...] = (Kind.NORMAL,) * len(tokens)
    else:
        raw = _array(metadata, "token_type", len(tokens), int)
    known = frozenset(Kind)
    return tuple(
        Kind.CONTROL if text in CONTROL_TEXTS else Kind(kind) if kind in known else Kind.UNDEFINED
        for text, kind in zip(tokens, raw, strict=True)
    )


def _merges(metadata: Mapping[str, Any], tokens: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """The pairs in the order of their rank; the first of a repeated pair counts."""
    key = PREFIX + "merges"
    pairs = {}
    for text in _required(metadata, key):
        left, space, right = text[0:1], *text[1:].partition(" ")[1:]
        left += text[1:].partition(" ")[0]
        if not (space and left in tokens and right in tokens and left + right in tokens):
            raise BadInput(f"merge {text!r} is not made of tokens", where=key)
        pairs[left, right] = None
    return tuple(pairs)


def _id(metadata: Mapping[str, Any], name: str, size: int, default: int | None) -> int | None:
    raw = metadata.get(PREFIX + name)
    if raw is None:
        return default if default is not None and default < size else None
    if not 0 <= int(raw) < size:
        raise BadInput(f"{int(raw)} is no id of a vocabulary of {size} tokens", where=PREFIX + name)
    return int(raw)


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    """Phi-3's special tokens swallow the white space after them; GGUF has no key for it, llama.cpp goes by the name."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _context_length(metadata: Mapping[str, Any]) -> int | None:
    value = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return None if value is None else int(value)
