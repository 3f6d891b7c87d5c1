"""ggml's searches for the scale of a group of weights, as tensor operations over all groups at once.

A group runs down dimension 0: x is (k, ...), one group per remaining index, and a scale is (...). The steps and their
order are those of `ggml/src/ggml-quants.c`, because they decide bytes: products stand as C reads them (left to right),
sums add one term after the other, ties go to the first, rounding is half to even. So the codes are ggml's wherever
single operations are rounded as IEEE 754 has it. ggml itself writes others of like quality where its compiler fuses
multiplication and addition (as on 64-bit ARM; on x86 such a build differs from the usual one in 0 to 28 per cent of the
blocks, by type, and in error by less than one per cent).

    search_symmetric    make_qx_quants                       w = d * l            -nmax <= l < nmax
    search_affine       make_qkx2_quants, make_qkx3_quants   w = d * l + low      0 <= l <= nmax
    search_positive     make_qp_quants                       w = d * l            0 <= l <= nmax, w >= 0
    descend             the last loop of make_q3_quants and make_qp_quants
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from quantkit.later import Tensor, torch

A = TypeVar("A", Tensor, NDArray[np.float32])

TINY = 1e-15  # GROUP_MAX_EPS: a group below it is stored as zeros


def total(terms: A) -> A:
    """Sum over dimension 0 from first to last, in float32: torch and numpy add in other orders, device by device."""
    result: A = terms[0] + 0.0
    for term in terms[1:]:
        result += term
    return result


def quotient(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b rounded once, one of them a tensor: torch may divide by a plain number by multiplying with its inverse."""
    device = next(v.device for v in (a, b) if isinstance(v, torch.Tensor))
    a, b = (v if isinstance(v, torch.Tensor) else torch.full((), v, device=device) for v in (a, b))
    return a / b


def reciprocal(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0."""
    return torch.where(d == 0, 0.0, quotient(1.0, d))


def root(x: Tensor) -> Tensor:
    """The square root rounded once: torch's own in float32 may be one unit off (it uses MKL's fast one on a CPU)."""
    return x.double().sqrt_().float()


def lowest(x: Tensor) -> Tensor:
    """The least value of a group; of equal ones (0 and -0) the first."""
    return x.gather(0, x.argmin(0, keepdim=True))[0]


def farthest(x: Tensor) -> Tensor:
    """The value of largest magnitude, with its sign; of equal ones the first; 0, not -0, where all are zero."""
    return x.gather(0, x.abs().argmax(0, keepdim=True))[0] + 0.0


def rounded(x: Tensor, low: int, high: int) -> Tensor:
    """Round half to even and clamp, in place."""
    return x.round_().clamp_(low, high)


def _nearest_int(x: Tensor) -> Tensor:
    """ggml's `nearest_int`: adds 1.5 * 2^23 and reads the mantissa, which beyond 2^22 is not rounding any more."""
    return (((x + 12582912.0).view(torch.int32) & 0x007FFFFF) - 0x00400000).float()


def _steps(first: float, step: float, trials: Iterable[int], nmax: int) -> list[float]:
    """first + step * i + nmax for each trial i, in float32."""
    f32 = np.float32
    return [float(f32(first) + f32(step) * f32(i) + f32(nmax)) for i in trials]


def search_symmetric(x: Tensor, w: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """Scale d and codes l + nmax that make sum w (x - d l)^2 small, trying 19 scales around the obvious one.

    The obvious scale gives the value of largest magnitude the code -nmax. Returns d (...) and codes (k, ...) float32;
    an empty group has d = 0 and codes 0.
    """
    peak = farthest(x)
    empty = peak.abs() < TINY
    wx = w * x

    def fit(iscale: Tensor) -> tuple[Tensor, Tensor]:
        codes = rounded(iscale * x, -nmax, nmax - 1)
        return total(wx * codes), total((w * codes).mul_(codes))

    best_iscale = quotient(float(-nmax), peak)
    sumlx, suml2 = fit(best_iscale)
    d = torch.where(suml2 != 0, sumlx / suml2, 0.0)
    best = d * sumlx
    for numerator in _steps(0.0, 0.1, (*range(-9, 0), *range(1, 10)), nmax):
        iscale = quotient(-numerator, peak)
        sumlx, suml2 = fit(iscale)
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        scale = sumlx / suml2
        d = torch.where(better, scale, d)
        best = torch.where(better, scale * sumlx, best)
        best_iscale = torch.where(better, iscale, best_iscale)
    codes = rounded(best_iscale * x, -nmax, nmax - 1) + nmax
    return torch.where(empty, 0.0, d), torch.where(empty, 0.0, codes)


def search_affine(
    x: Tensor, w: Tensor, nmax: int, first: float, step: float, count: int, absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale d, minimum low <= 0 and codes l that make sum w (x - d l - low)^2 small; |.| for the square if `absolute`.

    Each of the count + 1 trials rounds with (nmax + first + step i) levels over the range, then solves the weighted
    least squares for d and low; an accepted low narrows the range of the trials after it. Returns d (...), low (...)
    and codes (k, ...) float32; a group of one value has d = 0 and codes 0.
    """

    def codes_of(iscale: Tensor, low: Tensor) -> Tensor:
        return rounded((x - low).mul_(iscale), 0, nmax)

    def error_of(d: Tensor, low: Tensor, codes: Tensor) -> Tensor:
        diff = (d * codes).add_(low).sub_(x)
        return total((diff.abs_() if absolute else diff.mul_(diff)).mul_(w))

    low, high = lowest(x), x.amax(0)
    low = torch.where(low > 0, 0.0, low)
    flat = high <= low
    sum_w, sum_x = total(w), total(w * x)
    iscale = quotient(float(nmax), high - low)
    d = quotient(1.0, iscale)
    best = error_of(d, low, codes_of(iscale, low))
    best_iscale, base = iscale, low
    for numerator in _steps(first, step, range(count + 1), nmax):
        iscale = quotient(numerator, high - low)
        codes = codes_of(iscale, low)
        wl = w * codes
        sum_l, sum_l2, sum_xl = total(wl), total(wl * codes), total(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_d = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = this_low > 0
        this_d = torch.where(above, sum_xl / sum_l2, this_d)
        this_low = torch.where(above, 0.0, this_low)
        error = error_of(this_d, this_low, codes)
        better = (determinant > 0) & (error < best)
        best_iscale, base = torch.where(better, iscale, best_iscale), torch.where(better, low, base)
        best, d = torch.where(better, error, best), torch.where(better, this_d, d)
        low = torch.where(better, this_low, low)
    codes = codes_of(best_iscale, base)
    return torch.where(flat, 0.0, d), low, torch.where(flat, 0.0, codes)


def stored(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers in the C type ggml keeps them in, as float32: a negative one in a uint8_t wraps around."""
    return codes.int().to(dtype).float()


def descend(
    x: Tensor, w: Tensor, codes: Tensor, low: int | None, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Improve codes (k, ...) one at a time, five times round, to raise (sum w x l)^2 / sum w l^2; returns d and codes.

    That ratio is what the best scale d = sum w x l / sum w l^2 takes off the squared error. Each code in turn moves to
    the rounded x / d of the scale d that the other codes would choose.
    """
    wx = w * x
    sumlx, suml2 = total(wx * codes), total(w * codes * codes)
    codes = stored(codes, dtype)
    for _ in range(5):
        for i in range(len(x)):
            old = codes[i]
            slx, sl2 = sumlx - wx[i] * old, suml2 - w[i] * old * old
            new = _nearest_int(x[i] * sl2 / slx).clamp_(low, high)
            movable = (slx > 0) & (sl2 > 0) & (new != old)
            slx, sl2 = slx + wx[i] * new, sl2 + w[i] * new * new
            better = movable & (slx * slx * suml2 > sumlx * sumlx * sl2)
            codes[i] = torch.where(better, stored(new, dtype), old)
            sumlx, suml2 = torch.where(better, slx, sumlx), torch.where(better, sl2, suml2)
    return torch.where(suml2 > 0, sumlx / suml2, 0.0), codes


def search_positive(x: Tensor, w: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """Scale d and codes 0 .. nmax for values x >= 0 that make sum w (x - d l)^2 small: nine scales, then `descend`.

    The rare x < 0 (the scale of a sub-block whose weights almost vanish) ends as a code of up to 255, as in ggml.
    """
    high = x.amax(0).clamp(min=0)
    empty = high < TINY

    def codes_of(iscale: Tensor) -> Tensor:
        return (iscale * x).round_().clamp_(max=nmax)

    def error_of(iscale: Tensor, codes: Tensor) -> Tensor:
        diff = x - quotient(1.0, iscale) * codes
        return total((w * diff).mul_(diff))

    iscale = quotient(float(nmax), high)
    best = error_of(iscale, stored(codes_of(iscale), torch.uint8))
    for numerator in _steps(0.0, 0.1, (*range(-4, 0), *range(1, 5)), nmax):
        this_iscale = quotient(numerator, high)
        error = error_of(this_iscale, codes_of(this_iscale))
        better = error < best
        best, iscale = torch.where(better, error, best), torch.where(better, this_iscale, iscale)
    d, codes = descend(x, w, codes_of(iscale), None, nmax, torch.uint8)
    return torch.where(empty, 0.0, d), torch.where(empty, 0.0, codes)
