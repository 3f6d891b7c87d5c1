"""`Stats`: what calibration learned about one activation.

One accumulator serves every solver: the GPTQ Hessian, llama.cpp's importance matrix (its diagonal) and AWQ's activation
scale are all read off it, and shards merge by addition.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.later import Tensor, torch

GRAM_BLOCK = 512  # columns, about: small beside the widths of models, large enough for full matmul speed


@dataclass(frozen=True)
class Stats:
    """Sums over `rows` activation rows x of width K: `gram` sum of x^T x (K, K), `absum` sum of |x| (K,), float32.

    `drift`, where x is what reaches a layer behind a quantized prefix: the sum of (x~ - x)^T x, x~ the source's rows.
    """

    gram: Tensor
    absum: Tensor
    rows: int = 0
    drift: Tensor | None = None

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu", drift: bool = False) -> Stats:
        """Nothing seen yet."""
        square = torch.zeros(width, width, device=device)
        return cls(square, torch.zeros(width, device=device), 0, square.clone() if drift else None)

    def add(self, x: Tensor, source: Tensor | None = None) -> Stats:
        """With the rows of x (..., K) added, and how far those of the source are from them, where that is summed.

        The sums grow in place: the old record must not be used again.
        """
        x = x.reshape(-1, x.shape[-1]).float()
        drift = self.drift
        if drift is not None and source is not None:
            drift.addmm_((source.reshape(x.shape).float() - x).T, x)
        _add_gram(self.gram, x)
        return Stats(self.gram, self.absum.add_(x.abs().sum(0)), self.rows + len(x), drift)

    def merge(self, other: Stats) -> Stats:
        """The statistics of both sets of rows."""
        drift = None if self.drift is None or other.drift is None else self.drift + other.drift
        return Stats(self.gram + other.gram, self.absum + other.absum, self.rows + other.rows, drift)

    def permuted(self, order: Tensor) -> Stats:
        """The statistics of the columns in another order."""
        drift = None if self.drift is None else self.drift[order][:, order]
        return Stats(self.gram[order][:, order], self.absum[order], self.rows, drift)

    def scaled(self, factor: Tensor) -> Stats:
        """The statistics of the columns, each times its `factor` (K,)."""
        both = factor[:, None] * factor
        drift = None if self.drift is None else self.drift * both
        return Stats(self.gram * both, self.absum * factor, self.rows, drift)

    @property
    def hessian(self) -> Tensor:
        """2/rows * gram, the Hessian of the layer's squared error (IST-DASLab `gptq.py`)."""
        return self.gram * (2 / max(self.rows, 1))

    @property
    def importance(self) -> Tensor:
        """Mean of x^2 per column, (K,): llama.cpp's importance matrix; without rows all columns count alike."""
        return self.gram.diagonal() / self.rows if self.rows else torch.ones_like(self.absum)

    @property
    def act_scale(self) -> Tensor:
        """Mean of |x| per column, (K,): AWQ's activation scale."""
        return self.absum / self.rows


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += x^T x in place. What lies over the diagonal blocks is copied from below them: almost half the work."""
    step = -(-len(gram) // max(1, round(len(gram) / GRAM_BLOCK)))
    for start in range(0, len(gram), step):
        end = start + step
        gram[start:, start:end].addmm_(x[:, start:].T, x[:, start:end])
        gram[start:end, end:] = gram[end:, start:end].T


def errors(delta: Tensor, gram: Tensor) -> Tensor:
    """The diagonal of delta gram delta^T, (N,): squared errors of each output of a weight change delta (N, K)."""
    return ((delta @ gram) * delta).sum(1)


def error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(delta gram delta^T): the squared output error of a weight change delta (N, K), summed over the rows seen."""
    return errors(delta, gram).sum()
