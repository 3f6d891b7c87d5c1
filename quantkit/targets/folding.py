"""AWQ's folds: column scales moved into what makes an activation, and what each weight was before.

A scale multiplies the columns of the matrices that read an activation and divides the rows of what makes it, so that
the block computes the same. Which weights those are is read off the architecture's table (`Architecture.folds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from quantkit.later import Tensor, torch
from quantkit.model import in_rows
from quantkit.stats import Stats
from quantkit.targets.folder import scarce
from quantkit.targets.target import Piece, Solved, stacked
from quantkit.targets.unsolved import dense

Search = Callable[[Tensor, Stats], Tensor]  # weights (N, K) that read an activation, its statistics -> its scales (K,)


@dataclass(frozen=True)
class Folded:
    """A block's weights with the scales moved in, and the scales: of each reader's columns, of each maker's rows."""

    weights: dict[str, Tensor]
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def column(self, name: str) -> Tensor:
        """The scales of the columns of a matrix: (K,), or one 1 for all."""
        return self.columns.get(name, torch.ones(1, device=self.weights[name].device))

    def plain(self, piece: Piece, name: str) -> Solved:
        """A tensor that no solver works on, as fp16."""
        rows = in_rows(self.weights[name]) if name in self.weights else piece.rows(name)
        return dense(name, rows, piece.refs[name].shape, torch.float16, piece.device)

    def undone(self, name: str, value: Tensor) -> Tensor:
        """What `value`, solved for the folded matrix `name`, is in the block as it was."""
        value = value / self.column(name)
        return value * self.rows[name][:, None] if name in self.rows else value


def fold(piece: Piece, search: Search) -> Folded:
    """Search a scale for every activation that can be scaled, and fold it.

    The last activation of the block comes first, so that a producer's rows are final when its own columns are searched.
    A producer of another width (the value projection under grouped-query attention) leaves its activation unscaled, and
    an expert that too few tokens asked for its own.
    """
    done = Folded(dict(piece.weights))
    weights = done.weights
    for maker, names, activation in _sites(piece):
        searched = [weights[n] for n in names if not piece.refs[n].placed.weight.kept]
        if weights[maker].shape[0] != searched[0].shape[1] or scarce(piece, activation):
            continue
        scale = search(stacked(searched), (piece.source or piece.stats)[activation])
        for n in names:
            weights[n] = weights[n] * scale
            done.columns[n] = scale
        producer = piece.refs[maker].placed.weight
        for n in (maker, maker.removesuffix(".weight") + ".bias"):
            if n in weights:
                weights[n] = producer.divided(weights[n], scale, piece.model.config)
        done.rows[maker] = scale
    return done


def _sites(piece: Piece) -> Iterator[tuple[str, list[str], str]]:
    """What makes an activation, what reads it, and its name: the last of a block first, each expert's for itself.

    All experts together read what the router reads, whose statistics are of every token.
    """
    at: dict[str, list[tuple[int | None, str]]] = {}
    for name, ref in piece.refs.items():
        if name.endswith(".weight"):
            at.setdefault(ref.placed.weight.gguf, []).append((ref.placed.expert, name))
    for producer, consumers in reversed(piece.model.arch.folds()):
        for expert, maker in at.get(producer.gguf, []):
            names = [n for c in consumers for e, n in at[c.gguf] if expert is None or e == expert]
            if names:
                yield maker, names, f"{producer.writes}" if expert is None else f"{producer.writes}.{expert}"
