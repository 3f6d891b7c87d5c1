"""Gemma 3, text: norms on both sides of each half, on queries and keys, and a sliding window in five layers of six.

Facts from llama.cpp `conversion/gemma.py`, `src/models/gemma3.cpp` and transformers `models/gemma3`. The embedding is
scaled by the module itself in both programs. Leaves out vision, embedding models and the dense layers those end in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quantkit.arch.llama import KEYS, OUTER, dims
from quantkit.arch.qwen3 import ATTENTION
from quantkit.arch.schema import Architecture, Config, Key, PlusOne, Weight

EVERY = 6  # the layer of so many that sees everything
LAYERS_27B = 62  # what llama.cpp knows the 27B model by, whose heads are not scaled by their own width


def derived(every: int, layers_27b: int) -> tuple[tuple[str, Callable[[Config], Any]], ...]:
    """What llama.cpp computes: which layers slide, and what queries are divided by the root of."""

    def layer_types(c: Config) -> list[str]:
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c["num_hidden_layers"])]

    def scalar(c: Config) -> int:
        heads, of_27b = c["num_attention_heads"], c["num_hidden_layers"] == layers_27b
        return c["hidden_size"] // heads if of_27b else c["head_dim"]

    return (("layer_types", layer_types), ("query_pre_attn_scalar", scalar))


def norms(*weights: Weight) -> tuple[Weight, ...]:
    """The rows, each vector among them as 1 + w."""
    return tuple(replace(w, layout=PlusOne()) if len(w.shape) == 1 else w for w in weights)


ARCHITECTURE = Architecture(
    gguf="gemma3",
    hf="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    keys=(
        *KEYS,
        Key("attention.sliding_window", "sliding_window"),
        Key("rope.freq_base_swa", "rope_local_base_freq", lambda c: 10000.0, float),
        Key("final_logit_softcapping", "final_logit_softcapping", lambda c: None, float, off=True),
    ),
    outer=norms(*OUTER),
    block=norms(
        *ATTENTION,
        Weight("post_attention_norm", "post_attention_layernorm", ("hidden",)),
        Weight("ffn_norm", "pre_feedforward_layernorm", ("hidden",), writes="mlp_in"),
        Weight("ffn_gate", "mlp.gate_proj", ("ffn", "hidden"), reads="mlp_in"),
        Weight("ffn_up", "mlp.up_proj", ("ffn", "hidden"), reads="mlp_in", writes="mlp_mid"),
        Weight("ffn_down", "mlp.down_proj", ("hidden", "ffn"), reads="mlp_mid"),
        Weight("post_ffw_norm", "post_feedforward_layernorm", ("hidden",)),
    ),
    dims=dims,
    fixed=(
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("attention_bias", False),
        ("attn_logit_softcapping", None),
        ("use_bidirectional_attention", False),
    ),
    derived=derived(EVERY, LAYERS_27B),
    only=(("attention.sliding_window_pattern", (None, EVERY)),),
    scalings=("linear",),
)
