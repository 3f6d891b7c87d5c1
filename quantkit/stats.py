"""`Stats`: what calibration learned about one activation.

One accumulator serves every solver: the GPTQ Hessian, llama.cpp's importance matrix (its diagonal) and AWQ's activation
scale are all read off it, and shards merge by addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Sums over `rows` activation rows x of width K: `gram` sum of x^T x (K, K), `absum` sum of |x| (K,), float32."""

    gram: Tensor
    absum: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> Stats:
        """Nothing seen yet."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, x: Tensor) -> Stats:
        """With the rows of x (..., K) added. The sums grow in place: the old record must not be used again."""
        x = x.reshape(-1, x.shape[-1]).float()
        return Stats(self.gram.addmm_(x.T, x), self.absum.add_(x.abs().sum(0)), self.rows + len(x))

    def merge(self, other: Stats) -> Stats:
        """The statistics of both sets of rows."""
        return Stats(self.gram + other.gram, self.absum + other.absum, self.rows + other.rows)

    @property
    def hessian(self) -> Tensor:
        """2/rows * gram, the Hessian of the layer's squared error (IST-DASLab `gptq.py`)."""
        return self.gram * (2 / self.rows)

    @property
    def importance(self) -> Tensor:
        """Mean of x^2 per column, (K,): llama.cpp's importance matrix; without rows all columns count alike."""
        return self.gram.diagonal() / self.rows if self.rows else torch.ones_like(self.absum)

    @property
    def act_scale(self) -> Tensor:
        """Mean of |x| per column, (K,): AWQ's activation scale."""
        return self.absum / self.rows


def errors(delta: Tensor, gram: Tensor) -> Tensor:
    """The diagonal of delta gram delta^T, (N,): squared errors of each output of a weight change delta (N, K)."""
    return ((delta @ gram) * delta).sum(1)


def error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(delta gram delta^T): the squared output error of a weight change delta (N, K), summed over the rows seen."""
    return errors(delta, gram).sum()
