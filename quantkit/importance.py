"""A model's importance matrix: the calibration pass of `convert` without outputs, and what both make of statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantkit.files.imatrix import Imatrix
from quantkit.forward import Network, embed, readers, run, watching
from quantkit.model import Model
from quantkit.stats import Stats
from quantkit.targets.gguf import reads

Sums = dict[tuple[int, str], tuple[Tensor, int]]  # by block and activation: sums of squares (in,), and rows


def squares(layer: int, stats: Mapping[str, Stats]) -> Sums:
    """What an importance matrix keeps of the statistics of a block."""
    return {(layer, name): (s.gram.diagonal().cpu().clone(), s.rows) for name, s in stats.items()}


def imatrix_of(model: Model, sums: Mapping[tuple[int, str], tuple[Tensor, int]], text: str, rows: Tensor) -> Imatrix:
    """The importance matrix of calibration `rows` (n, seqlen): one entry for every matrix of the blocks."""
    entries = {}
    for layer in range(model.layers):
        for ref in model.block(layer).values():
            if activation := reads(ref):
                entries[ref.placed.gguf] = sums[layer, activation]
    totals = {name: total[None] for name, (total, _) in entries.items()}
    counts = {name: torch.tensor([count]) for name, (_, count) in entries.items()}
    return Imatrix(totals, counts, (text,), *rows.shape)


@torch.no_grad()
def measure(net: Network, ids: Tensor, text: str) -> Iterator[int | Imatrix]:
    """Run token `ids` (n, seqlen) of `text` through the model: yields each block's number, then the `Imatrix`."""
    states = embed(net, ids)
    sums: Sums = {}
    for layer in range(net.model.layers):
        with net.block(layer) as block, watching(block, readers(net.model), net.device) as stats:
            run(states, layer, block, net.device)
        sums |= squares(layer, stats)
        yield layer
    yield imatrix_of(net.model, sums, text, ids)
