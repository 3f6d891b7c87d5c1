"""Error compensation on GGUF's own grids: GPTQ for block types whose weights have a code each (`codecs.parts`).

    w = d * scales[s] * level(code) - dmin * mins[s]

Blocks are visited by falling diag(H), as the groups of `gptq` are. When a block is due,
  - ggml's own search chooses all its fields for the weights as corrected so far, under diag(H);
  - GPTQ chooses its codes anew under the scales as they are stored, column by column;
  - `_descend` goes over all its fields again, under the Hessian that the block has where all later ones make up for it;
  - what is still wrong is handed to the later blocks.
Then `_descend` goes over the blocks again under the whole H. It is coordinate descent on tr(delta H delta^T): a row's
d, dmin, one integer scale, one minimum or one code at a time, all else as it is. The error is a parabola in each, so
the best value that the struct can hold is the one nearest to the vertex, and the error never grows.
A weight that lies on the grid already, since it was dequantized from that type, is left where it is: ggml finds its
codes again, and a solver that weighs outputs would move off them.
Rows are independent of one another: each thread solves its share of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from quantkit.codecs import Codec, decode, encode
from quantkit.codecs.parts import Ladder, Parts
from quantkit.codecs.sharing import one_each, share_out
from quantkit.later import Tensor, on_cpu, torch
from quantkit.solvers.damping import inverse_factor, seen, with_damping
from quantkit.solvers.gptq import Solution, aim, group_aware_order, of_told, require_finite, taken
from quantkit.stats import Stats

DAMP = 0.15  # of the mean diagonal, added to the diagonal
OWN_ROUNDS = 2  # of `_descend` over a block before its errors are handed on
ROUNDS = 2  # of `_descend` over all blocks
SLAB, SLAB_ELSEWHERE = 1 << 24, 1 << 28  # weights that are solved at a time: an embedding has many rows
FOUND_AGAIN = 0.05  # over levels^2: the share of its energy that ggml loses of a weight on the grid; off it, some 2
FEW = 32  # rows that are looked at first
CHUNK = 32  # columns that are updated one by one; those behind them are by one product


@dataclass(frozen=True)
class Encoded:
    """A weight (N, K) as bytes of a block type, (N, bytes of a row)."""

    codec: Codec
    raw: Tensor

    def dequantize(self) -> Tensor:
        """(N, K) float32, as a reader has it."""
        width = self.raw.shape[1] // self.codec.nbytes * self.codec.block
        return decode(self.codec.name, self.raw, (len(self.raw), width))

    def terms(self) -> tuple[Tensor, ...]:
        """What the weight is the sum of, (N, K) each: levels times scales, and of some types minima below zero."""
        assert self.codec.ladder is not None
        parts = self.codec.ladder.read(**self.codec.split(self.raw.view(-1, self.codec.nbytes)))
        plain = self.codec.ladder.values(replace(parts, dmin=None, mins=None)).view(len(self.raw), -1)
        return (plain,) if parts.dmin is None else (plain, self.dequantize() - plain)

    def times(self, factors: tuple[Tensor, ...]) -> Encoded:
        """With the super-scales of every block (N, blocks) multiplied, and those of its minima."""
        assert self.codec.ladder is not None
        parts = self.codec.ladder.read(**self.codec.split(self.raw.view(-1, self.codec.nbytes)))
        of_d, *of_dmin = (factor.reshape(-1, 1) for factor in factors)
        parts = replace(parts, d=_fp16(parts.d * of_d))
        if parts.dmin is not None:
            parts = replace(parts, dmin=_fp16(parts.dmin * of_dmin[0]))
        return replace(self, raw=self.codec.join(self.codec.ladder.write(parts)).view(self.raw.shape))

    def rows(self, sizes: list[int]) -> list[Encoded]:
        """Cut by rows: the inverse of solving several weights of one input as one."""
        return [replace(self, raw=raw) for raw in self.raw.split(sizes)]


def ladder_gptq(weight: Tensor, stats: Stats, codec: Codec, damp: float = DAMP) -> Solution[Encoded]:
    """Encode `weight` (N, K) as blocks of `codec`, which has a ladder, minimizing tr(delta H delta^T).

    Rows do not influence one another: weights that read the same activation may be stacked. Behind a quantized prefix,
    what is encoded is `aim`. Where the outcome is no better than ggml's own encoding with the importance diag(H), or
    H has no Cholesky factor, it is that encoding. BadInput where the statistics are not finite.
    """
    require_finite(stats)
    weight, gram = weight.float(), stats.gram
    if not bool(gram.any()):
        return _by_ggml(weight, stats, codec, 0.0, "no calibration token reached it")
    if there := on_grid(weight, stats, codec):
        return replace(_as_solution(there, weight, stats, 0.0, ""), order="none: it lies on the grid")
    order = group_aware_order(seen(gram), codec.block)
    upper, damp = inverse_factor(gram, damp, order)
    if upper is None:
        return _by_ggml(weight, stats, codec, damp, "its statistics have no Cholesky factor")
    goal, damped = aim(weight, stats), with_damping(gram, damp)
    found = _solved(goal, seen(gram), order, upper, damped, codec)
    made, by_ggml = taken(found, goal, gram), of_told(goal, gram, partial(_as_ggml, stats, codec))
    if made.sum() < by_ggml.sum():
        return Solution(found, made, by_ggml, taken(None, goal, gram), damp)
    return _by_ggml(goal, stats, codec, damp, "solving did no better")


def on_grid(weight: Tensor, stats: Stats, codec: Codec) -> Encoded | None:
    """`weight` (N, K) as ggml encodes it, if that gives it back as it is, but for the last bits of scales."""
    assert codec.ladder is not None
    bound = FOUND_AGAIN / len(codec.ladder.levels) ** 2
    encoded = None
    for rows in (weight[:: -(-len(weight) // FEW)], weight):
        encoded = _as_ggml(stats, codec, rows)
        missed = encoded.dequantize() - rows
        if missed.square().sum() > bound * rows.square().sum():
            return None
    return encoded


def _by_ggml(weight: Tensor, stats: Stats, codec: Codec, damp: float, why: str) -> Solution[Encoded]:
    return _as_solution(_as_ggml(stats, codec, weight), weight, stats, damp, why)


def _as_ggml(stats: Stats, codec: Codec, weight: Tensor) -> Encoded:
    return Encoded(codec, encode(codec.name, weight, stats.importance))


def _as_solution(encoded: Encoded, weight: Tensor, stats: Stats, damp: float, why: str) -> Solution[Encoded]:
    made = taken(encoded, weight, stats.gram)
    return Solution(encoded, made, made, taken(None, weight, stats.gram), damp, why)


def _solved(goal: Tensor, importance: Tensor, order: Tensor, upper: Tensor, damped: Tensor, codec: Codec) -> Encoded:
    def solved(rows: slice) -> Tensor:
        blocks = _greedy(goal[rows], importance, order, upper, codec)
        missing = goal[rows] - torch.cat([b.values() for b in blocks]).T
        left = (missing @ damped).T.contiguous()  # minus half the gradient
        for _ in range(ROUNDS):
            for i in (order[:: codec.block] // codec.block).tolist():
                own = slice(i * codec.block, (i + 1) * codec.block)
                moved = _descend(blocks[i], left[own].clone(), damped[own, own].contiguous())
                left.addmm_(damped[own].T, moved, alpha=-1)
        return torch.cat([codec.join(b.ladder.write(b.parts())) for b in blocks], 1)

    most = max(1, (SLAB if on_cpu(goal.device) else SLAB_ELSEWHERE) // goal.shape[1])
    parts = one_each(len(goal), goal.device, most=most)
    return Encoded(codec, torch.cat(share_out(solved, parts, goal.device)))


@dataclass
class _Block:
    """One block of every row at work, columns first: levels (block, N), integers (subs, N), super-scales (N,)."""

    ladder: Ladder
    levels: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor
    mins: Tensor
    affine: bool

    @classmethod
    def of(cls, ladder: Ladder, parts: Parts) -> _Block:
        levels, scales, d = ladder.level(parts.codes).T.contiguous(), parts.scales.T.contiguous(), parts.d[:, 0]
        if parts.dmin is None or parts.mins is None:
            return cls(ladder, levels, d, scales, torch.zeros_like(d), torch.zeros_like(scales), False)
        return cls(ladder, levels, d, scales, parts.dmin[:, 0], parts.mins.T.contiguous(), True)

    def parts(self) -> Parts:
        codes, d, scales = self.ladder.nearest(self.levels.T.contiguous()), self.d[:, None], self.scales.T.contiguous()
        if not self.affine:
            return Parts(codes, d, scales)
        return Parts(codes, d, scales, self.dmin[:, None], self.mins.T.contiguous())

    @property
    def sub(self) -> int:
        """Columns of a sub-block."""
        return len(self.levels) // len(self.scales)

    def values(self) -> Tensor:
        return self.levels * self.spread(self.d * self.scales) - self.spread(self.dmin * self.mins)

    def spread(self, of_subs: Tensor) -> Tensor:
        """(subs, N) -> (block, N)."""
        return of_subs.repeat_interleave(self.sub, 0)

    def nearest(self, x: Tensor) -> Tensor:
        if self.ladder.even:
            return x.round().clamp_(self.ladder.levels[0], self.ladder.levels[-1])
        return self.ladder.level(self.ladder.nearest(x))


def _greedy(goal: Tensor, importance: Tensor, order: Tensor, upper: Tensor, codec: Codec) -> list[_Block]:
    """GPTQ proper, block by block; the blocks as they lie in a row."""
    assert codec.ladder is not None
    g, w = codec.block, goal.T[order]
    done = {}
    for start in range(0, len(w), g):
        due = slice(start, start + g)
        number = int(order[start]) // g
        inside = order[due] - number * g  # the order of columns inside the block, and the way back
        back = torch.argsort(inside)
        weight, factor = w[due][back], upper[due, due]
        raw = encode(codec.name, weight.T, importance[number * g : (number + 1) * g])
        block = _Block.of(codec.ladder, codec.ladder.read(**codec.split(raw)))
        _columns(block, weight, factor, inside)
        own = torch.linalg.inv(factor.T @ factor)[back][:, back].contiguous()
        for _ in range(OWN_ROUNDS):
            _descend(block, own @ (weight - block.values()), own)
        missed = torch.linalg.solve_triangular(factor.T, (weight - block.values())[inside], upper=False)
        w[start + g :].addmm_(upper[due, start + g :].T, missed, alpha=-1)
        done[number] = block
    return [done[number] for number in range(len(done))]


def _columns(block: _Block, weight: Tensor, upper: Tensor, inside: Tensor) -> None:
    """Choose the levels of one block column by column, in the order `inside`, for `weight` (block, N)."""
    w = weight[inside]
    missed = torch.empty_like(w)
    steps, offsets = block.d * block.scales, block.dmin * block.mins
    per_step = _inverse(steps)
    places = inside.tolist()
    for first in range(0, len(w), CHUNK):
        last = first + CHUNK
        for i, j in enumerate(places[first:last], first):
            s = j // block.sub
            block.levels[j] = block.nearest((w[i] + offsets[s]) * per_step[s])
            missed[i] = (w[i] + offsets[s] - block.levels[j] * steps[s]) / upper[i, i]
            w[i + 1 : last].addr_(upper[i, i + 1 : last], missed[i], alpha=-1)
        w[last:].addmm_(upper[first:last, last:].T, missed[first:last], alpha=-1)


def _descend(block: _Block, left: Tensor, own: Tensor) -> Tensor:
    """One round over a block; `left` (block, N) is minus half the gradient, `own` the block's Hessian.

    Changes the block and `left`; returns how far the block's weights moved (block, N).
    """
    moved = torch.zeros_like(left)

    def move(columns: slice, by: Tensor) -> None:
        moved[columns] += by
        left.addmm_(own[:, columns], by, alpha=-1)

    ladder, everything = block.ladder, slice(0, len(left))
    for s in range(len(block.scales)):
        columns = slice(s * block.sub, (s + 1) * block.sub)
        if ladder.scales != (1, 1):
            along = block.levels[columns] * block.d
            new = (
                (block.scales[s] + _vertex(along, left[columns], own[columns, columns])).round_().clamp_(*ladder.scales)
            )
            move(columns, along * (new - block.scales[s]))
            block.scales[s] = new
        if ladder.mins != (1, 1):
            along = (-block.dmin).expand(block.sub, -1)
            new = (block.mins[s] + _vertex(along, left[columns], own[columns, columns])).round_().clamp_(*ladder.mins)
            move(columns, along * (new - block.mins[s]))
            block.mins[s] = new
    along = block.levels * block.spread(block.scales)
    new = _fp16(block.d + _vertex(along, left, own))
    move(everything, along * (new - block.d))
    block.d = new
    if block.affine:
        along = -block.spread(block.mins)
        new = _fp16(block.dmin + _vertex(along, left, own))
        move(everything, along * (new - block.dmin))
        block.dmin = new
    steps = block.d * block.scales
    per_step, curve = _inverse(steps), own.diagonal().clamp_min(1e-30)
    for first in range(0, len(left), CHUNK):
        columns = slice(first, first + CHUNK)
        near, corner, by = left[columns].clone(), own[columns, columns].contiguous(), torch.empty_like(left[columns])
        for i in range(CHUNK):
            j = first + i
            s = j // block.sub
            new = block.nearest(block.levels[j] + near[i] * per_step[s] / curve[j])
            by[i] = (new - block.levels[j]) * steps[s]
            near.addr_(corner[i], by[i], alpha=-1)
            block.levels[j] = new
        move(columns, by)
    return moved


def _vertex(along: Tensor, left: Tensor, own: Tensor) -> Tensor:
    """The step (N,) along `along` (k, N) that takes most off the error; 0 where none changes it."""
    curve = (along * (own @ along)).sum(0)
    return torch.where(curve > 0, (along * left).sum(0) / curve, 0.0)


def _inverse(steps: Tensor) -> Tensor:
    return torch.where(steps == 0, 0.0, 1 / steps)


def _fp16(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504).half().float()
