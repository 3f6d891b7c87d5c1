"""What a change of each matrix does to the predictions: its Fisher information, output by output, from one pass back.

To second order, changing a matrix W (N, K) by delta moves the predictions by

    KL = 1/2 * sum over n of f_n * mean over x of (delta_n . x)^2

in nats a token: x are the activations that it reads, f_n is the mean square of d log p(y) / d (W x)_n, and y is drawn
from the model's own predictions (Fisher's information, with outputs taken one by one). The way forward keeps the hidden
states before every block, the way back runs block by block with the gradient: memory is a block's, and those states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from quantkit.activations import readers
from quantkit.errors import Unsupported
from quantkit.forward import EMBEDDING, Network, States, embed, run
from quantkit.later import Tensor, nn, torch
from quantkit.stats import Stats, errors

HEAD_LOGITS = 1 << 24  # logits at once, 64 MiB
ROWS = 8  # calibration rows that are run back


@dataclass(frozen=True)
class Fisher:
    """Of one matrix (N, K): `squares` (N,) is f above, `stats` those of the activations that it reads."""

    squares: Tensor
    stats: Stats

    def divergence(self, delta: Tensor, rows: Tensor) -> float:
        """The KL of a change of which `rows` (indices into N) are known, delta (rows, K); the others count as alike."""
        moved = errors(delta, self.stats.gram) / self.stats.rows
        share = self.squares.sum() / self.squares[rows].sum().clamp_min(1e-30)
        return (0.5 * share * (self.squares[rows] * moved).sum()).item()


def fisher(net: Network, ids: Tensor, seed: int) -> Iterator[tuple[str, Mapping[str, Fisher]]]:
    """From the head back to the embedding: what is done, and the information of each of its matrices by HF name.

    `ids` are token ids (n, T), of which the first `ROWS` are taken. Of an embedding (V, hidden) the statistics are
    those of the gradient: a change of a token's row is a change of the predictions where it stands. Raises Unsupported
    for mixtures of experts.
    """
    if net.model.experts:
        raise Unsupported("mixtures of experts cannot be fitted to a size yet", hint="choose a mixture such as Q4_K_M")
    with torch.no_grad():
        states = embed(net, ids[:ROWS])
        before = []
        for layer in range(net.model.layers):
            before.append(states.hidden.clone())
            with net.block(layer) as block:
                run(states, layer, block, net.device)
    head, grad = _head(net, states.hidden, seed)
    yield "head", {EMBEDDING if _tied(net) else "lm_head.weight": head}
    for layer in reversed(range(net.model.layers)):
        with net.block(layer) as block:
            found = _back(net, replace(states, hidden=before.pop()), grad, layer, block)
        yield f"block {layer}", found
    scale = getattr(net.base.embed_tokens, "scalar_embed_scale", 1.0)
    stats = Stats.zeros(grad.shape[-1], net.device).add(grad.to(net.device) * scale)
    vocabulary = net.model.config["vocab_size"]
    alike = torch.full((vocabulary,), 1 / vocabulary, device=net.device)  # every token reads one row
    yield "embedding", {EMBEDDING: Fisher(alike, stats)}


def outer_statistics(net: Network, ids: Tensor, seed: int) -> dict[str, Stats]:
    """What error compensation needs of embedding and output matrix, by HF name: the divergence of a row's change.

    The statistics of a matrix are those of the activations that it reads; an embedding reads none, and has those of the
    gradient instead. A tied one has both, each by its weight in the divergence.
    """
    found: dict[str, Stats] = {}
    for _, part in fisher(net, ids, seed):
        for name, f in part.items():
            if net.model.tensors[name].placed.reads is None:
                gram = f.stats.gram * (f.squares.mean() / f.stats.rows)
                stats = Stats(gram, torch.zeros(len(gram), device=gram.device), 1)
                found[name] = found[name].merge(stats) if name in found else stats
    return found


def _tied(net: Network) -> bool:
    return "lm_head.weight" not in net.model.tensors


def _head(net: Network, hidden: Tensor, seed: int) -> tuple[Fisher, Tensor]:
    """The information of the output matrix, and the gradient (n, T, hidden) at the last block's output."""
    head = net.head()
    norm = net.filled(net.base.norm, {"weight": net.outer("model.norm.weight")}).requires_grad_(False)
    softcap = net.model.config.get("final_logit_softcapping")
    squares, stats = torch.zeros(len(head), device=net.device), Stats.zeros(head.shape[1], net.device)
    draw = torch.Generator().manual_seed(seed)  # the same numbers on every device
    grads = []
    for rows in hidden.flatten(0, 1).split(max(1, HEAD_LOGITS // len(head))):
        x = rows.to(net.device).requires_grad_()
        normed = norm(x)
        logits = (normed @ head.T).detach()
        capped = softcap * torch.tanh(logits / softcap) if softcap else logits
        slope = torch.softmax(capped, -1)
        drawn = _drawn(slope, torch.rand(len(slope), 1, generator=draw).to(net.device))
        slope.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=slope.dtype))
        if softcap:
            slope *= 1 - (capped / softcap) ** 2
        squares += slope.square().sum(0)
        stats = stats.add(normed.detach())
        normed.backward(slope @ head)
        grads.append(x.grad.cpu() if x.grad is not None else torch.zeros_like(rows))
    net.base.norm.to("meta")
    return Fisher(squares / stats.rows, stats), torch.cat(grads).view_as(hidden)


def _drawn(chances: Tensor, u: Tensor) -> Tensor:
    """A column of each row of `chances` (n, V), by numbers u (n, 1) that are even between 0 and 1."""
    upto = chances.cumsum(-1)
    return torch.searchsorted(upto, u * upto[:, -1:]).clamp_max(chances.shape[1] - 1)


def _back(net: Network, states: States, grad: Tensor, layer: int, block: nn.Module) -> dict[str, Fisher]:
    """The information of a block's matrices by HF name; `grad` becomes the gradient before the block, in place."""
    block.requires_grad_(False)
    with _noting(net, layer, block) as (stats, squares):
        for part in states.batches():
            x = states.hidden[part].to(net.device).requires_grad_()
            out = block(x, **states.kwargs[layer])
            (out[0] if isinstance(out, tuple) else out).backward(grad[part].to(net.device))
            assert x.grad is not None
            grad[part] = x.grad.cpu()
    names = {ref.placed.hf: ref.placed.weight.reads for ref in net.model.block(layer).values()}
    return {name: Fisher(s / stats[names[name] or ""].rows, stats[names[name] or ""]) for name, s in squares.items()}


@contextmanager
def _noting(net: Network, layer: int, block: nn.Module) -> Iterator[tuple[dict[str, Stats], dict[str, Tensor]]]:
    """Statistics of a block's activations, and by matrix the sums of squares of the gradient of what it puts out."""
    stats: dict[str, Stats] = {}
    squares: dict[str, Tensor] = {}

    def reading(activation: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            stats[activation] = stats.get(activation, Stats.zeros(x.shape[-1], x.device)).add(x)

        return hook

    def writing(name: str) -> Any:
        def back(slope: Tensor) -> None:
            added = slope.flatten(0, -2).square().sum(0)
            squares[name] = squares[name] + added if name in squares else added

        def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            out.register_hook(back)

        return hook

    prefix = f"model.layers.{layer}."
    matrices = [r.placed.hf for r in net.model.block(layer).values() if r.placed.weight.reads and len(r.shape) == 2]
    at = {name: block.get_submodule(name.removeprefix(prefix).removesuffix(".weight")) for name in matrices}
    hooks = [module.register_forward_hook(writing(name)) for name, module in at.items()]
    hooks += [block.get_submodule(path).register_forward_pre_hook(reading(a)) for a, path in readers(net.model).items()]
    try:
        yield stats, squares
    finally:
        for h in hooks:
            h.remove()
