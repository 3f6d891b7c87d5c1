"""Qwen2 and Qwen2.5: Llama's shape with biases on q, k and v, and rotary heads in HF's own order.

Facts from llama.cpp `conversion/qwen.py`, `src/models/qwen2.cpp` and transformers `models/qwen2`. Leaves out the
sliding window of some layers, which llama.cpp has no key for: it is refused where a folder switches it on.
"""

from __future__ import annotations

from quantkit.arch.llama import KEYS, MLP, OUTER, dims
from quantkit.arch.schema import Architecture, Weight

ARCHITECTURE = Architecture(
    gguf="qwen2",
    hf="qwen2",
    hf_class="Qwen2ForCausalLM",
    keys=KEYS,
    outer=OUTER,
    block=(
        Weight("attn_norm", "input_layernorm", ("hidden",), writes="attn_in"),
        Weight("attn_q", "self_attn.q_proj", ("q", "hidden"), reads="attn_in", bias=True),
        Weight("attn_k", "self_attn.k_proj", ("kv", "hidden"), reads="attn_in", bias=True),
        Weight("attn_v", "self_attn.v_proj", ("kv", "hidden"), reads="attn_in", writes="heads", bias=True),
        Weight("attn_output", "self_attn.o_proj", ("hidden", "q"), reads="heads"),
        *MLP,
    ),
    dims=dims,
    fixed=(("hidden_act", "silu"), ("use_sliding_window", False)),
    scalings=("linear", "yarn"),
)
