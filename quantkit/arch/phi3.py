"""Phi-3 with the short context and Phi-4: Llama's arithmetic, with q, k, v in one matrix and gate, up in another.

Facts from llama.cpp `conversion/phi.py`, `src/models/phi3.cpp` and transformers `models/phi3`. llama.cpp attends to
everything, whatever `attention.sliding_window` says; up to the window's length that is the same. Leaves out longrope
(the 128k variants) and partial rotary embeddings (Phi-4-mini), which are refused.
"""

from __future__ import annotations

from quantkit.arch import llama
from quantkit.arch.mistral import WINDOW
from quantkit.arch.schema import Architecture, Config, Key, Weight


def dims(c: Config) -> dict[str, int]:
    """Llama's widths, and those of the two stacked matrices."""
    d = llama.dims(c)
    return d | {"qkv": d["q"] + 2 * d["kv"], "gate_up": 2 * d["ffn"]}


ARCHITECTURE = Architecture(
    gguf="phi3",
    hf="phi3",
    hf_class="Phi3ForCausalLM",
    keys=(
        *llama.KEYS,
        Key("rope.dimension_count", "head_dim", lambda c: c["head_dim"]),
        Key(
            "rope.scaling.original_context_length",
            "original_max_position_embeddings",
            lambda c: c["max_position_embeddings"],
        ),
        WINDOW,
    ),
    outer=llama.OUTER,
    block=(
        Weight("attn_norm", "input_layernorm", ("hidden",), writes="attn_in"),
        Weight("attn_qkv", "self_attn.qkv_proj", ("qkv", "hidden"), reads="attn_in"),
        Weight("attn_output", "self_attn.o_proj", ("hidden", "q"), reads="heads"),
        Weight("ffn_norm", "post_attention_layernorm", ("hidden",), writes="mlp_in"),
        Weight("ffn_up", "mlp.gate_up_proj", ("gate_up", "hidden"), reads="mlp_in"),
        Weight("ffn_down", "mlp.down_proj", ("hidden", "ffn"), reads="mlp_mid"),
    ),
    dims=dims,
    fixed=(("hidden_act", "silu"),),
)
