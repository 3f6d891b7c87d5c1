"""An output of exactly the size asked for: a type or bits for every tensor, so that it fits at the least predicted KL.

`measure` tries every choice that there is for a tensor (`fit_types`) and reads off its Fisher
information what that does to the predictions (`sensitivity`). `allocate` then takes the choice of least
KL + price * bytes for every tensor, at the one price at which the output just fits (a Lagrangian trade-off: no other
choice of that size has a lower sum), and spends the bytes that are left over on what they help most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import inf

from quantkit.errors import UsageError
from quantkit.forward import Network
from quantkit.later import Tensor
from quantkit.sensitivity import Fisher, fisher


@dataclass(frozen=True)
class Trial:
    """One choice for one matrix: for what item it is chosen, what it takes and what it costs, in nats a token."""

    item: str  # several matrices may have to be of one kind
    kind: str
    nbytes: int
    divergence: float


# What can be tried of a matrix, by its HF name; of a tied one twice, as output matrix and as embedding.
Choices = Callable[[str, Tensor, Fisher], Iterator[Trial]]


@dataclass
class _Tried:
    """What was found of one kind for one item: bytes by matrix, and the sum of what it costs."""

    nbytes: dict[str, int] = field(default_factory=dict)
    divergence: float = 0.0


@dataclass(frozen=True)
class Option:
    """A type, or bits, that an item may have: what it takes and what it costs, in nats a token."""

    type: str
    nbytes: int
    divergence: float


Table = Mapping[str, tuple[Option, ...]]  # by item


@dataclass(frozen=True)
class Fitted:
    """The types chosen, by item, and the price at which: nats a token that one byte more must save."""

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


@dataclass(frozen=True)
class Choice:
    """What was chosen, out of what, and of what kind each item is."""

    table: Table
    found: Fitted
    kinds: Mapping[str, str]


def measure(net: Network, ids: Tensor, seed: int, choices: Choices) -> Iterator[str | Table]:
    """Token `ids` (n, T) once through the model and back: yields what is done, then every item's options."""
    found: dict[str, dict[str, _Tried]] = {}
    for done, part in fisher(net, ids, seed):
        for name, information in part.items():
            for t in choices(name, net.model.tensors[name].read().to(net.device), information):
                tried = found.setdefault(t.item, {}).setdefault(t.kind, _Tried())
                tried.nbytes[name] = t.nbytes
                tried.divergence += t.divergence
        yield done
    yield {
        item: tuple(Option(kind, sum(t.nbytes.values()), max(t.divergence, 0.0)) for kind, t in kinds.items())
        for item, kinds in found.items()
    }


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
    while _nbytes(_at(table, high)) > budget:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low * high) ** 0.5 if low else high / 1e6
        low, high = (low, middle) if _nbytes(_at(table, middle)) <= budget else (middle, high)
        if low and high / low < 1 + 1e-9:
            break
    return Fitted(_filled(table, _at(table, high), budget), high)


def frontier(table: Table, points: int = 64) -> list[tuple[int, float]]:
    """Bytes and predicted KL of best choices, from the smallest to the largest, about `points` of them.

    No choice at all lies below the line through all of them: it bends where a price makes two options of an item equal.
    """
    pairs = (pair for options in table.values() for pair in combinations(options, 2))
    bends = ((a.divergence - b.divergence) / (b.nbytes - a.nbytes) for a, b in pairs if a.nbytes != b.nbytes)
    prices = sorted((p for p in bends if p > 0), reverse=True)
    chosen = [_at(table, price) for price in (inf, *prices[:: max(1, len(prices) // points)], 0.0)]
    return [(_nbytes(c), sum(o.divergence for o in c.values())) for c in chosen]


def by_size(table: Table) -> list[str]:
    """The types that may be chosen, from the one of least bytes on."""
    sizes: dict[str, list[float]] = {}
    for options in table.values():
        most = max(o.nbytes for o in options)
        for o in options:
            sizes.setdefault(o.type, []).append(o.nbytes / most)
    return sorted(sizes, key=lambda kind: sum(sizes[kind]) / len(sizes[kind]))


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
