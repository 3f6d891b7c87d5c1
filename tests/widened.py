"""SmolLM2 as the same function with rows of 768: a trained model whose rows all divide by 256, so that K-quants show.

An orthonormal (768, 576) matrix Q carries the residual stream, and what a norm multiplies by moves into the matrices
behind it: |Qx| = |x|, so a norm over 768 numbers is that over 576 times sqrt(576 / 768), which its weight makes up for.
Three more query heads come with columns of the output projection that nothing feeds, for the fourth key-value head that
they read has values of zero: a fifth of attn_v are rows of zeros, a trap of its own for encoders.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.model import Model

WIDTH, HEADS, KV_HEADS = 768, 12, 4


def first_layers(model: Model, layers: int) -> LlamaForCausalLM:
    """The first blocks of a Llama between its embedding and its head, as transformers has it, in float32."""
    config = {k: v for k, v in model.config.items() if k not in ("architectures", "model_type")}
    made = LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": layers})).eval()
    wanted = made.state_dict().keys() & model.tensors.keys()
    assert wanted == made.state_dict().keys() - {"lm_head.weight"}  # it is the embedding
    made.load_state_dict({name: model.tensors[name].read() for name in wanted}, strict=False)
    return made


@torch.no_grad()
def widened(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function, 768 wide."""
    old, width = model.config, model.config.hidden_size
    changes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    changes |= {"tie_word_embeddings": False, "rms_norm_eps": old.rms_norm_eps * width / WIDTH}
    wide = LlamaForCausalLM(LlamaConfig(**old.to_dict() | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(WIDTH, width, generator=generator))[0]

    def more(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * like.std()

    def reads(new: nn.Linear, weight: Tensor, zeros: bool) -> None:
        extra = len(new.weight) - len(weight)
        added = torch.zeros(extra, width) if zeros else more(weight, extra, width)
        new.weight.copy_(torch.cat([weight, added]) @ q.T)

    def writes(new: nn.Linear, weight: Tensor) -> None:
        new.weight.copy_(q @ torch.cat([weight, more(weight, width, new.weight.shape[1] - weight.shape[1])], 1))

    embedding, scale = model.model.embed_tokens.weight, math.sqrt(width / WIDTH)
    wide.model.embed_tokens.weight.copy_(embedding @ q.T)
    wide.lm_head.weight.copy_(embedding * model.model.norm.weight @ q.T)
    wide.model.norm.weight.fill_(scale)
    for a, b in zip(model.model.layers, wide.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(a.self_attn, name).weight * a.input_layernorm.weight
            reads(getattr(b.self_attn, name), weight, zeros=name == "v_proj")
        for name in ("gate_proj", "up_proj"):
            reads(getattr(b.mlp, name), getattr(a.mlp, name).weight * a.post_attention_layernorm.weight, zeros=False)
        writes(b.self_attn.o_proj, a.self_attn.o_proj.weight)
        writes(b.mlp.down_proj, a.mlp.down_proj.weight)
        b.input_layernorm.weight.fill_(scale)
        b.post_attention_layernorm.weight.fill_(scale)
    return wide


def save(wide: LlamaForCausalLM, files: dict[str, str], folder: Path) -> Path:
    """The model as a folder in half precision, with the texts of its tokenizer files."""
    wide.half().save_pretrained(folder)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
