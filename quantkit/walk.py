"""The source's blocks one after another: read, run over the calibration rows, and what was learned on the way.

While a block is solved, the next one is read; on a CPU it is run as well, for a solver's many small steps leave a core
free. Who does that comes after the solver's threads, or the products of both would wait for one another. It costs the
memory of a second block, and on a CPU of its statistics and of what is kept of its activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Generic

from quantkit.activations import S, readers, watching, widths
from quantkit.codecs.sharing import Share, ahead, all_at_once, in_two
from quantkit.forward import Network, States, run
from quantkit.later import Device, Tensor, nn, on_cpu
from quantkit.model import Model, Ref
from quantkit.prefix import KEPT_BYTES, Kept, Shelf, prefix
from quantkit.targets.target import finite


@dataclass(frozen=True)
class Step(Generic[S]):
    """One block of the source and what was learned from it; `before` and `kept` are as in `Inputs`."""

    layer: int
    refs: dict[str, Ref]
    weights: dict[str, Tensor]
    stats: dict[str, S]
    before: States | None
    kept: Kept


def walk(
    model: Model,
    net: Network | None,
    states: States | None,
    device: Device,
    kind: type[S] | None,
    behind: bool,
    exact: bool = False,
) -> Iterator[Step[S]]:
    """Every block of the source; `states` are its calibration rows, which move behind each block as it is made.

    `kind`: of the statistics of the source's activations, if there are to be any. `behind`: with what `Inputs` needs,
    good until the next step is asked for. `exact`: by float32 products, for statistics that go into files, as
    importance matrices do: those of bf16 are off by 0.1%, but up to 19% in single columns.
    """
    blocks = _blocks(model, held_at_all=states is not None)
    if states is None or net is None:
        return _steps(blocks, None, None, device, None, False, False, all_at_once)
    if on_cpu(device):
        fits = kind is None or kind.nbytes(widths(model)) <= KEPT_BYTES  # each thread has sums of its own
        share = in_two(last=True) if fits else all_at_once
        return ahead(_steps(blocks, net, states, device, kind, behind, exact, share), one_core=True)
    return _steps(ahead(blocks), net, states, device, kind, behind, exact, all_at_once)


def _blocks(model: Model, held_at_all: bool) -> Iterator[tuple[dict[str, Ref], dict[str, Tensor]]]:
    """The blocks in order, by HF name, and all their weights in CPU memory, where they are held at all."""
    for layer in range(model.layers):
        refs = {ref.placed.hf: ref for ref in model.block(layer).values()}
        yield refs, held(refs, "cpu") if held_at_all else {}


def _steps(
    blocks: Iterable[tuple[dict[str, Ref], dict[str, Tensor]]],
    net: Network | None,
    states: States | None,
    device: Device,
    kind: type[S] | None,
    behind: bool,
    exact: bool,
    share: Share,
) -> Iterator[Step[S]]:
    shelves: tuple[Shelf, Shelf] = ({}, {})  # that of one block serves the next but one, when it is done with
    for layer, (refs, read) in enumerate(blocks):
        weights = {name: w.to(device) for name, w in read.items()}
        before = prefix(states) if states and behind else None
        found: tuple[dict[str, S], Kept] = {}, Kept()
        if net and states:
            shelf = shelves[layer % 2] if behind else None
            found = _statistics(net, states, layer, weights, kind, exact, shelf, share)
        yield Step(layer, refs, weights, found[0], before, found[1])


def held(refs: Mapping[str, Ref], device: Device) -> dict[str, Tensor]:
    """Tensors as they are solved: float32, on the device, finite."""
    return {name: finite(name, ref.read().to(device)) for name, ref in refs.items()}


def _statistics(
    net: Network,
    states: States,
    layer: int,
    weights: dict[str, Tensor],
    kind: type[S] | None,
    exact: bool,
    shelf: Shelf | None,
    share: Share,
) -> tuple[dict[str, S], Kept]:
    """Move `states` behind a block; the statistics of its activations, and what is kept of those themselves."""
    prefix, count = f"model.layers.{layer}.", len(list(states.batches()))
    with net.block(layer, {n.removeprefix(prefix): w for n, w in weights.items()}) as block:

        def watched(own: nn.Module) -> AbstractContextManager[dict[str, S]]:
            if kind is None:
                return nullcontext({})
            return watching(own, readers(net.model), partial(kind.zeros, device=net.device, mixed=net.mixed))

        def some(batches: slice) -> tuple[dict[str, S], Kept]:
            own = deepcopy(block, {id(p): p for p in block.parameters()})  # with hooks of its own
            room = KEPT_BYTES * (batches.stop - batches.start) // count
            kept = Kept(first=batches.start, room=room, shelf={} if shelf is None else shelf)
            with (
                watched(own) as stats,
                nullcontext() if shelf is None else kept.watching(own, net.model),
                nullcontext() if exact else net.calibrating(),
            ):
                run(states, layer, own, net.device, batches)
            return stats, kept

        (stats, kept), *others = share(some, count)
    for sums, more in others:
        stats |= {name: stats[name].merge(s) if name in stats else s for name, s in sums.items()}
        kept.take(more)
    return stats, kept
