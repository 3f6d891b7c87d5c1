"""A Gram matrix that can be inverted: a share of its mean diagonal is added to the diagonal (GPTQ's damping).

The Gram matrix of a wide layer is larger than the layer, so no function here makes more than two of its size.
"""

from __future__ import annotations

from quantkit.later import Tensor, torch

MOST_DAMP = 10.0  # no factor with this much on the diagonal: the statistics are of no use


def seen(gram: Tensor) -> Tensor:
    """The importance of each column (K,): unseen is not worthless, but an average one."""
    diagonal = gram.diagonal()
    return torch.where(diagonal == 0, diagonal.mean(), diagonal)


def inverse_factor(gram: Tensor, damp: float, order: Tensor) -> tuple[Tensor | None, float]:
    """The upper Cholesky factor (K, K) of the inverse of `gram`, damped, its columns in `order`, and the share it took.

    Where L is the factor of the matrix in the reverse order, that is the inverse of L, turned around: no inverse of the
    whole matrix is made. None where no damping gives a factor.
    """
    lower, damp = damped_factor(gram, damp, order.flip(0))
    if lower is None:
        return None, damp
    inverse = torch.eye(len(gram), device=gram.device).T
    torch.linalg.solve_triangular(lower, inverse, upper=False, left=False, out=inverse)  # takes half of left's time
    del lower
    return inverse.flip(0, 1), damp


def damped_factor(gram: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor | None, float]:
    """The lower Cholesky factor of `gram` (K, K) with `damp` of its mean diagonal added, and the share it took.

    Where there is no factor, damping is raised tenfold until there is one, and then halved again in the exponent as far
    as there still is; None past `MOST_DAMP`. With `order`, that of the matrix whose columns and rows are in this order.
    """
    lower = _factor(gram, damp, order)
    low = damp
    while lower is None and damp < MOST_DAMP:
        low, damp = damp, max(10 * damp, 1e-4)
        lower = _factor(gram, damp, order)
    if lower is None or low == damp:
        return lower, damp
    for _ in range(3):
        middle = (max(low, 1e-5) * damp) ** 0.5
        if (better := _factor(gram, middle, order)) is None:
            low = middle
        else:
            lower, damp = better, middle
    return lower, damp


def _factor(gram: Tensor, damp: float, order: Tensor | None) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(with_damping(gram, damp, order))
    return None if failed else lower


def with_damping(gram: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """`gram` with `damp` of its mean diagonal added to the diagonal, and all of it where a column was not seen."""
    damped = gram.clone() if order is None else gram[order[:, None], order]
    damped.diagonal().add_(added(damped, damp))
    return damped


def added(gram: Tensor, damp: float) -> Tensor:
    """What `with_damping` adds to the diagonal, (K,)."""
    own = gram.diagonal()
    mean = own.mean()
    return torch.where(own == 0, mean, damp * mean)
