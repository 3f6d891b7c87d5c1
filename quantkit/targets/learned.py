"""`--solver learned`: every matrix of a block is solved first, then the ranges of all of them are learned together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from quantkit.errors import UsageError
from quantkit.targets.target import Piece, Solved


def require_behind(below: bool, target: str) -> None:
    """UsageError where ranges are to be learned and blocks are not calibrated behind those that are solved."""
    if not below:
        what = "ranges are learned behind quantized layers, and not in mixtures of experts"
        raise UsageError(what, where=target, hint="use --solver gptq, or leave out --inputs source")


def learned(solve: Callable[[Piece], Iterator[Solved]]) -> Callable[[Piece], Iterator[Solved]]:
    """How an output solves a piece whose ranges are learned: as `solve` does, and what has ranges once more after that.

    Where a piece has nothing to learn from - a tensor outside the blocks - it is `solve`.
    """

    def both(piece: Piece) -> Iterator[Solved]:
        if piece.learn is None:
            yield from solve(piece)
            return
        ranged = {}
        for solved in solve(piece):
            if solved.ranged is not None:
                ranged[solved.source] = solved.ranged()
            yield replace(solved, draft=solved.ranged is not None)
        factors, left = piece.learn(ranged) if ranged else ({}, 1.0)
        for name, r in ranged.items():
            done = r.done(factors[name])
            yield replace(done, log=done.log | {"block_left": left})

    return both
