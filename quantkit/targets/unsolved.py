"""Tensors that no solver works on: kept as plain numbers, or encoded row by row, and the error of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from quantkit.codecs import Numbers, Rows, recode, share_out, slabs
from quantkit.errors import BadInput
from quantkit.later import Device, Tensor, torch
from quantkit.stats import Stats, error, told
from quantkit.targets.target import Solved


def dense(name: str, rows: Rows, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Solved:
    """A tensor of `shape` whose rows are given, kept as plain numbers of `dtype`."""
    width = shape[-1]
    out = torch.empty(prod(shape) // width, width, dtype=dtype, device=device)
    loss = recoded(
        rows,
        slabs(len(out), width, device),
        lambda before, _: cast(name, before, dtype),
        lambda made: made.to(torch.float32, copy=True),
        out,
    )
    return Solved(name, {name: out.view(shape)}, out.view(shape), loss)


def cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` as `dtype`; BadInput where a finite value would become infinite."""
    bounds = torch.stack(weight.aminmax())  # rounding keeps the order, so the others fit where these do
    if not bool(torch.isfinite(bounds.to(dtype)).all()):
        raise BadInput(
            f"holds {bounds.abs().max().item():.3g}, which {str(dtype).removeprefix('torch.')} cannot hold",
            where=name,
            hint="convert to bf16 or a GGUF type",
        )
    return weight.to(dtype)


def straight(source: str, name: str, kind: str, numbers: Numbers, rows: int, width: int, *importance: Any) -> Solved:
    """A tensor of `rows` rows as bytes of type `kind`, by `codecs.recode`; an error names it as `name`."""
    try:
        raw, loss = recode(kind, numbers, rows, width, *importance)
    except BadInput as e:
        raise BadInput(e.what, where=e.where or name, hint=e.hint) from e
    return Solved(source, {name: raw.reshape(-1)}, None, loss)


def recoded(
    rows: Rows,
    parts: Sequence[slice],
    encode: Callable[[Tensor, slice], Tensor],
    decode: Callable[[Tensor], Tensor],
    out: Tensor,
) -> float:
    """Fill `out`, whose first dimension counts rows, with what `encode(rows(part), part)` makes of every part.

    Returns the relative error of that, as `decode` reads it in fresh float32, in the rows of parts that are `told` of.
    """
    read = told(len(out))

    def one(part: slice) -> tuple[float, float]:
        before = rows(part)
        made = encode(before, part)
        out[part] = made
        plain = before[read].flatten()
        delta = decode(made[read]).flatten().sub_(plain)
        return torch.dot(delta, delta).item(), torch.dot(plain, plain).item()

    made, full = (sum(column) for column in zip(*share_out(one, parts, out.device), strict=True))
    return made / max(full, 1e-30)


def told_of(rows: Tensor, experts: int = 1) -> Tensor:
    """Of the rows of a matrix or of a stack of experts (experts x N, ...) those that are `told` of: (experts, n, ...).

    To decode and to compare the others would be work for nothing.
    """
    stack = rows.unflatten(0, (experts, -1))
    return stack[:, told(stack.shape[1])]


def weight_loss(weight: Tensor, value: Tensor, *stats: Stats) -> float:
    """The relative error of `value` for `weight`, both as `told_of`; see `Solved`. 0 for zeros that are kept as zeros.

    Experts have statistics for each.
    """
    made = torch.stack([error(v - w, s.gram) for w, v, s in zip(weight, value, stats, strict=True)]).sum()
    full = torch.stack([error(w, s.gram) for w, s in zip(weight, stats, strict=True)]).sum()
    return (made / full.clamp_min(1e-30)).clamp_min(0).item()
