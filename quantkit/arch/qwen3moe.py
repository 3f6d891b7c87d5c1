"""Qwen3 with a mixture of experts in every layer, the weights of the chosen ones summing to 1.

Facts from llama.cpp `conversion/qwen.py`, `src/models/qwen3moe.cpp` and transformers `models/qwen3_moe`,
`conversion_mapping.py`. Leaves out layers without experts and unnormed weights, which llama.cpp has no keys for.
"""

from __future__ import annotations

from quantkit.arch import llama
from quantkit.arch.mixtral import experts
from quantkit.arch.qwen3 import ATTENTION
from quantkit.arch.schema import Architecture, Config, Key


def dims(c: Config) -> dict[str, int]:
    """Llama's widths, and those of the experts."""
    return llama.dims(c) | {"experts": c["num_experts"], "expert": c["moe_intermediate_size"]}


ARCHITECTURE = Architecture(
    gguf="qwen3moe",
    hf="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    keys=(
        *llama.KEYS,
        Key("expert_count", "num_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
    ),
    outer=llama.OUTER,
    block=(
        *ATTENTION,
        *experts("mlp", ("gate_proj", "up_proj", "down_proj"), "expert", "num_experts"),
    ),
    dims=dims,
    fixed=(
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("use_sliding_window", False),
        ("norm_topk_prob", True),
        ("decoder_sparse_step", 1),
        ("mlp_only_layers", []),
    ),
    scalings=("linear", "yarn"),
    modules=(
        (
            "mlp.experts.gate_up_proj",
            ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        ),
        ("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",)),
    ),
)
