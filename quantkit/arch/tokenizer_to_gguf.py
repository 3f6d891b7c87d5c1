"""The way back: from the tokenizer files of an HF folder to the `tokenizer.ggml.*` keys of a GGUF.

A tokenizer.json can say the same in many forms, so what it does is observed, not how it is written: the cut into words
is recognised by cutting a probe, as in llama.cpp's converter (`get_vocab_base_pre` in `convert_hf_to_gguf.py`), and
sentencepiece's text by what becomes of spaces. What a GGUF cannot say is refused, never bent: an unknown cut, merges
that no scores express, a model other than BPE. Left out is what llama.cpp has no key for: NFC, and added tokens that
strip the space around them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import tokenizers

from quantkit.arch.pretokenizers import ROWS, PreTokenizer
from quantkit.arch.tokenizer import SPACE, Tokenizer, load_tokenizer, named_id
from quantkit.arch.tokenizer_gguf import PREFIX, Kind, merges_from_scores
from quantkit.errors import BadInput, Unsupported

Merges = Sequence[tuple[str, str]]

# Where the rows of the table part: runs of digits in two scripts, contractions in both cases, signs with letters and
# line ends behind them, spaces of all kinds, marks, capitals inside words, ideographs beside kana.
PROBE = (
    "I'm you'Re WE'LL '  \t x\n\n\n y \r\n 1  22   333 4444 55555 x1y22z333 ١٢٣٤ ½²\n"
    "camelCase écoleÉCOLE naïve \u0301e\u0301 हिन्दी 中文かなカナ한글 (a_b)/c.d -x =y !z a.b,c;d?\n\n !!\n /* //\n\r "
    "🙂🙂  `$+<=>^~|`\u3000。、 don't_'s …। a…b\u00a0\u00a0c   \n  "
)


def gguf_tokenizer(files: Mapping[str, str], size: int | None = None) -> dict[str, Any]:
    """The keys for a tokenizer's files, arrays of numbers as numpy's; `size` is the embedding's rows."""
    tokenizer = load_tokenizer(files)
    stored = json.loads(files["tokenizer.json"])
    model = stored["model"]
    if model.get("type") != "BPE":
        raise Unsupported(f"a GGUF holds no {model.get('type')} model of this kind", where="tokenizer.json")
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(left, right) for left, right in pairs]
    tokens, kinds = _tokens(tokenizer, stored, size)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": np.array(kinds, np.int32)}
    prefix = _sentencepiece_prefix(tokenizer.backend) if model.get("byte_fallback") else None
    if prefix is None:
        keys |= {"model": "gpt2", "pre": _cut_name(tokenizer.backend, stored), "merges": [" ".join(m) for m in merges]}
    else:
        normal = [token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.NORMAL]
        keys |= {"model": "llama", "pre": "default", "scores": _scores(tokens, normal, merges)}
        keys |= {"add_space_prefix": prefix}
    keys |= _ends(tokenizer, json.loads(files.get("tokenizer_config.json", "{}")))
    named = {PREFIX + name: value for name, value in keys.items() if value is not None}
    return named if tokenizer.chat_template is None else named | {"tokenizer.chat_template": tokenizer.chat_template}


def _tokens(tokenizer: Tokenizer, stored: Mapping[str, Any], size: int | None) -> tuple[list[str], list[Kind]]:
    """Every id's text and kind, without gaps; a row of the embedding that has no token is padding."""
    by_id = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    count = max(by_id) + 1
    if size is not None and size < count:
        raise BadInput(f"{count} tokens for an embedding of {size} rows", where="tokenizer.json")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size or count)]
    kinds = [Kind.NORMAL if i in by_id else Kind.UNUSED for i in range(len(tokens))]
    if stored["model"].get("byte_fallback"):
        for byte in range(256):
            if (i := tokenizer.backend.token_to_id(f"<0x{byte:02X}>")) is not None:
                kinds[i] = Kind.BYTE
    for added in stored["added_tokens"]:
        kinds[added["id"]] = Kind.CONTROL if added["special"] else Kind.USER_DEFINED
    unknown = stored["model"].get("unk_token")
    if unknown is not None and (i := tokenizer.backend.token_to_id(unknown)) is not None:
        kinds[i] = Kind.UNKNOWN
    return tokens, kinds


def _ends(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that have a key of their own, and which of them the post-processor adds."""
    added, plain = (tokenizer.backend.encode("a", add_special_tokens=flag).ids for flag in (True, False))
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "unknown_token_id": named_id(tokenizer.backend, config, "unk_token"),
        "padding_token_id": named_id(tokenizer.backend, config, "pad_token"),
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.eos is not None and added[-1:] == [tokenizer.eos] != plain[-1:],
    }


def _sentencepiece_prefix(backend: tokenizers.Tokenizer) -> bool | None:
    """Whether a space is put before text, or None where it is not sentencepiece's: one piece, its spaces U+2581."""
    text = "a  b\nc "
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    cut = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, (0, 0))]
    seen, bare = [piece for piece, _ in cut], text.replace(" ", SPACE)
    return True if seen == [SPACE + bare] else False if seen == [bare] else None


def _scores(tokens: Sequence[str], normal: Sequence[str], merges: Merges) -> np.ndarray:
    """Scores that give the merges back: minus the place at which a token is first made; tokens never made come last.

    >>> _scores(["a", "b", "ab", "abb"], ["a", "b", "ab", "abb"], [("a", "b"), ("ab", "b")])
    array([-2., -2.,  0., -1.], dtype=float32)
    """
    place: dict[str, int] = {}
    for left, right in merges:
        place.setdefault(left + right, len(place))
    found = np.array([-place.get(token, len(place)) for token in tokens], np.float32)
    of = dict(zip(tokens, found, strict=True))
    kept = set(normal)
    there = [pair for pair in merges if {*pair, "".join(pair)} <= kept]
    given = merges_from_scores(normal, [of[token] for token in normal])
    if ["".join(pair) for pair in given] != ["".join(pair) for pair in there] or set(given) != set(there):
        raise Unsupported("no scores express these merges", where="tokenizer.json", hint="keep the HF format")
    return found


def _cut_name(backend: tokenizers.Tokenizer, stored: Mapping[str, Any]) -> str:
    """The name of the row that cuts the probe as this tokenizer does; of two, the one with its normalizer."""
    own, normalizer = stored.get("normalizer") or {}, backend.normalizer
    kind = own.get("type") if isinstance(own, dict) else own
    nfc = kind == "NFC"
    if kind not in (None, "NFC") and not (normalizer and normalizer.normalize_str(PROBE) == PROBE):
        raise Unsupported(f"a byte-level GGUF has no normalizer {kind}", where="tokenizer.json")
    whole = bool(stored["model"].get("ignore_merges"))
    pieces = _cut(backend)
    fitting = [(row, names[0]) for row, names in ROWS if row.ignore_merges == whole and _row_cut(row) == pieces]
    if not fitting:
        raise Unsupported("no tokenizer.ggml.pre cuts text as this tokenizer does", where="tokenizer.json")
    return min(fitting, key=lambda each: each[0].nfc != nfc)[1]


def _cut(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    if backend.pre_tokenizer is None:
        return (PROBE,)
    return tuple(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(PROBE))


@cache
def _row_cut(row: PreTokenizer) -> tuple[str, ...]:
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return _cut(tokenizers.Tokenizer.from_str(json.dumps(empty | {"pre_tokenizer": row.pre_tokenizer})))
