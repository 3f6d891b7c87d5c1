"""What the matrices of an output are fed in use: activations behind its own, already quantized blocks.

Statistics of the source's activations serve every output alike, but a matrix of a quantized model never sees those. An
output may therefore have calibration rows of its own, which go through its blocks as they are solved; the source's
rows go through the source's beside them, so that `Stats.drift` tells the solver how far the two have come apart. A
matrix whose outcome is added to the residual stream is told what that takes to bring the stream back to where the
source's is (`Stats.wanted`): it makes up for what the stream has lost before it, too.
No part of a block is run twice: what reached the last matrix of a module (of the attention, of the MLP) is kept, and
the next pass begins with what that matrix, solved by then, makes of it. Kept are also the source's activations from its
one pass through the block, both as far as `KEPT_BYTES` go. Memory beside that: the hidden states of both, what reached
the attention's last matrix and what came of it, as much again each, and one batch's activations; those of two on a CPU,
where each of two threads takes half of the batches: the steps of one batch are too short to be shared by both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, TypeVar

from quantkit.activations import readers, widths
from quantkit.codecs.sharing import Share, all_at_once, in_two
from quantkit.forward import Network, States
from quantkit.later import Tensor, nn, on_cpu, torch
from quantkit.model import Model
from quantkit.solvers.learned import HELD_OUT, ROWS, Factors, Ranged, learn
from quantkit.stats import Stats

KEPT_BYTES = 2 << 30  # for each of the two, in CPU memory; what goes beyond it is computed again
Notes = tuple[str, int]  # a module, and how many values it returns beside its first
Place = tuple[int, str, int]  # of which rows, before which reader, from which row on
Shelf = dict[tuple[str, int], Tensor]  # by reader and batch
Batches = Sequence[tuple[int, slice]]  # each with its number
T = TypeVar("T")


class _Seen(Exception):
    """Ends a block's forward pass once the activation that is wanted was seen."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


@dataclass
class Kept:
    """Activations of the source, by the path of their reader and the number of the batch, until it is full.

    Of a reader that writes the residual stream, the stream behind it and not what it reads.
    `ends`: the readers whose outcome is what their module of the block returns first, such as self_attn.o_proj.
    `first` is the number of the first batch that will be watched. `shelf` is the memory of an earlier block's that is
    needed no more: tensors that are made anew for every block and live as long leave the heap full of holes.
    """

    by_path: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    ends: dict[str, Notes] = field(default_factory=dict)
    room: int = field(default_factory=lambda: KEPT_BYTES)
    first: int = 0
    shelf: Shelf = field(default_factory=dict)

    @contextmanager
    def watching(self, block: nn.Module, model: Model) -> Iterator[None]:
        """Keep what is needed of every reader while the block runs, and note which of them end a module."""
        given: dict[str, Tensor] = {}
        paths, stream = readers(model).values(), model.arch.residual()
        lasts = {path.partition(".")[0]: path for path in paths if "." in path}

        def end(name: str, path: str, _: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
            first, *others = _tuple(out)
            if first is given.pop(path):
                self.ends[path] = name, len(others)

        with ExitStack() as stack:
            for path in paths:
                place = stream.get(path, path)
                if place is None:
                    hook = block.register_forward_hook(lambda _, args, out, path=path: self._keep(path, _, _tuple(out)))
                else:
                    hook = block.get_submodule(place).register_forward_pre_hook(partial(self._keep, path))
                stack.callback(hook.remove)
            for name, path in lasts.items():
                last = block.get_submodule(path)
                hook = last.register_forward_hook(lambda _, args, out, path=path: given.update({path: out}))
                stack.callback(hook.remove)
                stack.callback(block.get_submodule(name).register_forward_hook(partial(end, name, path)).remove)
            yield

    def take(self, other: Kept) -> None:
        """Also what was kept of other batches."""
        self.ends = other.ends
        for path, batches in other.by_path.items():
            self.by_path[path].update(batches)

    def _keep(self, path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, number = args[0], self.first + len(self.by_path[path])
        self.room -= x.nbytes
        if self.room >= 0:
            place = self.shelf.get((path, number))
            if place is None or place.shape != x.shape or place.dtype != x.dtype:
                place = self.shelf[path, number] = torch.empty_like(x, device="cpu")
            self.by_path[path][number] = place.copy_(x)


def prefix(states: States) -> States:
    """Calibration rows for one output, which begin as the source's do."""
    return replace(states, hidden=states.hidden.clone())


def second_sums(model: Model) -> int:
    """Bytes of a second thread's two sums over the widest activation; 0 where there is no room for them."""
    nbytes = 2 * Stats.nbytes([max(widths(model))])
    return nbytes if 2 * nbytes <= KEPT_BYTES else 0


@dataclass
class Inputs(Mapping[str, Stats]):
    """Statistics of a block's activations, each taken when it is asked for, behind what is solved of the block by then.

    `source` and `behind` are the hidden states before the block, `original` its weights on the device by HF name,
    `seen` what is kept of the source's activations; `reached`, by rows, reader and batch, what reached the end of a
    module, and `left` the weight that met it there with what came of the two.
    """

    net: Network
    layer: int
    source: States
    behind: States
    original: Mapping[str, Tensor]
    seen: Kept = field(default_factory=Kept)
    solved: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, Stats] = field(default_factory=dict)
    reached: dict[Place, Tensor] = field(default_factory=dict)
    left: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)

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

    def learn(self, ranged: Mapping[str, Ranged]) -> tuple[dict[str, Factors], float]:
        """Factors of the ranges of the block's matrices by HF name, and the share of the block's error that is left.

        The last of the calibration rows are held out: the share is theirs, and factors are 1 where learning did no
        better on them. What is solved of the block is kept as it is.
        """
        self.reached.clear()  # these are of weights that change now
        self.left.clear()
        goal, theirs = torch.empty_like(self.source.hidden), self._parameters({})

        def run(block: nn.Module, batches: Batches) -> None:
            for _, part in batches:
                goal[part] = self._run(block, theirs, self.source.hidden[part].to(self.net.device)).to(goal.device)

        self._shared(run)

        held = range(len(goal) - max(1, len(goal) // HELD_OUT), len(goal))
        taught = range(held.start) or held  # one row alone serves for both

        def loss(weights: Mapping[str, Tensor], rows: list[int]) -> Tensor:
            wanted, device = goal[rows].to(self.net.device), self.net.device
            parameters, block = self._parameters({**self.solved, **weights}), deepcopy(self._block)
            made = self._run(block, parameters, self.behind.hidden[rows].to(device))
            return ((made - wanted).square().mean(-1) / wanted.square().mean(-1)).mean()  # a token counts as any other

        def error(factors: Mapping[str, Factors]) -> float:
            made = {name: r.done(factors[name]).value for name, r in ranged.items()}
            with torch.no_grad():
                parts = [list(held[at : at + ROWS]) for at in range(0, len(held), ROWS)]
                return sum(loss(made, rows).item() * len(rows) for rows in parts)

        unmoved = {name: r.unmoved() for name, r in ranged.items()}
        learned = learn(ranged, loss, len(taught), self.layer, self._share)
        before, after = error(unmoved), error(learned)
        return (learned, after / before) if after < before else (unmoved, 1.0)

    def advance(self) -> None:
        """Move the output's rows behind the block as it was solved."""
        parameters = self._parameters(self.solved)

        def moved(block: nn.Module, batches: Batches) -> None:
            for _, part in batches:
                out = self._passed(block, parameters, self.behind, part)
                self.behind.hidden[part] = out.to(self.behind.hidden.device)

        self._shared(moved)

    def _measured(self, path: str) -> Stats:
        ours, theirs = self._parameters(self.solved), self._parameters({})
        seen, stream = self.seen.by_path[path], self.net.model.arch.residual()
        # What reads the stream before the outcome of `path` is added to it; the first matrix finds the block's input.
        before = list(stream.values())[list(stream).index(path) - 1] if path in stream else None
        place = stream.get(path, path)

        def sums(block: nn.Module, batches: Batches) -> Stats:
            stats: Stats | None = None
            for i, part in batches:
                x, own = self._reaching(block, path, ours, self.behind, part, before)
                stats = stats or self.net.statistics(x.shape[-1])
                if i in seen:
                    there = seen[i].to(x.device)
                elif place is None:
                    there = self._passed(block, theirs, self.source, part)
                else:
                    there, _ = self._reaching(block, place, theirs, self.source, part)
                if path in stream:
                    stats = stats.add(x, wanted=there - own - ours.get(f"{path}.bias", 0.0))
                else:
                    stats = stats.add(x, there)
            assert stats is not None  # or nothing is calibrated
            return stats

        return reduce(Stats.merge, self._shared(sums))

    def _shared(self, work: Callable[[nn.Module, Batches], T]) -> list[T]:
        """What `work` makes of all batches, or on a CPU of either half of them, with a block of its own."""
        batches, block = list(enumerate(self.behind.batches())), self._block

        def some(part: slice) -> T:
            with torch.no_grad():
                return work(deepcopy(block), batches[part])

        return self._share(some, len(batches))

    def _reaching(
        self,
        block: nn.Module,
        path: str,
        parameters: Mapping[str, Tensor],
        states: States,
        part: slice,
        before: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What reaches the module at `path`, and what has reached `before` or the block; the block runs no further."""
        passed = [states.hidden[part].to(self.net.device)]

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Seen(args[0])

        with ExitStack() as stack:
            hook = block.get_submodule(path).register_forward_pre_hook(stop)
            stack.callback(hook.remove)
            if before is not None:
                hook = block.get_submodule(before).register_forward_pre_hook(lambda _, args: passed.append(args[0]))
                stack.callback(hook.remove)
            try:
                self._passed(block, parameters, states, part)
            except _Seen as seen:
                return seen.x, passed[-1]
        raise AssertionError("a block reaches all of its matrices")

    def _keep(self, key: Place, x: Tensor) -> None:
        """Keep what reached the end of a module; of the MLP, which is wide, for `advance` alone while there is room."""
        if key[1] == self._end:
            of_all = x.nbytes // len(x) * (key[2] + len(x))  # and of the rows before, which are as long
            if of_all > KEPT_BYTES or key[0] == id(self.source):
                return
        self.reached[key] = x.to(self.behind.hidden.device)

    def _leaving(self, key: Place, last: nn.Module, weight: Tensor) -> Tensor:
        """What the `last` matrix of a module makes of what reached it, kept where later passes ask for it, too."""
        met, out = self.left.get(key, (None, None))
        if out is None or met is not weight:
            out = last(self.reached[key].to(self.net.device))
            if key[1] != self._end:
                self.left[key] = weight, out.to(self.behind.hidden.device)
        return out.to(self.net.device)

    @property
    def _share(self) -> Share:
        return in_two() if on_cpu(self.net.device) and second_sums(self.net.model) else all_at_once

    @property
    def _block(self) -> nn.Module:
        return self.net.base.layers[self.layer]

    @property
    def _end(self) -> str:
        return list(readers(self.net.model).values())[-1]

    def _passed(self, block: nn.Module, parameters: Mapping[str, Tensor], states: States, part: slice) -> Tensor:
        """One batch through the block; a module whose end was reached gives what its last matrix makes of that."""
        hidden = states.hidden[part].to(self.net.device)
        with ExitStack() as stack:
            for path, (name, others) in self.seen.ends.items():
                key, last = (id(states), path, part.start), block.get_submodule(path)
                if key in self.reached:
                    out = partial(self._leaving, key, last, parameters[f"{path}.weight"])
                    stack.enter_context(_giving(block.get_submodule(name), out, others))
                else:  # before any hook that ends the pass here
                    keep = partial(self._keep, key)
                    hook = last.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0]), prepend=True)
                    stack.callback(hook.remove)
            return self._run(block, parameters, hidden)

    def _run(self, block: nn.Module, parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Hidden states (n, T, hidden) through the block."""
        how = dict(self.behind.kwargs[self.layer])
        with self.net.calibrating():
            return _tuple(torch.func.functional_call(block.eval(), dict(parameters), (hidden,), how))[0]

    def _parameters(self, solved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prefix = f"model.layers.{self.layer}."
        weights = {**self.original, **solved}
        return self.net.model.arch.parameters({name.removeprefix(prefix): w for name, w in weights.items()})


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@contextmanager
def _giving(module: nn.Module, first: Callable[[], Tensor], others: int) -> Iterator[None]:
    """Let `module` return what `first` returns, and None for each of its `others`."""
    place: Any = module
    place.forward = lambda *args, **kwargs: (first(), *[None] * others) if others else first()
    try:
        yield
    finally:
        del place.forward
