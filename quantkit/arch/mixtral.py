"""Mixtral and other Llamas with a mixture of experts: Llama's tensors, and a router with experts for the MLP.

A GGUF stacks the experts of a layer in one tensor, a folder holds each by itself, and transformers' module has gate and
up of all experts in one parameter. Facts from llama.cpp `conversion/llama.py`, `src/models/llama.cpp` and transformers
`models/mixtral`, `conversion_mapping.py`. GGUFs of 2023 that hold one tensor an expert are stacked on opening.
"""

from __future__ import annotations

from dataclasses import replace

from quantkit.arch import llama
from quantkit.arch.mistral import WINDOW
from quantkit.arch.schema import Key, Weight


def experts(module: str, names: tuple[str, str, str], width: str, count: str) -> tuple[Weight, ...]:
    """The rows of a mixture: its norm, its router, and gate, up and down of the experts, called `names` in HF."""
    gate, up, down = (f"{module}.experts.{{}}.{name}" for name in names)
    return (
        Weight("ffn_norm", "post_attention_layernorm", ("hidden",), writes="mlp_in"),
        Weight("ffn_gate_inp", f"{module}.gate", ("experts", "hidden"), reads="mlp_in", kept=True),
        Weight("ffn_gate_exps", gate, (width, "hidden"), reads="mlp_in", experts=count),
        Weight("ffn_up_exps", up, (width, "hidden"), reads="mlp_in", writes="mlp_mid", experts=count),
        Weight("ffn_down_exps", down, ("hidden", width), reads="mlp_mid", experts=count),
    )


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    hf="mixtral",
    hf_class="MixtralForCausalLM",
    keys=(
        *llama.ARCHITECTURE.keys,
        Key("expert_count", "num_local_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        WINDOW,
    ),
    block=(
        *(replace(w, bias=False) for w in llama.ARCHITECTURE.block if w not in llama.MLP),
        *experts("block_sparse_moe", ("w1", "w3", "w2"), "ffn", "num_local_experts"),
    ),
    dims=lambda c: llama.dims(c) | {"experts": c["num_local_experts"]},
    fixed=(("hidden_act", "silu"),),
    only=(),
    scalings=("linear", "yarn"),
    tell="expert_count",
    modules=(
        ("mlp.gate.weight", ("block_sparse_moe.gate.weight",)),
        (
            "mlp.experts.gate_up_proj",
            ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        ),
        ("mlp.experts.down_proj", ("block_sparse_moe.experts.{}.w2.weight",)),
    ),
)
