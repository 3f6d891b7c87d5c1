"""A GGUF of exactly the size asked for: a type for every tensor, so that the file fits and the predicted KL is least.

`measure` encodes some rows of each tensor in every type that fits it and reads off its Fisher information what that
does to the predictions (`sensitivity`). `allocate` then takes the type of least KL + price * bytes for every tensor, at
the one price at which the file just fits (a Lagrangian trade-off: no other choice of that size has a lower sum), and
spends the bytes that are left over on what they help most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantkit.codecs import decode, encode, lookup
from quantkit.errors import UsageError
from quantkit.files.gguf_writer import tensor_nbytes
from quantkit.forward import Network
from quantkit.later import Tensor, torch
from quantkit.sensitivity import Fisher, fisher
from quantkit.targets.gguf_tensors import Held, held
from quantkit.targets.mixtures import quantizable

ROWS = 128  # of a tensor that are encoded to measure a type by
# What llama.cpp reads on every backend, and `--solver gptq` solves; by what divides the rows.
TYPES = {
    256: ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    32: ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    1: ("F16",),
}


@dataclass(frozen=True)
class Option:
    """A type that a tensor may have: what it takes and what it costs, in nats a token."""

    type: str
    nbytes: int
    divergence: float


Table = Mapping[str, tuple[Option, ...]]  # by GGUF name


@dataclass(frozen=True)
class Fitted:
    """The types chosen, by GGUF name, and the price at which: nats a token that one byte more must save."""

    options: Mapping[str, Option]
    price: float

    @property
    def nbytes(self) -> int:
        """Of all tensors that were chosen for."""
        return sum(o.nbytes for o in self.options.values())

    @property
    def divergence(self) -> float:
        """The predicted KL, nats a token, of rounding; compensated errors come to less."""
        return sum(o.divergence for o in self.options.values())


def measure(net: Network, ids: Tensor, seed: int) -> Iterator[str | Table]:
    """Token `ids` (n, T) once through the model and back: yields what is done, then every tensor's options."""
    by_part = {t.parts[0]: t for t in held(net.model) if t.computed is None and quantizable(t.name, t.shape)}
    kinds: dict[str, dict[str, float]] = {t.name: {} for t in by_part.values()}
    for done, found in fisher(net, ids, seed):
        for name, information in found.items():
            tensor = by_part[name]
            weight = net.model.tensors[name].read().to(net.device)
            for kind, cost in _costs(tensor, weight, information, ids, by_block=done.startswith("block")):
                kinds[tensor.name][kind] = kinds[tensor.name].get(kind, 0.0) + cost
        yield done
    shapes = {t.name: t.shape for t in by_part.values()}
    yield {
        name: tuple(Option(k, tensor_nbytes(name, shapes[name], k), max(cost, 0.0)) for k, cost in costs.items())
        for name, costs in kinds.items()
    }


def _costs(
    tensor: Held, weight: Tensor, information: Fisher, ids: Tensor, by_block: bool
) -> Iterator[tuple[str, float]]:
    """Each type that fits the tensor, and the KL of rounding to it."""
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()
    if tensor.name == "token_embd.weight":  # rows as often as their tokens come
        rows = ids.flatten()[:: max(1, ids.numel() // ROWS)].unique()
    some = weight[rows.to(weight.device)]
    importance = information.stats.importance if by_block else None
    width = next(w for w in TYPES if weight.shape[1] % w == 0)
    for kind in TYPES[width]:
        made = decode(kind, encode(kind, some, importance if lookup(kind).block > 1 else None), tuple(some.shape))
        yield kind, information.divergence(made - some, rows)


def allocate(table: Table, budget: int) -> Fitted:
    """The types of least total divergence whose bytes come to `budget` at most.

    Raises UsageError where not even the smallest types fit.
    """
    least = sum(min(o.nbytes for o in options) for options in table.values())
    if least > budget:
        what = f"the smallest types that are known to work take {least:,} bytes, and {budget:,} are left for them"
        raise UsageError(what, where="--target-size", hint="ask for more")
    low, high = 0.0, 1.0  # prices: too many bytes at the one, few enough at the other
    if _nbytes(_at(table, low)) <= budget:
        return Fitted(_at(table, low), low)
    for _ in range(200):
        middle = (low * high) ** 0.5 if low else high / 1e6
        low, high = (low, middle) if _nbytes(_at(table, middle)) <= budget else (middle, high)
        if low and high / low < 1 + 1e-9:
            break
    return Fitted(_filled(table, _at(table, high), budget), high)


def _at(table: Table, price: float) -> dict[str, Option]:
    return {
        name: min(options, key=lambda o: (o.divergence + price * o.nbytes, o.nbytes)) for name, options in table.items()
    }


def _nbytes(chosen: Mapping[str, Option]) -> int:
    return sum(o.nbytes for o in chosen.values())


def _filled(table: Table, chosen: dict[str, Option], budget: int) -> dict[str, Option]:
    """Raise one tensor at a time, the one that saves most a byte of those that still fit."""
    left = budget - _nbytes(chosen)
    while True:
        raises = [
            ((chosen[name].divergence - o.divergence) / (o.nbytes - chosen[name].nbytes), name, o)
            for name, options in table.items()
            for o in options
            if 0 < o.nbytes - chosen[name].nbytes <= left and o.divergence < chosen[name].divergence
        ]
        if not raises:
            return chosen
        _, name, best = max(raises, key=lambda r: (r[0], r[1]))
        left -= best.nbytes - chosen[name].nbytes
        chosen[name] = best
