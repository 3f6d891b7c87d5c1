"""Solvers against closed forms, and against rounding under the objective they minimize."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.codecs.grid import Grid, Quantized
from quantkit.errors import BadInput
from quantkit.solvers import gptq as solver
from quantkit.solvers.awq import awq_round, awq_scale, compensated
from quantkit.solvers.damping import damped_factor, inverse_factor
from quantkit.solvers.gptq import group_aware_order
from quantkit.solvers.rtn import rtn, weighted
from quantkit.stats import Stats, error, errors

N, K, G = 48, 96, 32


def correlated(seed: int = 0, rows: int = 400, width: int = K) -> Stats:
    """Statistics of activations in which columns depend on one another and differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width)
    x = torch.randn(rows, width, generator=g) @ mix * (0.1 + 3 * torch.rand(width, generator=g) ** 4)
    return Stats.zeros(width).add(x)


def gptq(weight: torch.Tensor, stats: Stats, grid: Grid, **options: float) -> Quantized:
    return solver.gptq(weight, stats, grid, **options).quantized


def weight(seed: int = 1, n: int = N, width: int = K) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_on_its_own_objective(bits, symmetric):
    w, stats, grid = weight(), correlated(), Grid(bits, G, symmetric)
    solved, rounded = (error(q.dequantize() - w, stats.gram) for q in (gptq(w, stats, grid), rtn(w, grid)))
    assert solved < 0.5 * rounded


def test_gptq_without_correlations_is_rounding_to_nearest():
    """With a diagonal H there is nothing to make up for: every code is the nearest one."""
    w, grid = weight(), Grid(4, G)
    stats = Stats(torch.diag(torch.rand(K) + 0.5), torch.ones(K), 100)
    q = gptq(w, stats, grid)
    nearest = grid.codes(w.unflatten(1, (-1, G)), q.scales.float(), q.zeros.float()).flatten(1)
    assert torch.equal(q.codes.float(), nearest)


def test_gptq_corrects_the_last_column_as_the_closed_form_says():
    """Two columns, one group: the second is rounded at w2 + (w1 - q1) * h12 / h22 (Frantar et al. 2022, eq. 2)."""
    h = torch.tensor([[4.0, 1.5], [1.5, 2.0]])
    w = torch.tensor([[0.83, -0.41], [0.27, 0.64]])
    q = gptq(w, Stats(h * 50, torch.ones(2), 100), Grid(3, 2), damp=0.0, polishing=0)
    scale, values = q.scales.float(), q.dequantize()
    second = w[:, 1] + (w[:, 0] - values[:, 0]) * h[0, 1] / h[1, 1]
    assert torch.equal(q.codes[:, 1].float(), torch.round(second / scale[:, 0] + 4).clamp(0, 7))


def test_rows_may_be_stacked():
    w, stats, grid = weight(), correlated(), Grid(4, G)
    whole = gptq(w, stats, grid).rows([20, 28])
    for part, rows in zip(whole, (w[:20], w[20:]), strict=True):
        assert torch.equal(part.codes, gptq(rows, stats, grid).codes)


def test_the_order_keeps_groups_together():
    importance = torch.rand(K, generator=torch.Generator().manual_seed(2))
    order = group_aware_order(importance, G)
    assert sorted(order.tolist()) == list(range(K))
    blocks = order.view(-1, G)
    assert all(len(set((b // G).tolist())) == 1 for b in blocks)
    assert all(importance[b].diff().max() <= 0 for b in blocks)
    assert importance[blocks[:, 0]].diff().max() <= 0


def test_dead_columns_are_rounded_and_left_alone():
    x = torch.randn(200, K, generator=torch.Generator().manual_seed(3))
    x[:, 5:9] = 0
    w, grid = weight(), Grid(8, G)
    back = gptq(w, Stats.zeros(K).add(x), grid).dequantize()
    assert torch.allclose(back[:, 5:9], w[:, 5:9], atol=0.03)


@pytest.mark.parametrize("solve", [lambda w, _, grid: rtn(w, grid), gptq])
def test_all_zero_rows_groups_and_weights_stay_zero(solve):
    w = weight()
    w[3] = 0
    w[:, G : 2 * G] = 0
    back = solve(w, correlated(), Grid(4, G)).dequantize()
    assert bool(torch.isfinite(back).all()) and torch.equal(back[3], torch.zeros(K))


def test_few_rows_give_a_singular_hessian_and_still_an_answer():
    stats = Stats.zeros(K).add(torch.randn(3, K, generator=torch.Generator().manual_seed(4)))
    w, grid = weight(), Grid(4, G)
    solved, rounded = (error(q.dequantize() - w, stats.gram) for q in (gptq(w, stats, grid), rtn(w, grid)))
    assert solved < rounded < torch.inf


def test_the_factor_is_that_of_the_damped_hessian():
    h = correlated().gram
    lower, damp = damped_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(K)
    size = damped.diagonal().sqrt()  # rounding in a Cholesky factor is of the size of the two columns, not of the entry
    assert damp == 0.01
    assert torch.allclose(lower @ lower.T / size / size[:, None], damped / size / size[:, None], rtol=0, atol=1e-6)


def test_the_factor_of_the_inverse_is_that_in_the_order_of_the_columns():
    h, order = correlated().gram, torch.randperm(K, generator=torch.Generator().manual_seed(8))
    upper, damp = inverse_factor(h, 0.01, order)
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(K))[order][:, order]
    assert damp == 0.01 and torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(K), atol=1e-4)


def test_damping_is_the_least_that_gives_a_factor_and_is_reported():
    """An eigenvalue of -c needs a damping of c over the mean diagonal: it is met within an eighth of a decade."""
    turn = torch.linalg.qr(torch.randn(K, K, generator=torch.Generator().manual_seed(7)))[0]
    spectrum = torch.linspace(0, 2, K)
    spectrum[0] = -0.003
    h = turn @ torch.diag(spectrum) @ turn.T
    h = (h + h.T) / 2
    mean, least = h.diagonal().mean(), 0.003 / h.diagonal().mean().item()
    lower, damp = damped_factor(h, 1e-5)
    assert least < damp < 1.01 * least * 10 ** (1 / 8)
    assert torch.allclose(lower @ lower.T, h + damp * mean * torch.eye(K), atol=1e-5)
    found = solver.gptq(weight(), Stats(h * 50, torch.ones(K), 100), Grid(4, G), damp=1e-5)
    assert found.log["damp"] == pytest.approx(damp)


def test_statistics_that_no_damping_helps_are_reported():
    stats = Stats(-torch.eye(K), torch.ones(K), 100)
    found = solver.gptq(weight(), stats, Grid(4, G))
    assert torch.equal(found.quantized.codes, rtn(weight(), Grid(4, G)).codes)
    assert found.log["fallback"] == "its statistics have no Cholesky factor"


def test_all_zero_statistics_round_and_report():
    found = solver.gptq(weight(), Stats.zeros(K), Grid(4, G))
    assert torch.equal(found.quantized.codes, rtn(weight(), Grid(4, G)).codes)
    assert found.log["fallback"] == "no calibration token reached it" and found.loss == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_polishing_never_lets_the_damped_error_grow(bits, symmetric):
    """Of no row, in no pass, whatever codes it begins with; and it gains."""
    w, grid = weight(), Grid(bits, G, symmetric)
    lower, _ = damped_factor(correlated().gram, 0.05)
    damped, q = lower @ lower.T, rtn(w, grid)
    made = [errors(q.dequantize() - w, damped)]
    for _ in range(4):
        q = solver.polish(w, damped, q, grid)
        made.append(errors(q.dequantize() - w, damped))
        assert bool((made[-1] <= made[-2] * (1 + 1e-5)).all())
    assert made[-1].sum() < 0.7 * made[0].sum()


@pytest.mark.parametrize("spoilt", [-1.0, torch.nan])
def test_where_solving_goes_wrong_the_weight_is_rounded(monkeypatch, spoilt):
    w, stats, grid = weight(n=300), correlated(), Grid(4, G)  # so many rows that some are told of
    monkeypatch.setattr(solver, "_reconsidered", lambda *args: replace(args[3], scales=args[3].scales * spoilt))
    found = solver.gptq(w, stats, grid)
    assert found.fallback == "solving did worse" and torch.equal(found.quantized.codes, rtn(w, grid).codes)


def test_rounding_under_importance_is_row_by_row_however_many_there_are(monkeypatch):
    w, stats, grid = weight(n=64), correlated(), Grid(4, G)
    whole = weighted(w, stats, grid)
    monkeypatch.setattr("quantkit.codecs.sharing.SLAB", 5 * K)
    assert torch.equal(weighted(w, stats, grid).dequantize(), whole.dequantize())
    assert error(whole.dequantize() - w, torch.diag(stats.importance)) < error(
        rtn(w, grid).dequantize() - w, torch.diag(stats.importance)
    )


def test_statistics_that_are_not_finite_are_refused():
    stats = correlated()
    with pytest.raises(BadInput, match="not finite"):
        gptq(weight(), Stats(stats.gram * torch.inf, stats.absum, stats.rows), Grid(4, G))


def test_awq_scales_and_clips_only_where_that_helps():
    w, stats, grid = weight(), correlated(), Grid(4, G, symmetric=False)
    plain = error(rtn(w, grid).dequantize() - w, stats.gram)
    scale = awq_scale(w, stats, grid)
    scaled = error(rtn(w * scale, grid).dequantize() / scale - w, stats.gram)
    clipped = error(awq_round(w * scale, stats, grid, scale).dequantize() / scale - w, stats.gram)
    assert scaled < plain and clipped < scaled


def test_awq_clips_a_group_behind_the_errors_of_all_others():
    """So that no row is worse than rounded; by each group's own errors alone, rows that share their inputs are."""
    x = torch.randn(400, K // G, generator=torch.Generator().manual_seed(3)).repeat_interleave(G, 1)
    stats = Stats.zeros(K).add(x + 0.1 * torch.randn(400, K, generator=torch.Generator().manual_seed(4)))
    w, grid = weight(n=500), Grid(3, G, symmetric=False)
    clipped, rounded = (
        errors(q.dequantize() - w, stats.gram) for q in (awq_round(w, stats, grid, torch.ones(K)), rtn(w, grid))
    )
    assert bool((clipped <= rounded * (1 + 1e-5)).all()) and clipped.sum() < 0.5 * rounded.sum()


def test_awq_leaves_columns_without_activations_unscaled():
    x = torch.randn(200, K, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.01, 5, K)
    x[:, 7] = 0
    scale = awq_scale(weight(), Stats.zeros(K).add(x), Grid(4, G, symmetric=False))
    assert bool(torch.isfinite(scale).all()) and scale[7] == 1 and bool((scale > 0).all())


def test_statistics_merge_like_one_pass():
    g = torch.Generator().manual_seed(6)
    x = torch.randn(5, 7, K, generator=g)
    whole = Stats.zeros(K).add(x)
    merged = Stats.zeros(K).add(x[:2]).merge(Stats.zeros(K).add(x[2:]))
    flat = x.flatten(0, 1)
    assert merged.rows == whole.rows == 35
    assert torch.allclose(merged.gram, whole.gram, rtol=1e-5, atol=1e-4)
    assert torch.allclose(whole.importance, flat.square().mean(0), rtol=1e-5)
    assert torch.allclose(whole.act_scale, flat.abs().mean(0), rtol=1e-5)
    delta = weight()
    assert torch.allclose(error(delta, whole.gram), (flat @ delta.T).square().sum(), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_gptq_chose_lose_less_under_gptq(symmetric):
    """Columns of activations that differ in size: the exponent is not the one that rounding would choose."""
    w, stats, grid = weight(), correlated(), Grid(4, G, symmetric)

    def lost(scale: torch.Tensor) -> float:
        return error(compensated(w, scale, stats, grid) - w, stats.gram).item()

    by_gptq, by_rounding = awq_scale(w, stats, grid, compensated), awq_scale(w, stats, grid)
    assert lost(by_gptq) < lost(torch.ones(K)) and lost(by_gptq) <= lost(by_rounding)
