"""What llama.cpp's mixtures are, as a table: the type of most tensors of a `Q4_K_M` file, and the rules for the others.

Source: llama.cpp `src/llama-quant.cpp` of October 2026, `llama_tensor_get_type`. A rule maps a `Place` to a type, or to
None where the mixture's base type stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


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
    return Mixture(base, rules, embedding=low, output="Q5_K", experts8_output="Q5_K")


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
        "Q2_K_S": Mixture("Q2_K", {"attn_v": gqa4("Q4_K"), "ffn_down": early(8, "Q4_K")}),
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
        "IQ3_XXS": Mixture("IQ3_XXS", _XXS, embedding="IQ3_S", output="Q5_K", experts8_output="Q5_K"),
        "IQ3_XS": Mixture("IQ3_S", {**_XS, "attn_v": gqa4("Q4_K")}, experts8_output="Q5_K"),
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
