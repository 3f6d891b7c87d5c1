"""Which type each tensor of a `Q4_K_M` file gets: choices, the rules of `mixture_rules`, and what fits a width.

Source: llama.cpp `src/llama-quant.cpp` of October 2026, `llama_tensor_get_type` and what it calls. `Choices` go before
rules; a tensor that a choice decided is not counted, so those after it move up in the rules, as they do in llama.cpp.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType

from gguf.constants import LlamaFileType

from quantkit.codecs import lookup
from quantkit.errors import UsageError
from quantkit.targets.layers import first_rule
from quantkit.targets.mixture_rules import MIXTURES, Mixture, Place, Shape
from quantkit.targets.target import Choices

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
