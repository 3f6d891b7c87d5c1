"""What the matrices of an output are fed in use: activations behind its own, already quantized blocks.

Statistics of the source's activations serve every output alike, but a matrix of a quantized model never sees those. An
output may therefore have calibration rows of its own, which go through its blocks as they are solved; the source's
rows go through the source's beside them, so that `Stats.drift` tells the solver how far the two have come apart.
A module of the block all of whose matrices are solved (the attention, once the MLP is at work) is not run again: what
it gave is kept. So are, as far as `KEPT_BYTES` go, what each solved matrix gave, and the source's activations from its
one pass through the block. Memory beside that: the hidden states of both, as much again, and one batch's activations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, takewhile
from typing import Any

from quantkit.forward import Network, States, readers
from quantkit.later import Tensor, nn, no_grad, torch
from quantkit.stats import Stats

KEPT_BYTES = 2 << 30  # for each of the two, in CPU memory; what goes beyond it is computed again


class _Seen(Exception):
    """Ends a block's forward pass once the activation that is wanted was seen."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


@dataclass
class Kept:
    """Activations of the source, by the path of their reader: one tensor for each batch, in order, until it is full."""

    by_path: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    nbytes: int = 0

    @contextmanager
    def watching(self, block: nn.Module, paths: Iterable[str]) -> Iterator[None]:
        """Keep what reaches the modules at `paths` while the block runs."""
        with ExitStack() as stack:
            for path in paths:
                hook = block.get_submodule(path).register_forward_pre_hook(partial(self._keep, path))
                stack.callback(hook.remove)
            yield

    def _keep(self, path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.nbytes += args[0].nbytes
        if self.nbytes <= KEPT_BYTES:
            self.by_path[path].append(args[0].cpu())


def prefix(states: States) -> States:
    """Calibration rows for one output, which begin as the source's do."""
    return replace(states, hidden=states.hidden.clone())


@dataclass
class Inputs(Mapping[str, Stats]):
    """Statistics of a block's activations, each taken when it is asked for, behind what is solved of the block by then.

    `source` and `behind` are the hidden states before the block, `original` its weights on the device by HF name,
    `seen` what is kept of the source's activations.
    """

    net: Network
    layer: int
    source: States
    behind: States
    original: Mapping[str, Tensor]
    seen: Kept = field(default_factory=Kept)
    solved: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, Stats] = field(default_factory=dict)
    kept: dict[tuple[int, str, int], tuple[Tensor, *tuple[None, ...]]] = field(default_factory=dict)
    nbytes: int = 0

    def take(self, name: str, value: Tensor | None) -> None:
        """From now on the block has `value` (float32, on the device) for its weight `name`."""
        if value is not None:
            self.solved[name] = value.to(self.net.device, torch.float32)

    def __getitem__(self, activation: str) -> Stats:
        if activation not in self.known:
            self.known[activation] = self._measured(readers(self.net.model)[activation])
        return self.known[activation]

    def __iter__(self) -> Iterator[str]:
        return iter(readers(self.net.model))

    def __len__(self) -> int:
        return len(readers(self.net.model))

    @no_grad
    def advance(self) -> None:
        """Move the output's rows behind the block as it was solved."""
        parameters = self._parameters(self.solved)
        for part in self.behind.batches():
            out = self._run(parameters, self.behind, part, self._final(None))
            self.behind.hidden[part] = out.to(self.behind.hidden.device)

    @no_grad
    def _measured(self, path: str) -> Stats:
        ours, theirs = self._parameters(self.solved), self._parameters({})
        stats: Stats | None = None
        seen = self.seen.by_path[path]
        for i, part in enumerate(self.behind.batches()):
            x = self._reaching(path, ours, self.behind, part)
            x_source = seen[i].to(x.device) if i < len(seen) else self._reaching(path, theirs, self.source, part)
            stats = (stats or Stats.zeros(x.shape[-1], x.device, drift=True)).add(x, x_source)
        assert stats is not None  # or nothing is calibrated
        return stats

    def _reaching(self, path: str, parameters: Mapping[str, Tensor], states: States, part: slice) -> Tensor:
        """What reaches the module at `path`; the block runs no further."""

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Seen(args[0])

        hook = self.net.base.layers[self.layer].get_submodule(path).register_forward_pre_hook(stop)
        try:
            self._run(parameters, states, part, self._final(path))
        except _Seen as seen:
            return seen.x
        finally:
            hook.remove()
        raise AssertionError("a block reaches all of its matrices")

    def _final(self, path: str | None) -> list[str]:
        """The modules whose matrices are solved when the reader at `path` is due; None: the last one."""
        arch = self.net.model.arch
        paths: dict[str, list[str]] = defaultdict(list)
        for w in arch.block:
            if w.reads:
                paths[w.reads].append(arch.place_of(w))
        path = path or list(paths.values())[-1][0]
        leaves = list(chain.from_iterable(takewhile(lambda group: path not in group, paths.values())))
        whole = [part for leaf in leaves if (part := leaf.partition(".")[0]) != path.partition(".")[0]]
        return list(dict.fromkeys(whole + leaves))

    def _run(self, parameters: Mapping[str, Tensor], states: States, part: slice, over: list[str]) -> Tensor:
        """One batch through the block; of the modules `over`, whose matrices are final, what they gave is kept."""
        block, hidden = self.net.base.layers[self.layer].eval(), states.hidden[part].to(self.net.device)
        with ExitStack() as stack:
            for name in over:
                stack.enter_context(self._keeping(block.get_submodule(name), (id(states), name, part.start)))
            out = torch.func.functional_call(block, dict(parameters), (hidden,), dict(states.kwargs[self.layer]))
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def _keeping(self, module: nn.Module, key: tuple[int, str, int]) -> Iterator[None]:
        """Let `module` give what it gave before under this key, or keep what it gives: a tensor, alone or the first."""
        place: Any = module
        if key in self.kept:
            first, *others = self.kept[key]
            first = first.to(self.net.device)
            place.forward = lambda *args, **kwargs: (first, *others) if others else first
            try:
                yield
            finally:
                del place.forward
            return

        def keep(_: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
            first, *others = out if isinstance(out, tuple) else (out,)
            inside = "." in key[1]
            self.nbytes += first.nbytes * inside
            if not inside or self.nbytes <= KEPT_BYTES:
                self.kept[key] = (first.to(self.behind.hidden.device), *(None for _ in others))

        hook = module.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def _parameters(self, solved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prefix = f"model.layers.{self.layer}."
        weights = {**self.original, **solved}
        return self.net.model.arch.parameters({name.removeprefix(prefix): w for name, w in weights.items()})
