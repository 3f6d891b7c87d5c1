"""Mistral with a sliding window: Llama's tensors and keys under the same GGUF name, and one key more.

llama.cpp knows no window for this family and attends to everything (`src/models/llama.cpp`); up to the window's length
that is the same. Without the key a GGUF of Mistral is a Llama, which transformers computes alike.
Facts from transformers `models/mistral`. Leaves out biases, which Mistral has none of.
"""

from __future__ import annotations

from dataclasses import replace

from quantkit.arch import llama
from quantkit.arch.schema import Key

WINDOW = Key("attention.sliding_window", "sliding_window", lambda c: None, off=True)

ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    hf="mistral",
    hf_class="MistralForCausalLM",
    keys=(*llama.ARCHITECTURE.keys, WINDOW),
    block=tuple(replace(w, bias=False) for w in llama.ARCHITECTURE.block),
    fixed=(("hidden_act", "silu"),),
    scalings=("linear", "yarn"),
    tell=WINDOW.gguf,
)
