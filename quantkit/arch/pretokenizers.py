"""How a byte-level BPE cuts text into words before it merges: one row for every `tokenizer.ggml.pre`.

The merges of a byte-level vocabulary were learned inside words, so the wrong cut gives other ids without any error; an
unknown name is therefore refused. The expressions are those of llama.cpp (`llm_tokenizer_bpe` in `src/llama-vocab.cpp`,
names in `llama_vocab::impl::load`). Several expressions apply one after the other, each inside the pieces the earlier
ones left; what an expression does not match stays as pieces of its own. Cases of contractions are spelled out
(`'[sS]`) because `(?i:'s)` would also match U+017F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.errors import Unsupported


@dataclass(frozen=True)
class PreTokenizer:
    """`regexes` cut the text; `ignore_merges`: a word that is a token is taken whole; `add_bos` where no key says."""

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def as_json(self) -> dict[str, Any]:
        """The `pre_tokenizer` of tokenizer.json: the cuts, then bytes written as printable characters."""
        cuts = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in self.regexes
        ]
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*cuts, to_bytes]}


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"

_gpt2 = PreTokenizer((GPT2,))
_digits = PreTokenizer((r"\p{N}", GPT2))
_llama3 = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_qwen2 = PreTokenizer((QWEN2,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _gpt2,
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "command-r": _digits,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "qwen2": _qwen2,
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The row of `tokenizer.ggml.pre`, or `Unsupported` with the names that are known."""
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise Unsupported(f"unknown pre-tokenizer {name!r}", where="tokenizer.ggml.pre", hint=f"known are {known}")
    return PRE_TOKENIZERS[name]
