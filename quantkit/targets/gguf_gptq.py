"""`--solver gptq` of GGUF targets: which tensors are solved with error compensation, and how their bytes come back.

Matrices whose type has a ladder are: those of the blocks under the statistics of what they read, embedding and output
matrix under those of `sensitivity.outer_statistics`. A stack of experts is encoded as ever, and so are the outer
matrices of a model that has some, and what has a type of another kind. The report names the solver of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantkit.codecs import lookup
from quantkit.solvers.ladder import Encoded, ladder_gptq
from quantkit.targets.target import Piece, Row, Solved, readers_of, weight_loss

OUTER = ("token_embd.weight", "output.weight")
SLAB = 1 << 24  # weights that are solved at a time: rows do not influence one another


def solvable(name: str, kind: str, parts: int, experts: int) -> bool:
    """Whether a tensor of so many parts, in a model of so many experts, can be compensated as type `kind`."""
    known = not experts if name in OUTER else name.startswith("blk.")
    return known and parts == 1 and lookup(kind).ladder is not None


def compensated(piece: Piece, rows: Sequence[Row]) -> Iterator[Solved]:
    """Solve those of `rows` that are in the piece, all of one activation and type as one, in the order they are run."""
    groups = readers_of(piece) or {name: [name] for name in piece.refs}
    for activation, names in groups.items():
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            if row.source in names:
                kinds.setdefault(row.type, []).append(row)
        for kind, members in kinds.items():
            weights = [in_order(piece, row.source) for row in members]
            stats, codec = piece.stats[activation], lookup(kind)
            slabs = torch.cat(weights).split(max(1, SLAB // weights[0].shape[1]))
            solved = Encoded(codec, torch.cat([ladder_gptq(slab, stats, codec).raw for slab in slabs]))
            for row, weight, made in zip(members, weights, solved.rows([len(w) for w in weights]), strict=True):
                loss = weight_loss(weight, made.dequantize(), stats)
                yield Solved(row.source, {row.name: made.raw.flatten()}, None, loss)


def in_order(piece: Piece, name: str) -> Tensor:
    """A weight with its rows in GGUF's order."""
    layout = piece.refs[name].placed.weight.layout
    weight = piece.weights[name]
    return layout.to_gguf(weight, piece.model.config) if layout else weight
