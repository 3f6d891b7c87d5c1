"""Sums of y^T x over many rows, a batch at a time: most of what statistics cost.

Factors are float32, or bf16 as a calibrated block's matrices are fed them; either way they are added up in float32. A
CUDA device gives that at once. A CPU rounds what it makes of bf16 factors to bf16 as well, so there it is asked by how
much a batch differs from the mean of those before: of that 2^-9 is lost, and the difference itself is chance. Such a
sum takes 0.55 of float32's time. The first few rows have no such mean and are multiplied as float32.
"""

from __future__ import annotations

from quantkit.later import Tensor, on_cpu, torch

FEW = 256  # rows; a batch of more than came before it is taken in halves, down to these
AT_ONCE = 1024  # rows; with AMX 2048, of which columns lie 4096 bytes apart once turned, take half as long again
PANEL = 256  # rows of a sum, about: small beside the widths of models, large enough for full matmul speed


def panels(width: int) -> list[slice]:
    """The rows of a sum, cut so that little beside it is made, and nothing left of a Gram matrix's diagonal blocks."""
    step = -(-width // max(1, round(width / PANEL)))
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def add_product(into: Tensor, y: Tensor, x: Tensor, before: int) -> None:
    """Add y^T x to `into` (N, K): y (n, N), x (n, K), which come after `before` rows."""
    for part in panels(len(into)):
        _add(into[part], y[:, part], x, before)


def add_gram(upper: Tensor, x: Tensor, before: int) -> None:
    """Add x^T x to `upper` (K, K), but for what lies left of its diagonal blocks."""
    for part in panels(len(upper)):
        _add(upper[part, part.start :], x[:, part], x[:, part.start :], before)


def _add(into: Tensor, y: Tensor, x: Tensor, before: int) -> None:
    if x.dtype == torch.float32:
        into.addmm_(y.T, x)
    elif not on_cpu(x.device):
        into.add_(torch.mm(y.T, x, out_dtype=torch.float32))
    elif before >= len(x) > 0:
        so_far = into.bfloat16()
        for rows, others in zip(y.split(AT_ONCE), x.split(AT_ONCE), strict=True):
            into.add_(torch.addmm(so_far, rows.T, others, beta=-len(rows) / before))
        into.add_(so_far, alpha=len(x) / before)
    elif len(x) <= FEW:
        into.addmm_(y.T.float(), x.float())
    else:
        half = len(x) // 2
        _add(into, y[:half], x[:half], before)
        _add(into, y[half:], x[half:], before + half)
