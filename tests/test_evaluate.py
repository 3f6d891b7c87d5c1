"""The scorer in closed form: perplexity, its error, divergence, and the positions that count."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit.evaluate import Predictions, divergence, mean_perplexity, score, scored

VOCAB, HIDDEN, N, CTX = 11, 7, 3, 12


def predictions(seed: int) -> Predictions:
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(VOCAB, HIDDEN, generator=g)
    return Predictions(torch.randn(N, CTX // 2 - 1, HIDDEN, generator=g), head, None)


def chunks() -> torch.Tensor:
    return torch.randint(VOCAB, (N, CTX), generator=torch.Generator().manual_seed(9))


def test_the_second_half_but_the_last_position_is_scored():
    assert list(range(512))[scored(512)] == list(range(256, 511))


def test_perplexity_and_its_error_as_llama_cpp_has_them():
    nll = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    perplexity, stderr = mean_perplexity(nll)
    assert perplexity == pytest.approx(math.exp(3))
    assert stderr == pytest.approx(math.exp(3) * math.sqrt((46 / 4 - 9) / 3))


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    flat = Predictions(torch.zeros(N, CTX // 2 - 1, HIDDEN), torch.zeros(VOCAB, HIDDEN), None)
    assert score(flat, chunks()).perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_scores_against_a_reference_are_those_of_the_definitions():
    ours, theirs, ids = predictions(1), predictions(2), chunks()
    p = (theirs.hidden @ theirs.head.T).double().flatten(0, 1).log_softmax(-1)
    q = (ours.hidden @ ours.head.T).double().flatten(0, 1).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    target = ids[:, CTX // 2 + 1 :].flatten()[:, None]
    made = score(ours, ids, theirs)
    assert made.tokens == N * CTX and made.chunks == N and made.ctx == CTX
    assert made.kl_divergence.mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert made.kl_divergence.stderr == pytest.approx((kl.std() / math.sqrt(len(kl))).item(), rel=1e-5)
    assert made.kl_divergence.median == pytest.approx(torch.quantile(kl, 0.5).item(), rel=1e-5)
    assert made.kl_divergence.max == pytest.approx(kl.max().item(), rel=1e-5)
    assert made.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert made.delta_ln_ppl == pytest.approx((p.gather(1, target) - q.gather(1, target)).mean().item(), rel=1e-4)


def test_a_model_is_no_distance_from_itself():
    same = score(predictions(1), chunks(), predictions(1))
    assert same.kl_divergence.mean == 0 and same.same_top == 1 and same.delta_ln_ppl == 0


def test_one_position_has_no_spread():
    assert divergence(torch.tensor([0.25], dtype=torch.float64)).stderr == 0


def test_a_softcap_bounds_logits():
    plain = predictions(3)
    capped = Predictions(plain.hidden, plain.head * 100, softcap=2.0)
    logits = 2.0 * torch.tanh(plain.hidden.flatten(0, 1) @ plain.head.T * 100 / 2.0)
    assert torch.allclose(capped.logprobs(slice(None)), torch.log_softmax(logits, -1), atol=1e-6)
