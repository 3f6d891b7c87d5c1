"""Llama 1, 2, 3 and 3.1, SmolLM, miqu, Mistral without a sliding window: dense, rotary, RMS norms, SwiGLU.

Facts from llama.cpp `gguf-py/gguf/tensor_mapping.py`, `conversion/llama.py`, `src/models/llama.cpp` and transformers
`models/llama`. Leaves out biases of the MLP and partial rotary embeddings, which are refused by name.
"""

from __future__ import annotations

from quantkit.arch.schema import Architecture, Config, Key, Rope, Weight

Q, K = Rope("num_attention_heads"), Rope("num_key_value_heads")


def dims(c: Config) -> dict[str, int]:
    """The widths that the shapes below are written in."""
    return {
        "vocab": c["vocab_size"],
        "hidden": c["hidden_size"],
        "ffn": c["intermediate_size"],
        "head": c["head_dim"],
        "q": c["num_attention_heads"] * c["head_dim"],
        "kv": c["num_key_value_heads"] * c["head_dim"],
    }


# What llama.cpp's `TextModel.set_gguf_parameters` writes for every family, and `load_hparams` reads.
KEYS = (
    Key("block_count", "num_hidden_layers"),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads", lambda c: c["num_attention_heads"]),
    Key("rope.freq_base", "rope_theta", lambda c: 10000.0, float),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", number=float),
    Key("attention.key_length", "head_dim", lambda c: c["hidden_size"] // c["num_attention_heads"]),
    Key("attention.value_length", "head_dim", lambda c: c["head_dim"]),
)
OUTER = (
    Weight("token_embd", "model.embed_tokens", ("vocab", "hidden")),
    Weight("output_norm", "model.norm", ("hidden",)),
    Weight("output", "lm_head", ("vocab", "hidden"), absent="tie_word_embeddings"),
)
MLP = (
    Weight("ffn_norm", "post_attention_layernorm", ("hidden",), writes="mlp_in"),
    Weight("ffn_gate", "mlp.gate_proj", ("ffn", "hidden"), reads="mlp_in"),
    Weight("ffn_up", "mlp.up_proj", ("ffn", "hidden"), reads="mlp_in", writes="mlp_mid"),
    Weight("ffn_down", "mlp.down_proj", ("hidden", "ffn"), reads="mlp_mid"),
)

ARCHITECTURE = Architecture(
    gguf="llama",
    hf="llama",
    hf_class="LlamaForCausalLM",
    keys=(
        *KEYS,
        Key("vocab_size", "vocab_size", lambda c: c["vocab_size"]),
        Key("rope.dimension_count", "head_dim", lambda c: c["head_dim"]),
    ),
    outer=OUTER,
    block=(
        Weight("attn_norm", "input_layernorm", ("hidden",), writes="attn_in"),
        Weight("attn_q", "self_attn.q_proj", ("q", "hidden"), reads="attn_in", layout=Q, bias="attention_bias"),
        Weight("attn_k", "self_attn.k_proj", ("kv", "hidden"), reads="attn_in", layout=K, bias="attention_bias"),
        Weight("attn_v", "self_attn.v_proj", ("kv", "hidden"), reads="attn_in", writes="heads", bias="attention_bias"),
        Weight("attn_output", "self_attn.o_proj", ("hidden", "q"), reads="heads", bias="attention_bias"),
        *MLP,
    ),
    dims=dims,
    fixed=(("hidden_act", "silu"), ("mlp_bias", False)),
    only=(("expert_count", (None, 0)),),
    scalings=("linear", "yarn", "llama3"),
)
