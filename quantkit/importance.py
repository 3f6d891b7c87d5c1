"""A model's importance matrix: the calibration pass of `convert` without outputs, and what both make of statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from quantkit.activations import S
from quantkit.files.imatrix import Imatrix
from quantkit.forward import Network, embed
from quantkit.later import Tensor, no_grad
from quantkit.model import Model
from quantkit.stats import Squares
from quantkit.walk import walk

Sums = dict[tuple[int, str], tuple[Tensor, int]]  # by block and activation: sums of squares (in,), and rows


def squares(layer: int, stats: Mapping[str, S]) -> Sums:
    """What an importance matrix keeps of the statistics of a block."""
    return {(layer, name): (s.squares.cpu().clone(), s.rows) for name, s in stats.items()}


def imatrix_of(model: Model, sums: Mapping[tuple[int, str], tuple[Tensor, int]], text: str, rows: Tensor) -> Imatrix:
    """The importance matrix of calibration `rows` (n, seqlen): one entry for every matrix or stack of the blocks."""
    parts: dict[str, list[tuple[Tensor, int]]] = {}  # of a stack, one for each expert
    for ref in model.tensors.values():
        if ref.placed.reads and ref.placed.layer is not None:
            parts.setdefault(ref.placed.gguf, []).append(sums[ref.placed.layer, ref.placed.reads])
    totals = {name: np.stack([total.numpy() for total, _ in each]) for name, each in parts.items()}
    counts = {name: np.array([count for _, count in each]) for name, each in parts.items()}
    return Imatrix(totals, counts, (text,), *rows.shape)


@no_grad
def measure(net: Network, ids: Tensor, text: str) -> Iterator[int | Imatrix]:
    """Run token `ids` (n, seqlen) of `text` through the model: yields each block's number, then the `Imatrix`."""
    states, sums = embed(net, ids), Sums()
    for step in walk(net.model, net, states, net.device, Squares, behind=False):
        sums |= squares(step.layer, step.stats)
        yield step.layer
    yield imatrix_of(net.model, sums, text, ids)
