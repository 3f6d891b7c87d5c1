"""Gemma 2: norms on both sides of each half, logits bent by tanh, and a sliding window in every other layer.

Facts from llama.cpp `conversion/gemma.py`, `src/models/gemma2.cpp` and transformers `models/gemma2`. Leaves out untied
embeddings, which llama.cpp does not read.
"""

from __future__ import annotations

from quantkit.arch.gemma3 import ARCHITECTURE as GEMMA3
from quantkit.arch.llama import KEYS
from quantkit.arch.schema import Architecture, Config, Key

EVERY = 2
LAYERS_27B = 46


def layer_types(c: Config) -> list[str]:
    """Which layers slide: the first, the third and so on."""
    return ["sliding_attention" if (i + 1) % EVERY else "full_attention" for i in range(c["num_hidden_layers"])]


def attention_scalar(c: Config) -> int:
    """What queries are divided by the root of: `f_attention_scale`, turned over."""
    if c["num_hidden_layers"] == LAYERS_27B:
        return c["hidden_size"] // c["num_attention_heads"]
    return c["head_dim"]


ARCHITECTURE = Architecture(
    gguf="gemma2",
    hf="gemma2",
    hf_class="Gemma2ForCausalLM",
    keys=(
        *KEYS,
        Key("attention.sliding_window", "sliding_window", lambda c: 4096),
        Key("attn_logit_softcapping", "attn_logit_softcapping", lambda c: 50.0, float),
        Key("final_logit_softcapping", "final_logit_softcapping", lambda c: 30.0, float),
    ),
    outer=GEMMA3.outer[:2],
    block=tuple(w for w in GEMMA3.block if w.gguf not in ("attn_q_norm", "attn_k_norm")),
    dims=GEMMA3.dims,
    fixed=(
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("attention_bias", False),
        ("tie_word_embeddings", True),
    ),
    derived=(("layer_types", layer_types), ("query_pre_attn_scalar", attention_scalar)),
    only=(("attention.sliding_window_pattern", (None, EVERY)),),
)
