"""A toy Llama with random weights, written by gguf-py and by transformers: small, no two widths equal."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 40000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary() -> tuple[list[str], list[int]]:
    """Two control tokens, the 256 bytes, and words up to the vocabulary's size; the GGUF kind of each."""
    bytes_ = sorted(ByteLevel.alphabet())
    words = [a + b for a in "etaoinsr" for b in "etaoinsrhl"]
    tokens = ["<|s|>", "<|e|>", *bytes_, *words][: CONFIG["vocab_size"]]
    return tokens, [3, 3, *[1] * (len(tokens) - 2)]


def toy_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """The transformers model; its logits are spread enough to have a clear top."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.1 * torch.randn(p.shape) if p.dim() == 1 else torch.randn(p.shape) * p.shape[1] ** -0.5)
            if "embed" in name or "lm_head" in name:
                p.mul_(3)
    return model


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `conversion/llama.py`, permute: rotary halves to interleaved pairs."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_toy(path: Path, model: LlamaForCausalLM, kind: T = T.F32, name: str = "toy", arch: str = "llama") -> Path:
    """Write `model` as a GGUF, its matrices as `kind`."""
    c, tokens = model.config, vocabulary()
    w = gguf.GGUFWriter(path, arch)
    w.add_name(name)
    w.add_license("apache-2.0")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens[0])
    w.add_token_types(tokens[1])
    w.add_token_merges([f"{t[0]} {t[1]}" for t in tokens[0][258:]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_add_bos_token(False)
    for hf, tensor in model.state_dict().items():
        if hf == "lm_head.weight" and c.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if "q_proj" in hf or "k_proj" in hf:
            data = permuted(data, c.num_attention_heads if "q_proj" in hf else c.num_key_value_heads)
        as_type = T.F32 if data.ndim == 1 else kind
        raw = data if as_type == T.F32 else gguf.quants.quantize(data, as_type)
        w.add_tensor(gguf_name(hf), np.ascontiguousarray(raw), raw_dtype=as_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def gguf_name(hf: str) -> str:
    """A transformers name as GGUF has it."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, part = hf.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{part}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{part}"
