"""llama.cpp's mixtures: which type each tensor of a `Q4_K_M` file gets, as a table of rules.

Source: llama.cpp `src/llama-quant.cpp` of October 2026, `llama_tensor_get_type` and what it calls. A rule maps a
`Place` to a type, or to None where the mixture's base type stays. `Choices` go before rules; a tensor that a choice
decided is not counted, so those after it move up in the rules, as they do in llama.cpp.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gguf.constants import LlamaFileType

from quantkit.codecs import lookup
from quantkit.errors import UsageError
from quantkit.targets.layers import first_rule
from quantkit.targets.target import Choices


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

# What a width that no block of the wanted type divides gets instead; F16 where that does not fit either.
FALLBACK = MappingProxyType(
    {f"IQ{t}": "IQ4_NL" for t in ("1_S", "1_M", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S", "4_XS")}
    | {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)

# What the rules take a tensor for: the first of these that its name holds (`tensor_get_category`). Fused and compressed
# attention goes with attn_v, the experts of a matrix and the shared ones go with the matrix.
KINDS = MappingProxyType(
    {"attn_qkv.weight": "attn_v", "attn_kv_b.weight": "attn_v"}
    | {f"{k}.weight": k for k in ("attn_v", "attn_k", "attn_q", "attn_output")}
    | {k: k for k in ("ffn_up", "ffn_gate", "ffn_down")}
)

# Parts of names of tensors that stay as they are (`tensor_allows_quantization`), for the families known here.
UNTOUCHED = ("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d")

# Types whose blocks are garbage without an importance matrix (`tensor_requires_imatrix`); Q2_K is in a Q2_K_S file.
NEEDY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")

PLAIN = ("F32", "F16", "BF16")
_LAYER = re.compile(r"blk\.(\d+)\.")


def file_type(name: str) -> int:
    """`general.file_type` of a mixture; plain names are llama.cpp's own (Q6_K, F16), F32 has no "mostly"."""
    member = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
    return int(LlamaFileType[member])


def kind_of(name: str) -> str:
    """What the rules take a tensor for by its GGUF name: `blk.3.ffn_down_exps.weight` is `ffn_down`, others "other"."""
    if name in ("output.weight", "token_embd.weight", "per_layer_token_embd.weight"):
        return "output" if name == "output.weight" else "token_embd"
    return next((kind for part, kind in KINDS.items() if part in name), "other")


def layer_of(name: str) -> int:
    """The block a tensor belongs to, -1 for those outside."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes a tensor at all (`tensor_allows_quantization`)."""
    return len(shape) > 1 and name.endswith("weight") and not any(part in name for part in UNTOUCHED)


def requires_imatrix(mixture: str, name: str, kind: str) -> bool:
    """Whether a tensor of type `kind` in a file of `mixture` must not be encoded without an importance matrix.

    llama.cpp lets output and embedding pass, and aborts where their type has no encoder without one.
    """
    if lookup(kind).requires_importance:
        return True
    ruled = kind_of(name) not in ("output", "token_embd")
    return ruled and (kind in NEEDY or (kind == "Q2_K" and mixture == "Q2_K_S"))


def choose(
    mixture: str,
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    shape: Shape,
    imatrix: bool,
    choices: Choices = Choices(),  # noqa: B008 (frozen)
) -> list[str]:
    """The type of every tensor of a file: (name, shape, present type) in file order -> types.

    A tensor that is not quantized keeps its present type. UsageError where a chosen type does not fit a tensor whose
    type is chosen by name.
    """
    mix = MIXTURES[mixture]
    of_kind = Counter(kind_of(name) for name, _, _ in tensors)
    layers = 1 + max((layer_of(name) for name, _, _ in tensors), default=-1)
    at: Counter[str] = Counter()
    types = {}
    for name, dims, present in sorted(tensors, key=lambda t: (layer_of(t[0]), t[0])):
        kind, width = kind_of(name), dims[-1]
        if not quantizable(name, dims) or (choices.leave_output and name == "output.weight"):
            types[name] = present
        elif asked := _by_layer(name, choices) or _by_place(name, choices):
            types[name] = _held(name, asked, width)
        elif mix.base in PLAIN:
            types[name] = mix.base
        elif asked := _by_pattern(name, choices):
            types[name] = _fitting(asked, width)
        elif choices.pure:
            types[name] = _fitting(mix.base, width)
        else:
            i, n = at[kind], of_kind[kind]
            if kind.startswith("ffn_"):  # experts come in any order: the name tells the layer
                i, n = layer_of(name) if shape.experts > 1 else i, layers
            at[kind] += 1
            types[name] = _fitting(_wanted(mix, kind, width, Place(i, n, shape, imatrix), choices), width)
    return [types[name] for name, _, _ in tensors]


def _by_layer(name: str, choices: Choices) -> str | None:
    rule = first_rule(choices.layers, name)
    return rule.type if rule else None


def _by_place(name: str, choices: Choices) -> str | None:
    """The type chosen for embedding or output; a pattern that finds Gemma's per-layer embedding goes before it."""
    kind = kind_of(name)
    if kind == "token_embd" and not (name != "token_embd.weight" and _by_pattern(name, choices)):
        return choices.token_embedding_type
    return choices.output_type if kind == "output" else None


def _by_pattern(name: str, choices: Choices) -> str | None:
    return next((kind for pattern, kind in choices.tensor_types if pattern.search(name)), None)


def _wanted(mix: Mixture, kind: str, width: int, place: Place, choices: Choices) -> str:
    if kind == "output" or (kind == "token_embd" and place.shape.tied):
        if choices.output_type:
            return choices.output_type
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


def _held(name: str, kind: str, width: int) -> str:
    if width % lookup(kind).block:
        raise UsageError(
            f"its rows of {width} do not divide into {kind} blocks of {lookup(kind).block}",
            where=name,
            hint=f"choose {_fitting(kind, width)} for it",
        )
    return kind


def _fitting(kind: str, width: int) -> str:
    if width % lookup(kind).block == 0:
        return kind
    other = FALLBACK.get(kind, kind)
    return other if width % lookup(other).block == 0 else "F16"
