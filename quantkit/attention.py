"""Causal attention on a CPU, where torch's kernel is slow with bf16 and works out what lies above the diagonal as well.

Here 64 queries of a sequence at a time meet the keys that they see: of 512 tokens that is 9/16 of the products. Scores
and their softmax are float32; values are added up in their own type. It takes 0.4 to 0.6 of the kernel's time in bf16
(at 2048 tokens 0.5 to 0.7) and 0.7 to 0.9 in float32, where from 1024 tokens on the kernel is as fast and needs no
scores. With Intel's AMX, which the kernel has for bf16, it is the other way round: the kernel takes 0.2 to 0.5 of that.
"""

from __future__ import annotations

from typing import Any

from quantkit.hardware import has_tiles
from quantkit.later import Device, Tensor, nn, on_cpu, torch

AT_ONCE = 4096  # bytes of values in a column: 1024 tokens in float32, 2048 in bf16
FOR_GRADIENT = 512  # tokens: a gradient keeps the scores of all steps
STEP = 64  # queries
NOT_PLAIN = ("is_causal", "position_bias")  # what transformers may ask for beside a mask


def attention_for(device: Device) -> str:
    """The name by which transformers knows the attention for a device."""
    if not on_cpu(device):
        return "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "causal_in_steps"
    AttentionInterface.register(name, causal_in_steps)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def causal_in_steps(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa_attention_forward` gives for query, key and value (n, heads, T, d): (n, T, heads, d).

    What is not plainly causal, another length, and bf16 on a processor with AMX, is left to that.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length, plain = query.shape[2], attention_mask is None and all(more.get(k) is None for k in NOT_PLAIN)
    most = FOR_GRADIENT if torch.is_grad_enabled() else AT_ONCE // value.element_size()
    tiled = value.dtype == torch.bfloat16 and has_tiles()
    if tiled or not plain or not length == key.shape[2] <= most:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):
        return torch.stack([_attended(q * scale, k, v) for q, k, v in zip(query, key, value, strict=True)]), None


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence: query (heads, T, d), key and value (heads of keys, T, d) -> (T, heads, d) in value's type."""
    (groups, length, width), heads = value.shape, len(query)
    queries = query.float().view(groups, -1, length, query.shape[-1])
    keys, value = key.float().contiguous().transpose(1, 2), value.contiguous()
    above = queries.new_full((STEP, STEP), float("-inf")).triu(1)
    parts = []
    for start in range(0, length, STEP):
        end = min(start + STEP, length)
        scores = torch.bmm(queries[:, :, start:end].flatten(1, 2), keys[:, :, :end])
        scores.view(groups, -1, end - start, end)[..., start:] += above[: end - start, : end - start]
        part = torch.bmm(scores.softmax(-1).to(value.dtype), value[:, :end])
        parts.append(part.view(heads, end - start, width).transpose(0, 1))
    return torch.cat(parts)
