"""`Stats`: what calibration learned about one activation.

One accumulator serves every solver: the GPTQ Hessian, llama.cpp's importance matrix (its diagonal) and AWQ's activation
scale are all read off it, and shards merge by addition. Where importance is all that is asked for, `Squares` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from quantkit.codecs.recode import EVERY
from quantkit.gram import add_gram, add_product, panels
from quantkit.later import Device, Tensor, on_cpu, torch

IN_CACHE = 1 << 17  # numbers that stay in a core's cache for all that is done to them
MANY = 256  # rows of a matrix that is not told of whole


@dataclass(frozen=True)
class Stats:
    """Sums over `rows` activation rows x of width K: `upper` sum of x^T x (K, K), `absum` sum of |x| (K,), float32.

    Left of its diagonal blocks `upper` holds nothing of meaning, which saves nearly half of the products; see `gram`.
    Where x is what reaches a layer behind a quantized prefix, one of two says what the source had there: `drift`, the
    sum of (x~ - x)^T x for the source's rows x~, or `wanted` (N, K), the sum of y^T x for what the layer is to give, y.
    `mixed`: the factors of products are rounded to bf16; squares, which files hold as importance, never are.
    """

    upper: Tensor
    absum: Tensor
    rows: int = 0
    drift: Tensor | None = None
    wanted: Tensor | None = None
    mixed: bool = False

    @staticmethod
    def nbytes(widths: Sequence[int]) -> int:
        """What those of activations so wide take, of the source's own."""
        return 4 * sum(k * k for k in widths)

    @classmethod
    def zeros(cls, width: int, device: Device = "cpu", mixed: bool = False) -> Stats:
        """Nothing seen yet."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device), mixed=mixed)

    def add(self, x: Tensor, source: Tensor | None = None, wanted: Tensor | None = None) -> Stats:
        """With the rows of x (..., K) added, and those the source has there, or what the layer is to give for them.

        The sums grow in place: the old record must not be used again.
        """
        x = x.reshape(-1, x.shape[-1])
        kind = torch.bfloat16 if self.mixed else torch.float32
        factor, drift, y = x.to(kind), self.drift, self.wanted
        if source is not None:
            drift = torch.zeros_like(self.upper) if drift is None else drift
            add_product(drift, (source.reshape(x.shape).float() - x.float()).to(kind), factor, self.rows)
        if wanted is not None:
            y = self.upper.new_zeros(wanted.shape[-1], x.shape[-1]) if y is None else y
            add_product(y, wanted.reshape(len(x), -1).to(kind), factor, self.rows)
        squares = self.upper.diagonal().clone()
        add_gram(self.upper, factor, self.rows)
        for part in _floats(x):
            squares.add_(part.square().sum(0))
            self.absum.add_(part.abs().sum(0))
        self.upper.diagonal().copy_(squares)
        return replace(self, rows=self.rows + len(x), drift=drift, wanted=y)

    def merge(self, other: Stats) -> Stats:
        """The statistics of both sets of rows."""
        drift, wanted = (
            None if a is None or b is None else a + b
            for a, b in ((self.drift, other.drift), (self.wanted, other.wanted))
        )
        upper, absum, rows = self.upper + other.upper, self.absum + other.absum, self.rows + other.rows
        return Stats(upper, absum, rows, drift, wanted, self.mixed)

    def permuted(self, order: Tensor) -> Stats:
        """The statistics of the columns in another order."""
        places = order[:, None], order
        drift = None if self.drift is None else self.drift[places]
        wanted = None if self.wanted is None else self.wanted[:, order]
        return Stats(self.gram[places], self.absum[order], self.rows, drift, wanted)

    def scaled(self, factor: Tensor) -> Stats:
        """The statistics of the columns, each times its `factor` (K,)."""
        rows = factor[:, None]
        drift = None if self.drift is None else (self.drift * factor).mul_(rows)
        wanted = None if self.wanted is None else self.wanted * factor
        return Stats((self.gram * factor).mul_(rows), self.absum * factor, self.rows, drift, wanted)

    @cached_property
    def gram(self) -> Tensor:
        """The sum of x^T x (K, K), whole: `upper`, with what it lacks copied into it."""
        for part in panels(len(self.upper)):
            self.upper[part.stop :, part] = self.upper[part, part.stop :].T
        return self.upper

    @property
    def squares(self) -> Tensor:
        """Sum of x^2 per column, (K,)."""
        return self.upper.diagonal()

    @property
    def importance(self) -> Tensor:
        """Mean of x^2 per column, (K,): llama.cpp's importance matrix; without rows all columns count alike."""
        return self.squares / self.rows if self.rows else torch.ones_like(self.absum)

    @property
    def act_scale(self) -> Tensor:
        """Mean of |x| per column, (K,): AWQ's activation scale."""
        return self.absum / self.rows


@dataclass(frozen=True)
class Squares:
    """Of `rows` activation rows x of width K the sum of x^2 alone, `squares` (K,) float32."""

    squares: Tensor
    rows: int = 0

    @staticmethod
    def nbytes(widths: Sequence[int]) -> int:
        """What those of activations so wide take."""
        return 4 * sum(widths)

    @classmethod
    def zeros(cls, width: int, device: Device = "cpu", mixed: bool = False) -> Squares:
        """Nothing seen yet; `mixed` says nothing here, where nothing is multiplied."""
        return cls(torch.zeros(width, device=device))

    def add(self, x: Tensor) -> Squares:
        """With the rows of x (..., K) added; the sum grows in place: the old record must not be used again."""
        x = x.reshape(-1, x.shape[-1])
        for part in _floats(x):
            self.squares.add_(part.square().sum(0))
        return replace(self, rows=self.rows + len(x))

    def merge(self, other: Squares) -> Squares:
        """Those of both sets of rows."""
        return Squares(self.squares + other.squares, self.rows + other.rows)


def _floats(x: Tensor) -> Iterator[Tensor]:
    """The rows of x (n, K) as float32, on a CPU as many at a time as stay in a cache."""
    for part in x.split(max(1, IN_CACHE // x.shape[-1]) if on_cpu(x.device) else len(x)):
        yield part.float()


def told(rows: int) -> slice:
    """The rows of a matrix of so many whose errors go into a report: of many, every eighth, for they are alike.

    Errors of all of them cost as many operations as what is done to the matrix.
    """
    return slice(None, None, EVERY if rows >= MANY else 1)


def errors(delta: Tensor, gram: Tensor) -> Tensor:
    """The diagonal of delta gram delta^T, (N,): squared errors of each output of a weight change delta (N, K)."""
    return ((delta @ gram) * delta).sum(1)


def error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(delta gram delta^T): the squared output error of a weight change delta (N, K), summed over the rows seen."""
    return errors(delta, gram).sum()
