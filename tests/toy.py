"""Toys with random weights, small, no two widths equal: a Llama that gguf-py writes, and every family as a folder."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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


def write_toy(
    path: Path,
    model: LlamaForCausalLM,
    kind: T = T.F32,
    name: str = "toy",
    arch: str = "llama",
    vocab: Path | None = None,
) -> Path:
    """Write `model` as a GGUF, its matrices as `kind`; its tokenizer is `vocabulary()`, or that of the GGUF `vocab`."""
    c = model.config
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
    if vocab is None:
        add_vocabulary(w)
    else:
        for field in gguf.GGUFReader(vocab).fields.values():
            if field.name.startswith("tokenizer."):
                w.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
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


def add_vocabulary(w: gguf.GGUFWriter) -> None:
    """`vocabulary()`, cut as SmolLM's."""
    tokens, kinds = vocabulary()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges([f"{t[0]} {t[1]}" for t in tokens[258:]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_add_bos_token(False)


def gguf_name(hf: str) -> str:
    """A transformers name as GGUF has it."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, part = hf.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{part}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{part}"


# Every family, small, its widths all different; `scale` is what embeddings are multiplied by, so that tops stand out.
SHAPE = {
    "vocab_size": 328,  # eight rows more than the vocabulary has tokens
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SQUARE = SHAPE | {"hidden_size": 192, "head_dim": 32}  # llama.cpp wants heads as wide as the hidden state


def rope(theta: float, **scaling: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


def llama3(length: int) -> dict[str, object]:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_type": "llama3", "original_max_position_embeddings": length, **numbers}


GEMMA = SHAPE | {"query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": SHAPE | rope(40000.0) | {"model_type": "llama"},
    "llama-biased-tied": SHAPE | {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True},
    "llama-llama3": SHAPE | rope(10000.0, **llama3(64)) | {"model_type": "llama"},
    "llama-linear": SHAPE | rope(10000.0, rope_type="linear", factor=4.0) | {"model_type": "llama"},
    "llama-yarn": SHAPE
    | rope(10000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=160)
    | {"model_type": "llama"},
    "mistral": SHAPE | rope(1e6) | {"model_type": "mistral", "sliding_window": 256},
    "qwen2": SQUARE | rope(1e6) | {"model_type": "qwen2"},
    "qwen3": SHAPE | rope(1e6) | {"model_type": "qwen3", "rms_norm_eps": 1e-6},
    "qwen3-yarn": SHAPE
    | rope(1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=160)
    | {"model_type": "qwen3", "tie_word_embeddings": True},
    # a name with phi3 in it would make llama.cpp look for that model's special tokens
    "phi": SQUARE
    | rope(10000.0)
    | {"model_type": "phi3", "original_max_position_embeddings": 640, "sliding_window": 256},
    "mixtral": SHAPE
    | rope(1e6)
    | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3-experts": SHAPE
    | rope(1e6)
    | {"model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
    | {"norm_topk_prob": True},
    "gemma2": GEMMA
    | rope(10000.0)
    | {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0, "num_hidden_layers": 4},
    "gemma3": GEMMA
    | {"model_type": "gemma3_text", "num_hidden_layers": 7, "vocab_size": 322}  # its converter cuts the rows off
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
        }
    },
}


def family_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The transformers model of a row of `FAMILIES`, with random weights and clear tops."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    offset = 0 if "gemma" in name else 1  # Gemma's norms multiply by 1 + w
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "norm" in path:
                p.copy_(offset + 0.1 * torch.randn(p.shape))
            elif p.dim() == 1:
                p.copy_(0.3 * torch.randn(p.shape))
            else:
                p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5 * (2 if "embed" in path or "lm_head" in path else 1))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """`vocabulary()` as transformers has it, cut as `smollm`."""
    tokens, _ = vocabulary()
    merges = [(t[0], t[1]) for t in tokens[258:]]
    backend = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|s|>", eos_token="<|e|>")


def write_family(folder: Path, name: str) -> Path:
    """A row of `FAMILIES` as transformers saves it."""
    family_model(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
