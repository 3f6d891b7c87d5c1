"""Gemma 2: norms on both sides of each half, logits bent by tanh, and a sliding window in every other layer.

Facts from llama.cpp `conversion/gemma.py`, `src/models/gemma2.cpp` and transformers `models/gemma2`. Leaves out untied
embeddings, which llama.cpp does not read.
"""

from __future__ import annotations

from quantkit.arch.gemma3 import ARCHITECTURE as GEMMA3
from quantkit.arch.gemma3 import derived
from quantkit.arch.llama import KEYS
from quantkit.arch.schema import Architecture, Key

EVERY = 2
LAYERS_27B = 46

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
    derived=derived(EVERY, LAYERS_27B),
    only=(("attention.sliding_window_pattern", (None, EVERY)),),
)
