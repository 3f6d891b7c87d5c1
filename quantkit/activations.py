"""What a block's matrices are fed while it runs: which module reads each activation, and `Stats` of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from quantkit.later import Tensor, nn
from quantkit.model import Model
from quantkit.stats import Squares, Stats

S = TypeVar("S", Stats, Squares)


@contextmanager
def watching(block: nn.Module, readers: Mapping[str, str], zeros: Callable[[int], S]) -> Iterator[dict[str, S]]:
    """Collect statistics while a block runs: activation name -> those of what the module `readers[name]` is fed.

    `zeros` gives those of so many columns of which nothing was seen yet.
    """
    stats: dict[str, S] = {}

    def watch(name: str, path: str) -> Any:
        module, parameter = reader(block, path)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for activation, x in fed(module, parameter, args, name):
                stats[activation] = (stats.get(activation) or zeros(x.shape[-1])).add(x)

        return module.register_forward_pre_hook(hook)

    hooks = [watch(name, path) for name, path in readers.items()]
    try:
        yield stats
    finally:
        for h in hooks:
            h.remove()


def reader(block: nn.Module, path: str) -> tuple[Any, str]:
    """The module at a path in a block, or where a parameter lies there, the module it is of and its name."""
    owner, _, name = path.rpartition(".")
    parent = block.get_submodule(owner)
    found = getattr(parent, name)
    return (found, "") if isinstance(found, nn.Module) else (parent, name)


def fed(module: Any, parameter: str, args: tuple[Tensor, ...], name: str) -> Iterator[tuple[str, Tensor]]:
    """What the reader of activation `name` is fed in a call; of a parameter that holds experts, what each of them is.

    transformers' experts are called with hidden states (tokens, hidden) and the experts that each token asks for. What
    their second matrices are fed is made inside, and so it is made here once more.
    """
    if not parameter:
        yield name, args[0]
        return
    for expert in range(module.num_experts):
        x = args[0][(args[1] == expert).any(-1)]
        if parameter != "gate_up_proj":
            gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, -1)
            x = module.act_fn(gate) * up
        yield name.format(expert), x


def readers(model: Model) -> dict[str, str]:
    """For each activation of a block, the path of the first reader; {} in a name stands for each of the experts."""
    first: dict[str, str] = {}
    for w in model.arch.block:
        if w.reads:
            first.setdefault(f"{w.reads}.{{}}" if w.experts else w.reads, model.arch.place_of(w))
    return first


def widths(model: Model) -> list[int]:
    """The widths of the activations of one block."""
    return list({r.placed.reads: r.shape[1] for r in model.block(0).values() if r.placed.reads}.values())
