"""Perplexity as llama.cpp defines it, and how far a model's predictions lie from a reference model's.

Protocol (llama.cpp `tools/perplexity`): chunks of `ctx` tokens, positions ctx/2 .. ctx-2 scored, PPL = exp(mean NLL),
error = PPL * sqrt((E[nll^2] - E[nll]^2) / (n - 1)); with a stride, the last `stride` positions but one. A reference is
kept as its final hidden states, from which its logits are recomputed through its own head: exact, and vocab/hidden
times smaller than stored logits. A file of llama-perplexity's is a reference too (`files.logprobs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from quantkit.forward import Network, final_states
from quantkit.later import Tensor, nn, no_grad, torch

HEAD_LOGITS = 1 << 24  # logits computed at once, 64 MiB: 341 positions of a 49,152-token vocabulary, 64 of 262,144


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats over the scored positions; the percentiles are those llama-perplexity prints."""

    mean: float
    stderr: float
    median: float
    p99: float
    max: float
    p999: float
    p95: float
    p90: float
    p10: float
    p05: float
    p01: float
    min: float


@dataclass(frozen=True)
class DeltaP:
    """Change of the probability of the token that came, -1..1: its mean and root mean square, with errors."""

    mean: float
    stderr: float
    rms: float
    rms_stderr: float


@dataclass(frozen=True)
class Positions:
    """What was measured at every scored position (n,): losses in nats, and beside a reference its losses, KL, top."""

    nll: Tensor
    nll_reference: Tensor | None = None
    kl: Tensor | None = None
    same: Tensor | None = None

    def part(self, rows: slice) -> Positions:
        """Some of the positions."""
        return Positions(**{name: values[rows] for name, values in self.tensors().items()})

    def alone(self) -> Positions:
        """Without the reference."""
        return Positions(self.nll)

    def tensors(self) -> dict[str, Tensor]:
        """By name, without what was not measured; `Positions(**tensors)` is the inverse."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class Score:
    """A model on a text. With a reference: KL divergence, change of probabilities, share of equal top tokens (0..1),
    and mean ln PPL(Q)/PPL(ref), whose error knows that both were measured on the same tokens.
    """

    perplexity: float
    stderr: float
    tokens: int
    chunks: int
    ctx: int
    kl_divergence: Divergence | None = None
    same_top: float | None = None
    delta_ln_ppl: float | None = None
    delta_ln_ppl_stderr: float | None = None
    same_top_stderr: float | None = None
    delta_p: DeltaP | None = None
    reference_perplexity: float | None = None
    positions: Positions | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """As JSON: the keys of the reference only where there was one; null for what is not finite."""
        values = asdict(replace(self, positions=None))
        return {k: _finite(v) for k, v in values.items() if v is not None}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Predictor(Protocol):
    """What a model says about a text: `counts` is (chunks, scored positions a chunk)."""

    @property
    def counts(self) -> tuple[int, int]:
        """Chunks, and scored positions in each."""

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""

    def logits(self, rows: slice) -> Tensor:
        """Logits of scored positions `rows` (flattened, of one chunk), float32 (rows, vocab)."""


class Reference(Protocol):
    """What predictions are measured against; log-probabilities up to `floor` say nothing and count for nothing."""

    @property
    def floor(self) -> float:
        """In nats; -inf where every one counts."""

    @property
    def vocabulary(self) -> int:
        """How many log-probabilities a position has."""

    def logprobs(self, rows: slice) -> Tensor:
        """Log-probabilities of scored positions `rows` (flattened, of one chunk), float32 (rows, vocab)."""


@dataclass(frozen=True)
class Predictions:
    """What a model says about a text: final hidden states at the scored positions (n, p, hidden), and its head."""

    hidden: Tensor
    head: Tensor  # (vocab, hidden)
    softcap: float | None
    floor: float = -math.inf

    @property
    def counts(self) -> tuple[int, int]:
        """Chunks, and scored positions in each."""
        return self.hidden.shape[0], self.hidden.shape[1]

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        return len(self.head)

    def logits(self, rows: slice) -> Tensor:
        """Logits of scored positions `rows` (flattened), float32 on the head's device."""
        x = self.hidden.flatten(0, 1)[rows].to(self.head.device, self.head.dtype)
        logits = (x @ self.head.T).float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def logprobs(self, rows: slice) -> Tensor:
        """Log-probabilities of scored positions `rows` (flattened), float32 on the head's device."""
        return torch.log_softmax(self.logits(rows), -1)


def scored(ctx: int, stride: int | None = None) -> slice:
    """The positions of a chunk whose predictions count; with a stride, those that no other chunk scores."""
    return slice(ctx // 2 if stride is None else ctx - stride - 1, ctx - 1)


def predict(net: Network, chunks: Tensor, stride: int | None = None) -> Iterator[int | Predictions]:
    """Run `chunks` (n, ctx) through the model: yields each block's number, then the `Predictions`."""
    for step in final_states(net, chunks, scored(chunks.shape[1], stride)):
        if isinstance(step, int):
            yield step
        else:
            yield Predictions(step, net.head(), softcap(net))


def softcap(net: Network) -> float | None:
    """What the model's logits are bounded by."""
    return net.model.config.get("final_logit_softcapping")


def score(predictions: Predictor, chunks: Tensor, reference: Reference | None = None) -> Score:
    """Score predictions about `chunks` (n, ctx), against a reference's predictions about the same chunks if given."""
    return summary(measure(predictions, chunks, reference), *chunks.shape)


@no_grad
def measure(predictions: Predictor, chunks: Tensor, reference: Reference | None = None) -> Positions:
    """Losses, and where there is a reference divergences, at every scored position of `chunks` (n, ctx)."""
    n, each = predictions.counts
    targets = chunks[:, -each:].flatten()  # a chunk's last position predicts nothing that is known
    step = min(each, max(1, HEAD_LOGITS // predictions.vocabulary))
    parts: dict[str, list[Tensor]] = {}
    for chunk in range(n):
        for start in range(chunk * each, (chunk + 1) * each, step):
            rows = slice(start, min(start + step, (chunk + 1) * each))
            for name, values in _compared(predictions, reference, rows, targets[rows, None]).items():
                parts.setdefault(name, []).append(values.cpu())
    return Positions(**{name: torch.cat(values) for name, values in parts.items()})


def _compared(predictions: Predictor, reference: Reference | None, rows: slice, target: Tensor) -> dict[str, Tensor]:
    logits = predictions.logits(rows)
    target = target.to(logits.device)
    if reference is None:
        return {"nll": (torch.logsumexp(logits, 1) - logits.gather(1, target)[:, 0]).double()}
    ours = torch.log_softmax(logits, 1)
    theirs = reference.logprobs(rows).to(ours.device)
    same = theirs.argmax(1) == ours.argmax(1)
    nll, nll_reference = (-p.gather(1, target)[:, 0].double() for p in (ours, theirs))
    return {"nll": nll, "nll_reference": nll_reference, "kl": _kl(theirs, ours, reference.floor), "same": same}


def _kl(p: Tensor, q: Tensor, floor: float) -> Tensor:
    """KL(p || q) of log-probabilities (n, vocab) over those of p above `floor`, float64 (n,); q is used up."""
    above = nn.functional.threshold(p.exp(), math.exp(floor), 0.0, inplace=True)
    return torch.sub(p, q, out=q).mul_(above).sum(1).double()


def summary(positions: Positions, chunks: int, ctx: int) -> Score:
    """The statistics of positions scored in `chunks` chunks of `ctx` tokens."""
    perplexity, stderr = mean_perplexity(positions.nll)
    base = Score(perplexity, stderr, chunks * ctx, chunks, ctx, positions=positions)
    nll, kl, same = positions.nll_reference, positions.kl, positions.same
    if nll is None or kl is None or same is None:
        return base
    ratio, ratio_error = mean_and_error(positions.nll - nll)
    top = same.double().mean().item()
    return replace(
        base,
        kl_divergence=divergence(kl),
        same_top=top,
        same_top_stderr=math.sqrt(top * (1 - top) / max(len(same) - 1, 1)),
        delta_ln_ppl=ratio,
        delta_ln_ppl_stderr=ratio_error,
        delta_p=delta_p(torch.exp(-positions.nll) - torch.exp(-nll)),
        reference_perplexity=mean_perplexity(nll)[0],
    )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, of single positions (n,).

    Of paired differences this is the covariance-aware error: var(a - b) = var a + var b - 2 cov(a, b).
    """
    error = values.std(correction=1).item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return values.mean().item(), error


def mean_perplexity(nll: Tensor) -> tuple[float, float]:
    """Perplexity and its standard error from the losses of single tokens (n,), in nats."""
    mean = nll.mean().item()
    variance = max((nll * nll).mean().item() - mean * mean, 0.0)
    perplexity = math.exp(min(mean, 700.0))  # a broken model may pass what a float holds
    return perplexity, perplexity * math.sqrt(variance / max(len(nll) - 1, 1))


def divergence(kl: Tensor) -> Divergence:
    """Statistics of the KL divergences of single positions (n,)."""
    mean, stderr = mean_and_error(kl)
    shares = {"median": 0.5, "p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "p10": 0.1, "p05": 0.05, "p01": 0.01}
    at = torch.quantile(kl, torch.tensor(list(shares.values()), dtype=kl.dtype)).tolist()
    return Divergence(
        mean=mean, stderr=stderr, max=kl.max().item(), min=kl.min().item(), **dict(zip(shares, at, strict=True))
    )


def delta_p(change: Tensor) -> DeltaP:
    """Statistics of the changes of probability of single positions (n,)."""
    square, square_error = mean_and_error(change * change)
    rms = math.sqrt(square)
    return DeltaP(*mean_and_error(change), rms, 0.5 * square_error / rms if rms else 0.0)


def by_text(positions: Positions, lengths: Sequence[int], each: int) -> list[Positions]:
    """Positions of several texts, scored one after the other, apart again: `lengths` chunks of `each` positions."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [positions.part(slice((end - n) * each, end * each)) for n, end in zip(lengths, ends, strict=True)]
