"""Qwen3, dense: Qwen2's shape without its biases, and an RMS norm on each head's queries and keys.

Facts from llama.cpp `conversion/qwen.py`, `src/models/qwen3.cpp` and transformers `models/qwen3`. Leaves out attention
biases and sliding windows, which no published model has, and rerankers.
"""

from __future__ import annotations

from quantkit.arch.llama import KEYS, MLP, OUTER, dims
from quantkit.arch.schema import Architecture, Weight

ATTENTION = (
    Weight("attn_norm", "input_layernorm", ("hidden",), writes="attn_in"),
    Weight("attn_q", "self_attn.q_proj", ("q", "hidden"), reads="attn_in"),
    Weight("attn_k", "self_attn.k_proj", ("kv", "hidden"), reads="attn_in"),
    Weight("attn_v", "self_attn.v_proj", ("kv", "hidden"), reads="attn_in", writes="heads"),
    Weight("attn_output", "self_attn.o_proj", ("hidden", "q"), reads="heads"),
    Weight("attn_q_norm", "self_attn.q_norm", ("head",)),
    Weight("attn_k_norm", "self_attn.k_norm", ("head",)),
)

ARCHITECTURE = Architecture(
    gguf="qwen3",
    hf="qwen3",
    hf_class="Qwen3ForCausalLM",
    keys=KEYS,
    outer=OUTER,
    block=(*ATTENTION, *MLP),
    dims=dims,
    fixed=(("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)),
    scalings=("linear", "yarn"),
)
