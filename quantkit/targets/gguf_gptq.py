"""`--solver gptq` of GGUF targets: which tensors are solved with error compensation, and how their bytes come back.

Matrices of the blocks whose type has a ladder are; a stack of experts, the embedding and the output matrix are encoded
as ever, and so is what has a type of another kind. The report names the solver of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantkit.codecs import lookup
from quantkit.solvers.ladder import ladder_gptq
from quantkit.targets.target import Piece, Row, Solved, readers_of, weight_loss


def solvable(kind: str, parts: int, reads: Sequence[str]) -> bool:
    """Whether a tensor of so many parts, fed with `reads`, can be compensated as type `kind`."""
    return parts == 1 and len(reads) == 1 and lookup(kind).ladder is not None


def compensated(piece: Piece, rows: Sequence[Row]) -> Iterator[Solved]:
    """Solve those of `rows` that are in the piece, all of one activation and type as one, in the order they are run."""
    for activation, names in readers_of(piece).items():
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            if row.source in names:
                kinds.setdefault(row.type, []).append(row)
        for kind, members in kinds.items():
            weights = [in_order(piece, row.source) for row in members]
            stats = piece.stats[activation]
            solved = ladder_gptq(torch.cat(weights), stats, lookup(kind)).rows([len(w) for w in weights])
            for row, weight, made in zip(members, weights, solved, strict=True):
                loss = weight_loss(weight, made.dequantize(), stats)
                yield Solved(row.source, {row.name: made.raw.flatten()}, None, loss)


def in_order(piece: Piece, name: str) -> Tensor:
    """A weight with its rows in GGUF's order."""
    layout = piece.refs[name].placed.weight.layout
    weight = piece.weights[name]
    return layout.to_gguf(weight, piece.model.config) if layout else weight
