"""llama.cpp's mixtures: which type each tensor of a `Q4_K_M` file gets, as a table of rules.

Source: llama.cpp `src/llama-quant.cpp`, `llama_tensor_get_type_impl` and `tensor_type_fallback` (dense models and 8
experts; FORMATS of October 2026). A rule maps a `Place` to a type, or to None where the mixture's base type stays.
Layers are counted in file order, as llama.cpp counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gguf.constants import LlamaFileType

from quantkit.codecs import lookup


@dataclass(frozen=True)
class Shape:
    """What the rules ask of a model: heads per KV head, experts, whether it is llama's 70B, whether tied."""

    gqa: int
    experts: int = 0
    is_70b: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Place:
    """One tensor among those of its kind: the i-th of n, in a model of some shape, with an imatrix or without."""

    i: int
    n: int
    shape: Shape
    imatrix: bool

    @property
    def more(self) -> bool:
        """llama.cpp's `use_more_bits`: the first and last eighth, and every third in between."""
        return self.i < self.n // 8 or self.i >= 7 * self.n // 8 or (self.i - self.n // 8) % 3 == 2

    @property
    def gqa4(self) -> bool:
        """Four or more heads share a KV head: attn_v is small, and bits spent on it are cheap."""
        return self.shape.gqa >= 4


Rule = Callable[[Place], str | None]


def always(kind: str) -> Rule:
    """`kind` everywhere."""
    return lambda p: kind


def more(kind: str) -> Rule:
    """`kind` where llama.cpp spends more bits."""
    return lambda p: kind if p.more else None


def gqa4(kind: str, otherwise: str | None = None) -> Rule:
    """`kind` under grouped-query attention of 4 and more."""
    return lambda p: kind if p.gqa4 else otherwise


def first(count: int, kind: str, rest: str | None = None) -> Rule:
    """`kind` for the first `count` tensors."""
    return lambda p: kind if p.i < count else rest


def early(share: int, kind: str, rest: str | None = None) -> Rule:
    """`kind` for the first n/share tensors."""
    return lambda p: kind if p.i < p.n // share else rest


def middle(kind: str) -> Rule:
    """`kind` but for the first and last eighth."""
    return lambda p: kind if p.n // 8 <= p.i < 7 * p.n // 8 else None


def blind(rule: Rule) -> Rule:
    """`rule` where there is no importance matrix."""
    return lambda p: None if p.imatrix else rule(p)


def seen(rule: Rule) -> Rule:
    """`rule` where there is an importance matrix."""
    return lambda p: rule(p) if p.imatrix else None


@dataclass(frozen=True)
class Mixture:
    """A file type: the type most tensors get, and the rules for the others by kind of tensor."""

    base: str
    rules: Mapping[str, Rule] = field(default_factory=dict)
    embedding: str | None = None  # token_embd where it is not tied
    output: str | None = None  # output, or the tied token_embd, in place of Q6_K
    needs_imatrix: bool = False
    experts8_output: str | None = None  # attn_output with 8 experts


def _low(base: str, low: str, attn_output: str | None) -> Mixture:
    """The IQ1 and IQ2 mixtures; `low` is the type of what must not sink to the base type."""
    rules: dict[str, Rule] = {
        "attn_v": lambda p: "Q4_K" if p.gqa4 or p.shape.experts >= 4 else low,
        "attn_k": lambda p: "Q4_K" if p.shape.experts == 8 else None,
        "ffn_down": early(8, low),
    }
    if attn_output:
        rules["attn_output"] = always(attn_output)
    return Mixture(base, rules, embedding=low, output="Q5_K", needs_imatrix=True, experts8_output="Q5_K")


def _iq3_xxs_v(p: Place) -> str:
    return "Q4_K" if p.gqa4 else "IQ3_XXS" if p.imatrix else "IQ3_S"


_XS = {k: always("IQ3_XXS") for k in ("attn_q", "attn_k")} | {k: middle("IQ3_XXS") for k in ("ffn_gate", "ffn_up")}
_XXS = {
    "attn_v": _iq3_xxs_v,
    "attn_q": always("IQ2_S"),
    "attn_k": always("IQ2_S"),
    "ffn_down": blind(early(8, "Q4_K", "Q3_K")),
    "attn_output": always("IQ3_S"),
}
_IQ4: dict[str, Rule] = {"attn_v": gqa4("Q5_K"), "ffn_down": blind(early(8, "Q5_K"))}


def _iq3_m_down(p: Place) -> str | None:
    return "Q4_K" if p.i < p.n // 8 or (p.shape.experts == 8 and p.more) else None


MIXTURES: Mapping[str, Mixture] = MappingProxyType(
    {
        "F32": Mixture("F32"),
        "F16": Mixture("F16"),
        "BF16": Mixture("BF16"),
        "Q4_0": Mixture("Q4_0", {"ffn_down": seen(early(8, "Q4_1"))}),
        "Q4_1": Mixture("Q4_1"),
        "Q5_0": Mixture("Q5_0", {"ffn_down": seen(early(8, "Q5_1"))}),
        "Q5_1": Mixture("Q5_1"),
        "Q8_0": Mixture("Q8_0"),
        "Q2_K": Mixture(
            "Q2_K",
            {"attn_v": gqa4("Q4_K", "Q3_K"), "ffn_down": always("Q3_K"), "attn_output": always("Q3_K")},
            experts8_output="Q5_K",
        ),
        "Q2_K_S": Mixture("Q2_K", {"attn_v": gqa4("Q4_K"), "ffn_down": early(8, "Q4_K")}, needs_imatrix=True),
        "Q3_K_S": Mixture("Q3_K", experts8_output="Q5_K"),
        "Q3_K_M": Mixture(
            "Q3_K",
            {
                "attn_v": first(2, "Q5_K", "Q4_K"),
                "ffn_down": early(16, "Q5_K", "Q4_K"),
                "attn_output": always("Q4_K"),
            },
            experts8_output="Q5_K",
        ),
        "Q3_K_L": Mixture("Q3_K", {k: always("Q5_K") for k in ("attn_v", "ffn_down", "attn_output")}),
        "Q4_K_S": Mixture("Q4_K", {"attn_v": first(4, "Q5_K"), "ffn_down": early(8, "Q5_K")}, experts8_output="Q5_K"),
        "Q4_K_M": Mixture("Q4_K", {k: more("Q6_K") for k in ("attn_v", "ffn_down")}, experts8_output="Q5_K"),
        "Q5_K_S": Mixture("Q5_K"),
        "Q5_K_M": Mixture("Q5_K", {k: more("Q6_K") for k in ("attn_v", "ffn_down")}),
        "Q6_K": Mixture("Q6_K"),
        "IQ1_S": _low("IQ1_S", "Q2_K", "IQ2_XXS"),
        "IQ1_M": _low("IQ1_M", "Q2_K", "IQ2_XXS"),
        "IQ2_XXS": _low("IQ2_XXS", "Q2_K", None),
        "IQ2_XS": _low("IQ2_XS", "Q2_K", None),
        "IQ2_S": _low("IQ2_XS", "IQ3_S", "IQ3_S"),
        "IQ2_M": _low("IQ2_S", "IQ3_S", "IQ3_S"),
        "IQ3_XXS": Mixture("IQ3_XXS", _XXS, "IQ3_S", "Q5_K", True, "Q5_K"),
        "IQ3_XS": Mixture(
            "IQ3_S", {**_XS, "attn_v": gqa4("Q4_K")}, needs_imatrix=True, experts8_output="Q5_K"
        ),
        "IQ3_S": Mixture("IQ3_S", {"attn_v": gqa4("Q4_K")}, experts8_output="Q5_K"),
        "IQ3_M": Mixture(
            "IQ3_S",
            {"attn_v": always("Q4_K"), "ffn_down": _iq3_m_down, "attn_output": always("Q4_K")},
            experts8_output="Q5_K",
        ),
        "IQ4_NL": Mixture("IQ4_NL", _IQ4, experts8_output="Q5_K"),
        "IQ4_XS": Mixture("IQ4_XS", _IQ4, experts8_output="Q5_K"),
    }
)

# What a width that no block of the wanted type divides gets instead; F16 where that does not fit either.
FALLBACK = MappingProxyType(
    {f"IQ{t}": "IQ4_NL" for t in ("1_S", "1_M", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S", "4_XS")}
    | {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)


def file_type(name: str) -> int:
    """`general.file_type` of a mixture; plain names are llama.cpp's own (Q6_K, F16), F32 has no "mostly"."""
    member = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
    return int(LlamaFileType[member])


def kind_of(name: str) -> str:
    """The kind of a tensor by its GGUF name: `blk.3.ffn_down.weight` is `ffn_down`; experts count with their matrix."""
    stem = name.removesuffix(".weight").split(".", 2)
    return (stem[2] if stem[0] == "blk" and len(stem) == 3 else stem[0]).removesuffix("_exps").split(".")[0]


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes a tensor at all (`tensor_allows_quantization`)."""
    return len(shape) > 1 and name.endswith("weight") and "_norm.weight" not in name and "ffn_gate_inp" not in name


def choose(mixture: str, tensors: Sequence[tuple[str, tuple[int, ...], str]], shape: Shape, imatrix: bool) -> list[str]:
    """The type of every tensor of a file: (name, shape, present type) in file order -> types.

    A tensor that is not quantized keeps its present type.
    """
    mix = MIXTURES[mixture]
    counts: dict[str, int] = {}
    for name, _, _ in tensors:
        counts[kind_of(name)] = counts.get(kind_of(name), 0) + 1
    at: dict[str, int] = {}
    types = []
    for name, dims, present in tensors:
        kind = kind_of(name)
        place = Place(at.get(kind, 0), counts[kind], shape, imatrix)
        if shape.experts > 1 and name.startswith("blk."):  # experts come in any order: the name tells the layer
            place = replace(place, i=int(name.split(".")[1]))
        at[kind] = at.get(kind, 0) + 1
        if not quantizable(name, dims):
            types.append(present)
        elif mix.base in ("F32", "F16", "BF16"):
            types.append(mix.base)
        else:
            types.append(_fitting(_wanted(mix, kind, dims[-1], place), dims[-1]))
    return types


def _wanted(mix: Mixture, kind: str, width: int, place: Place) -> str:
    if kind == "output" or (kind == "token_embd" and place.shape.tied):
        if width % lookup(mix.base).block:
            return "Q8_0"
        return mix.output or ("Q8_0" if mix.base == "Q8_0" else "Q6_K")
    if kind == "token_embd":
        return mix.embedding or mix.base
    rule = mix.rules.get(kind)
    wanted = (rule(place) if rule else None) or mix.base
    low = mix.base.startswith(("IQ1", "IQ2"))
    if place.shape.experts == 8:
        if kind in ("attn_v", "attn_k") and not low:
            return "Q8_0"
        if kind == "attn_output":
            return mix.experts8_output or mix.base
    if kind == "attn_v" and place.shape.is_70b and not low and wanted in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return wanted


def _fitting(kind: str, width: int) -> str:
    if width % lookup(kind).block == 0:
        return kind
    other = FALLBACK.get(kind, kind)
    return other if width % lookup(other).block == 0 else "F16"
