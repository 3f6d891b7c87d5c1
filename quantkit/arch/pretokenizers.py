r"""How a byte-level BPE cuts text into words before it merges: one row for every `tokenizer.ggml.pre`.

The merges of a byte-level vocabulary were learned inside words, so the wrong cut gives other ids without any error; an
unknown name is therefore refused. Several expressions apply one after the other, each inside the pieces the earlier
ones left; what an expression does not match stays as pieces of its own. Cases of contractions are spelled out
(`'[sS]`) because `(?i:'s)` would also match U+017F.

Names and expressions are those of llama.cpp (`llama_vocab::impl::load`, `llm_tokenizer_bpe` in `src/llama-vocab.cpp`),
except where llama.cpp is known to fall short of the tokenizer that a model was trained with:

- It has no normalizer. The `nfc` rows compose characters first, as these models' tokenizers do (transformers,
  `tokenization_qwen2.py`, `tokenization_cohere.py`, `tokenization_gpt_neox.py`).
- Its regex engine knows neither `\p{Lu}` nor `\p{Ll}`. The rows of `cased` are the models' own expressions (`tekken`:
  mistral-common, `data/tekken_240911.json`), which llama.cpp quotes in comments beside its approximations.

Left out are encoders and embedding models, and `kimi-k2`, which has no merges.
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
    nfc: bool = False

    @property
    def normalizer(self) -> dict[str, Any] | None:
        """The `normalizer` of tokenizer.json."""
        return {"type": "NFC"} if self.nfc else None

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """The `pre_tokenizer` of tokenizer.json: the cuts, then bytes written as printable characters."""
        cuts = [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in self.regexes
        ]
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*cuts, to_bytes]}


CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+"
SPACES = r"\s+(?!\S)|\s+"
LINES_SPACES = r"\s*[\r\n]+|" + SPACES

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{SIGNS}[\r\n]*|{LINES_SPACES}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{SIGNS}[\r\n]*|{LINES_SPACES}"

CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SMALLS = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def cased(tail: str, number: str) -> str:
    """Words that also end where small letters meet a capital; `tail` may follow a word."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{CAPITALS}*{SMALLS}+{tail}|{lead}{CAPITALS}+{SMALLS}*{tail}"
    return rf"{words}|{number}|{SIGNS}[\r\n/]*|{LINES_SPACES}"


SIGN_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
MARKED_WORD = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
CJK = r"[一-龥ࠀ-一가-퟿]+"
HAN_KANA = r"[一-龥぀-ゟ゠-ヿ]+"
LATIN_GREEK_CYRILLIC = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    "ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)

_gpt2 = PreTokenizer((GPT2,))
_digits = PreTokenizer((r"\p{N}", GPT2))
_bloom = r" ?[^(\s|.,!?…。，、।۔،)]+"
_deepseek3 = (r"\p{N}{1,3}", HAN_KANA, rf"{SIGN_WORD}|{MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES_SPACES}")

ROWS: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (_gpt2, ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion", "granite-docling")),
    (PreTokenizer((GPT2,), nfc=True), ("mpt", "olmo")),
    (_digits, ("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2")),
    (PreTokenizer((r"\p{N}", GPT2), nfc=True), ("command-r",)),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), ("default",)),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")), ("falcon",)),
    (
        PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    (PreTokenizer((LLAMA3,), ignore_merges=True), ("glm4", "glm5")),
    (PreTokenizer((LLAMA3,)), ("dbrx", "smaug-bpe", "chatglm-bpe")),
    (PreTokenizer((QWEN2,), nfc=True), ("qwen2", "deepseek-r1-qwen")),
    (PreTokenizer((QWEN2,)), ("stablelm2", "megrez", "kormo", "hunyuan", "solar-open", "grok-2")),
    (
        PreTokenizer(
            (
                rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES_SPACES}",
            ),
            nfc=True,
        ),
        ("qwen35",),
    ),
    (PreTokenizer((cased("", r"\p{N}"),), ignore_merges=True, add_bos=True), ("tekken",)),
    (PreTokenizer((cased(f"{CONTRACTION}?", r"\p{N}{1,3}"),)), ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    (
        PreTokenizer(
            ("[\r\n]", rf"\s?[{LATIN_GREEK_CYRILLIC}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}+")
        ),
        ("deepseek-llm",),
    ),
    (PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")), ("deepseek-coder",)),
    (PreTokenizer(_deepseek3), ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    (
        PreTokenizer((r"\p{N}{1,3}", rf"{CONTRACTION}|{WORD}|\p{{N}}+|{SIGNS}[\r\n]*|{LINES_SPACES}"), True),
        ("minicpm5",),
    ),
    (
        PreTokenizer(
            (rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{WORD}|\p{{N}}|{SIGNS}[\r\n]*|\s*[\r\n]|{SPACES}",)
        ),
        ("bailingmoe", "bailingmoe2", "llada-moe"),
    ),
    (PreTokenizer((rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES_SPACES}",)), ("seed-coder",)),
    (PreTokenizer((_bloom,)), ("bloom", "poro-chat", "gpt3-finnish")),
    (PreTokenizer((_bloom, r"\p{N}")), ("viking",)),
)
PRE_TOKENIZERS = {name: row for row, names in ROWS for name in names}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The row of `tokenizer.ggml.pre`, or `Unsupported` with the names that are known."""
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise Unsupported(f"unknown pre-tokenizer {name!r}", where="tokenizer.ggml.pre", hint=f"known are {known}")
    return PRE_TOKENIZERS[name]
