"""`--solver gptq` of GGUF targets: which tensors are solved with error compensation, and how their bytes come back.

Matrices whose type has a ladder are: those of the blocks under the statistics of what they read, embedding and output
matrix under those of `sensitivity.outer_statistics`. A stack of experts is encoded as ever, and so are the outer
matrices of a model that has some, and what has a type of another kind. The report names the solver of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from quantkit.codecs import decode, lookup
from quantkit.later import Tensor, torch
from quantkit.solvers.gptq import Solution
from quantkit.solvers.ladder import Encoded, ladder_gptq
from quantkit.solvers.learned import Factors, Ranged
from quantkit.targets.folder import readers_of
from quantkit.targets.target import LEARNED, Piece, Row, Solved, stacked

OUTER = ("token_embd.weight", "output.weight")
COMPENSATED = ("gptq", LEARNED)  # the solvers


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
            weights = [ordered(piece, row.source, piece.weights[row.source]) for row in members]
            found = ladder_gptq(stacked(weights), piece.stats[activation], lookup(kind))
            for row, s in zip(members, found.rows([len(w) for w in weights]), strict=True):
                yield _done(piece, row, s.quantized, s)


def _done(piece: Piece, row: Row, encoded: Encoded, found: Solution[Encoded]) -> Solved:
    """A tensor with the loss and the log of its solution, and its ranges as learning moves them, rows in HF's order."""

    def ranged() -> Ranged:
        terms = tuple(ordered(piece, row.source, term, back=True) for term in encoded.terms())
        columns = torch.arange(terms[0].shape[1], device=terms[0].device)
        return Ranged(terms, columns // encoded.codec.block, again)

    def again(factors: Factors) -> Solved:
        return _done(piece, row, encoded.times(tuple(ordered(piece, row.source, f) for f in factors)), found)

    value = ordered(piece, row.source, encoded.dequantize(), back=True)
    parts = {row.name: encoded.raw.flatten()}
    return Solved(row.source, parts, value, found.loss, found.log, ranged=ranged)


def ordered(piece: Piece, name: str, weight: Tensor, back: bool = False) -> Tensor:
    """A weight's rows in GGUF's order, or `back` in HF's."""
    layout = piece.refs[name].placed.weight.layout
    if layout is None:
        return weight
    return (layout.to_hf if back else layout.to_gguf)(weight, piece.model.config)


def known(piece: Piece, row: Row, solved: Solved) -> Solved:
    """`solved`, with the weight that a reader gets: the layers behind it are solved for that."""
    if solved.value is not None or row.solver == "copy" or len(row.shape) != 2:
        return solved
    value = decode(row.type, solved.parts[row.name], row.shape)
    return replace(solved, value=ordered(piece, row.source, value, back=True))
