"""Llama 1, 2 and 3, Mistral without sliding window, SmolLM and miqu: dense, rotary, RMS norms, SwiGLU.

Facts from llama.cpp `gguf-py/gguf/tensor_mapping.py`, `conversion/llama.py` and transformers `models/llama`. Leaves out
mixtures of experts and scaled rotary embeddings: their tensors and keys are refused by name.
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
        "q": c["num_attention_heads"] * c["head_dim"],
        "kv": c["num_key_value_heads"] * c["head_dim"],
    }


ARCHITECTURE = Architecture(
    gguf="llama",
    hf="llama",
    hf_class="LlamaForCausalLM",
    keys=(
        Key("block_count", "num_hidden_layers"),
        Key("context_length", "max_position_embeddings"),
        Key("embedding_length", "hidden_size"),
        Key("feed_forward_length", "intermediate_size"),
        Key("attention.head_count", "num_attention_heads"),
        Key("attention.head_count_kv", "num_key_value_heads", lambda c: c["num_attention_heads"]),
        Key("attention.key_length", "head_dim", lambda c: c["hidden_size"] // c["num_attention_heads"]),
        Key("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        Key("rope.freq_base", "rope_theta", lambda c: 10000.0),
    ),
    outer=(
        Weight("token_embd", "model.embed_tokens", ("vocab", "hidden")),
        Weight("output_norm", "model.norm", ("hidden",)),
        Weight("output", "lm_head", ("vocab", "hidden"), absent="tie_word_embeddings"),
    ),
    block=(
        Weight("attn_norm", "input_layernorm", ("hidden",), writes="attn_in"),
        Weight("attn_q", "self_attn.q_proj", ("q", "hidden"), reads="attn_in", layout=Q, bias="attention_bias"),
        Weight("attn_k", "self_attn.k_proj", ("kv", "hidden"), reads="attn_in", layout=K, bias="attention_bias"),
        Weight("attn_v", "self_attn.v_proj", ("kv", "hidden"), reads="attn_in", writes="heads", bias="attention_bias"),
        Weight("attn_output", "self_attn.o_proj", ("hidden", "q"), reads="heads", bias="attention_bias"),
        Weight("ffn_norm", "post_attention_layernorm", ("hidden",), writes="mlp_in"),
        Weight("ffn_gate", "mlp.gate_proj", ("ffn", "hidden"), reads="mlp_in"),
        Weight("ffn_up", "mlp.up_proj", ("ffn", "hidden"), reads="mlp_in", writes="mlp_mid"),
        Weight("ffn_down", "mlp.down_proj", ("hidden", "ffn"), reads="mlp_mid"),
    ),
    dims=dims,
    fixed=(("hidden_act", "silu"), ("mlp_bias", False), ("attention_dropout", 0.0)),
    only=(("rope.scaling.type", (None, "none")), ("expert_count", (None, 0))),
)
