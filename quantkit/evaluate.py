"""Perplexity as llama.cpp defines it, and how far a model's predictions lie from a reference model's.

Protocol (llama.cpp `tools/perplexity`): chunks of `ctx` tokens, positions ctx/2 .. ctx-2 scored, PPL = exp(mean NLL),
error = PPL * sqrt((E[nll^2] - E[nll]^2) / (n - 1)). The reference is kept as its final hidden states, from which its
logits are recomputed through its own head: exact, and vocab/hidden times smaller than stored logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.forward import Network, final_states

HEAD_LOGITS = 1 << 24  # logits computed at once, 64 MiB: 341 positions of a 49,152-token vocabulary, 64 of 262,144


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats over the scored positions."""

    mean: float
    stderr: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True)
class Score:
    """A model on a text. With a reference: KL divergence, share of equal top tokens (0..1), mean ln PPL(Q)/PPL(ref)."""

    perplexity: float
    stderr: float
    tokens: int
    chunks: int
    ctx: int
    kl_divergence: Divergence | None = None
    same_top: float | None = None
    delta_ln_ppl: float | None = None

    def record(self) -> dict[str, Any]:
        """As JSON: the keys of the reference only where there was one."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Predictions:
    """What a model says about a text: final hidden states at the scored positions (n, p, hidden), and its head."""

    hidden: Tensor
    head: Tensor  # (vocab, hidden)
    softcap: float | None

    def logprobs(self, rows: slice) -> Tensor:
        """Log-probabilities of scored positions `rows` (flattened), float32 on the head's device."""
        x = self.hidden.flatten(0, 1)[rows].to(self.head.device)
        logits = x @ self.head.T
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return torch.log_softmax(logits, -1)


def scored(ctx: int) -> slice:
    """The positions whose predictions count."""
    return slice(ctx // 2, ctx - 1)


def predict(net: Network, chunks: Tensor) -> Iterator[int | Predictions]:
    """Run `chunks` (n, ctx) through the model: yields each block's number, then the `Predictions`."""
    for step in final_states(net, chunks, scored(chunks.shape[1])):
        if isinstance(step, int):
            yield step
        else:
            yield Predictions(step, net.head(), net.model.config.get("final_logit_softcapping"))


@torch.no_grad()
def score(predictions: Predictions, chunks: Tensor, reference: Predictions | None = None) -> Score:
    """Score predictions about `chunks` (n, ctx), against a reference's predictions about the same chunks if given."""
    n, ctx = chunks.shape
    targets = chunks[:, ctx // 2 + 1 :].flatten()
    nll, nll_reference, kl, same = [], [], [], []
    step = max(1, HEAD_LOGITS // len(predictions.head))
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        ours = predictions.logprobs(rows)
        target = targets[rows, None].to(ours.device)
        nll.append(-ours.gather(1, target)[:, 0].double().cpu())
        if reference is not None:
            theirs = reference.logprobs(rows).to(ours.device)
            nll_reference.append(-theirs.gather(1, target)[:, 0].double().cpu())
            kl.append((theirs.exp() * (theirs - ours)).sum(1).double().cpu())
            same.append((theirs.argmax(1) == ours.argmax(1)).cpu())
    losses = torch.cat(nll)
    perplexity, stderr = mean_perplexity(losses)
    base = Score(perplexity, stderr, n * ctx, n, ctx)
    if reference is None:
        return base
    return replace(
        base,
        kl_divergence=divergence(torch.cat(kl)),
        same_top=torch.cat(same).double().mean().item(),
        delta_ln_ppl=(losses - torch.cat(nll_reference)).mean().item(),
    )


def mean_perplexity(nll: Tensor) -> tuple[float, float]:
    """Perplexity and its standard error from the losses of single tokens (n,), in nats."""
    mean = nll.mean().item()
    variance = max((nll * nll).mean().item() - mean * mean, 0.0)
    perplexity = math.exp(min(mean, 700.0))  # a broken model may pass what a float holds
    return perplexity, perplexity * math.sqrt(variance / max(len(nll) - 1, 1))


def divergence(kl: Tensor) -> Divergence:
    """Statistics of the KL divergences of single positions (n,)."""
    spread = kl.std(correction=1).item() / math.sqrt(len(kl)) if len(kl) > 1 else 0.0
    p50, p99 = torch.quantile(kl, torch.tensor([0.5, 0.99], dtype=kl.dtype)).tolist()
    return Divergence(kl.mean().item(), spread, p50, p99, kl.max().item())
