"""The source's blocks one after another: read, run over the calibration rows, and what was learned on the way.

While a block is solved, the next one is read; on a CPU it is run as well, for a solver's many small steps leave a core
free. That costs the memory of a second block, and on a CPU of its statistics and of what is kept of its activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from quantkit.codecs.sharing import ahead
from quantkit.forward import Network, States, readers, run, watching
from quantkit.later import Device, Tensor, on_cpu
from quantkit.model import Model, Ref
from quantkit.prefix import Kept, prefix
from quantkit.stats import Stats
from quantkit.targets.target import finite


@dataclass(frozen=True)
class Step:
    """One block of the source and what was learned from it; `before` and `kept` are as in `Inputs`."""

    layer: int
    refs: dict[str, Ref]
    weights: dict[str, Tensor]
    stats: dict[str, Stats]
    before: States | None
    kept: Kept


def walk(
    model: Model, net: Network | None, states: States | None, device: Device, shared: bool, behind: bool
) -> Iterator[Step]:
    """Every block of the source; `states` are its calibration rows, which move behind each block as it is made.

    `shared`: with statistics of the source's activations. `behind`: with what `Inputs` needs.
    """
    blocks = _blocks(model, held_at_all=states is not None)
    if states is None or net is None:
        return _steps(blocks, None, None, device, False, False)
    if on_cpu(device):
        return ahead(_steps(blocks, net, states, device, shared, behind), one_core=True)
    return _steps(ahead(blocks), net, states, device, shared, behind)


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
    shared: bool,
    behind: bool,
) -> Iterator[Step]:
    for layer, (refs, read) in enumerate(blocks):
        weights = {name: w.to(device) for name, w in read.items()}
        before, kept = prefix(states) if states and behind else None, Kept()
        stats = _statistics(net, states, layer, weights, shared, kept if behind else None) if net and states else {}
        yield Step(layer, refs, weights, stats, before, kept)


def held(refs: Mapping[str, Ref], device: Device) -> dict[str, Tensor]:
    """Tensors as they are solved: float32, on the device, finite."""
    return {name: finite(name, ref.read().to(device)) for name, ref in refs.items()}


def _statistics(
    net: Network, states: States, layer: int, weights: dict[str, Tensor], wanted: bool, kept: Kept | None
) -> dict[str, Stats]:
    """Move `states` behind a block; the statistics of its activations where an output wants the source's.

    `kept`: for the activations themselves, where an output is calibrated behind its own blocks. Statistics that go into
    files, as importance matrices do, are of float32 products: bf16's are off by 0.1%, but up to 19% in single columns.
    """
    prefix = f"model.layers.{layer}."
    with (
        net.block(layer, {n.removeprefix(prefix): w for n, w in weights.items()}) as block,
        watching(block, readers(net.model) if wanted else {}, net.device) as stats,
        kept.watching(block, net.model) if kept else nullcontext(),
        nullcontext() if wanted else net.calibrating(),
    ):
        run(states, layer, block, net.device)
    return stats
