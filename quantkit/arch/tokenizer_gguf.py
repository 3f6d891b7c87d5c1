"""The `tokenizer.ggml.*` keys of a GGUF, checked and completed, as one frozen `Vocabulary`.

Which models there are, the defaults for absent keys and the kinds corrected by a token's text are llama.cpp's
(`llama_vocab::impl::load` in `src/llama-vocab.cpp`): what that program reads is what a GGUF means. Left out are the
vocabularies of encoders (`bert`, `t5`) and of recurrent models (`rwkv`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from quantkit.arch.pretokenizers import PreTokenizer, pre_tokenizer
from quantkit.errors import BadInput, Unsupported

PREFIX = "tokenizer.ggml."
NO_TOKEN = 2**32 - 1  # -1 in the uint32 that an id is stored as


class Kind(IntEnum):
    """`tokenizer.ggml.token_type` (enum llama_token_type in `include/llama.h`)."""

    UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)


@dataclass(frozen=True)
class Model:
    """What `tokenizer.ggml.model` says of a vocabulary, and what holds where its other keys are absent."""

    cuts_words: bool
    lists_merges: bool
    add_bos: bool
    add_space_prefix: bool
    bos: int | None = None
    eos: int | None = None
    unknown: int | None = None


MODELS = {
    "gpt2": Model(cuts_words=True, lists_merges=True, add_bos=False, add_space_prefix=False),
    "llama": Model(cuts_words=False, lists_merges=False, add_bos=True, add_space_prefix=True, bos=1, eos=2, unknown=0),
    "gemma4": Model(cuts_words=False, lists_merges=True, add_bos=True, add_space_prefix=False),
}

# Texts of control tokens, whatever kind the file gives them: end of a turn or a text, parts of fill-in-the-middle.
# fmt: off
CONTROL_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "[EOS]", "</s>", "<|eom_id|>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "[e~[", "<eos>", "<turn|>", "<|tool_response>",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
    "<|prefix|>", "<|suffix|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))
# fmt: on


@dataclass(frozen=True)
class Vocabulary:
    """Everything a GGUF says about its tokenizer; ids index `tokens` and `kinds`, and `merges` stand by rank.

    Without `pre` the text is sentencepiece's: not cut into words, a space is U+2581, what has no token becomes bytes.
    """

    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
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
    name = str(_required(metadata, "model"))
    if name not in MODELS:
        hint = f"known are {', '.join(sorted(MODELS))}"
        raise Unsupported(f"unknown tokenizer model {name!r}", where=PREFIX + "model", hint=hint)
    model = MODELS[name]
    pre = pre_tokenizer(str(metadata.get(PREFIX + "pre", "default"))) if model.cuts_words else None
    tokens = _tokens(metadata)
    bos = _id(metadata, "bos_token_id", len(tokens), model.bos)
    eos = _id(metadata, "eos_token_id", len(tokens), model.eos)
    add_bos = model.add_bos or (pre is not None and pre.add_bos)
    return Vocabulary(
        tokens=tokens,
        kinds=_kinds(metadata, tokens),
        merges=_listed(metadata, frozenset(tokens)) if model.lists_merges else _scored(metadata, tokens),
        pre=pre,
        bos=bos,
        eos=eos,
        unknown=_id(metadata, "unknown_token_id", len(tokens), model.unknown),
        padding=_id(metadata, "padding_token_id", len(tokens), None),
        add_bos=_adds(metadata, "bos", bos, add_bos),
        add_eos=_adds(metadata, "eos", eos, False),
        add_space_prefix=not model.cuts_words
        and bool(metadata.get(PREFIX + "add_space_prefix", model.add_space_prefix)),
        strips_right=_is_phi3(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        context_length=_context_length(metadata),
    )


def merges_from_scores(tokens: Sequence[str], scores: Iterable[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best score first: linear in the letters of the vocabulary.

    Of equal scores (the runs of spaces of Llama) sentencepiece merges the leftmost pair, and so goes on lengthening the
    piece it has just made. Ranks know no place in the text, but the longer token first comes to the same.

    >>> merges_from_scores(["a", "b", "ab", "abb"], [-3, -4, -1, -2])
    [('a', 'b'), ('ab', 'b')]
    """
    known = frozenset(tokens)
    ranked = sorted(zip(tokens, scores, strict=True), key=lambda pair: (-pair[1], -len(pair[0])))
    return [
        (token[:cut], token[cut:])
        for token, _ in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    if PREFIX + name not in metadata:
        raise BadInput(
            "the file has no such key", where=PREFIX + name, hint="convert the model again, tokenizer included"
        )
    return metadata[PREFIX + name]


def _tokens(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    # llama.cpp's name for a token without text; every token must have a text of its own
    tokens = tuple(str(token) or f"[EMPTY_{i}]" for i, token in enumerate(_required(metadata, "tokens")))
    text, count = Counter(tokens).most_common(1)[0] if tokens else ("", 0)
    if count != 1:
        raise BadInput(f"token {text!r} stands there {count} times" if tokens else "empty", where=PREFIX + "tokens")
    return tokens


def _one_each(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> Any:
    raw = _required(metadata, name)
    if len(raw) != len(tokens):
        raise BadInput(f"{len(raw)} entries for {len(tokens)} tokens", where=PREFIX + name)
    return raw


def _kinds(metadata: Mapping[str, Any], tokens: tuple[str, ...]) -> tuple[Kind, ...]:
    """Every token's kind; tokens that only call themselves text are made control tokens."""
    given = PREFIX + "token_type" in metadata
    raw = _one_each(metadata, "token_type", tokens) if given else (Kind.NORMAL,) * len(tokens)
    control = CONTROL_TEXTS - {"</s>"} if "<|tool_response>" in tokens else CONTROL_TEXTS  # plain text in Gemma 4
    kinds = {int(kind): kind for kind in Kind}
    return tuple(
        Kind.CONTROL if text in control else kinds.get(int(kind), Kind.UNDEFINED)
        for text, kind in zip(tokens, raw, strict=True)
    )


def _scored(metadata: Mapping[str, Any], tokens: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(merges_from_scores(tokens, map(float, _one_each(metadata, "scores", tokens))))


def _listed(metadata: Mapping[str, Any], tokens: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """The merges as pairs; the first of a repeated pair counts."""
    pairs: dict[tuple[str, str], None] = {}
    for text in map(str, _required(metadata, "merges")):
        cut = text.find(" ", 1)  # a piece that begins with a space is still whole
        left, right = text[:cut], text[cut + 1 :]
        if cut < 0 or left not in tokens or right not in tokens or left + right not in tokens:
            raise BadInput(f"merge {text!r} is not made of tokens", where=PREFIX + "merges")
        pairs[left, right] = None
    return tuple(pairs)


def _id(metadata: Mapping[str, Any], name: str, size: int, default: int | None) -> int | None:
    value = metadata.get(PREFIX + name, default)
    if value is None or int(value) == NO_TOKEN:
        return None
    if not 0 <= int(value) < size:
        raise BadInput(f"{int(value)} is no id in a vocabulary of {size} tokens", where=PREFIX + name)
    return int(value)


def _adds(metadata: Mapping[str, Any], which: str, token: int | None, default: bool) -> bool:
    key = f"{PREFIX}add_{which}_token"
    adds = bool(metadata.get(key, default))
    if adds and token is None:
        raise BadInput("it is to be added to every text, and the file does not say which token it is", where=key)
    return adds


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    """Phi-3's special tokens swallow the white space after them; GGUF has no key for it, llama.cpp goes by the name."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _context_length(metadata: Mapping[str, Any]) -> int | None:
    value = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return None if value is None else int(value)
