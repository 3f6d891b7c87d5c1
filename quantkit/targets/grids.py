"""What GPTQ and compressed-tensors folders share: a grid by its name, the source's own grid, one way to solve a block.

A source whose blocks lie on an integer grid (Q4_0, Q5_0, Q8_0, symmetric GPTQ and compressed-tensors folders) goes over
to every target whose groups divide its blocks without any error, and needs no calibration for that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quantkit.codecs.grid import Grid, Quantized
from quantkit.errors import BadInput, UsageError
from quantkit.files.safetensors import Spec
from quantkit.later import Tensor, torch
from quantkit.model import Model, Ref
from quantkit.model.mixed import compressed_settings, gptq_settings
from quantkit.solvers.awq import ROWS_SOLVED, awq_scale, compensated
from quantkit.solvers.exact import exact
from quantkit.solvers.gptq import by_activation, gptq, rounding
from quantkit.solvers.learned import Ranged
from quantkit.stats import Stats
from quantkit.targets.folder import fitting_group, folder_output, linear, readers_of, scarce
from quantkit.targets.folding import Folded, fold
from quantkit.targets.layers import LayerRule, first_rule, require_matches
from quantkit.targets.learned import learned, require_behind
from quantkit.targets.target import LEARNED, Choices, Output, Piece, Solved, stacked

BITS = (2, 3, 4, 8)  # what transformers' GPTQConfig accepts
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
BLOCKS = {"Q4_0": (4, 32), "Q5_0": (5, 32), "Q8_0": (8, 32)}  # bits and group of symmetric GGUF types
WITH_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")  # a real number, not a multiple of the scale
SCALED = "awq+gptq"  # the solver that scales columns first
NAME = r"(?:-(?P<bits>\d+)bit)?(?:-(?P<group>\d+)g|-(?P<channel>pc))?(?P<asym>-asym)?"

Pack = Callable[[str, Quantized, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Asked:
    """A grid as a target's name asks for it; `group` is None for one group to an output channel."""

    bits: int
    group: int | None
    symmetric: bool
    by_activation: bool
    why: str
    rules: tuple[LayerRule, ...] = ()  # of single matrices

    def bits_of(self, name: str) -> int:
        """The bits of one matrix, by its HF name."""
        rule = first_rule(self.rules, name)
        return rule.bits if rule else self.bits

    def grid(self, name: str, width: int) -> Grid:
        """The grid of a matrix with `width` inputs."""
        return Grid(self.bits_of(name), self.group or width, self.symmetric)

    def holds(self, name: str, source: tuple[int, int] | None) -> bool:
        """Whether it holds every weight of a matrix that lies on a symmetric grid (bits, group) in the source."""
        if source is None or self.group is None or self.by_activation:
            return False
        return source[0] <= self.bits_of(name) and source[1] % self.group == 0


def asked_of(match: re.Match[str], model: Model, choices: Choices) -> Asked:
    """The grid that a target's name (`NAME`) asks for; UsageError where no reader takes it or no shape fits it."""
    require_matches(choices.bits, linear(model))
    bits, asked = int(match["bits"] or 4), int(match["group"]) if match["group"] else None
    if bits not in BITS or (asked is not None and asked not in GROUPS):
        raise UsageError(
            "no reader takes this", where=match[0], hint=f"bits are {BITS}, groups are {GROUPS}, as in gptq-4bit-64g"
        )
    by_importance = bool(match.groupdict().get("desc"))
    if match["channel"] and by_importance:
        raise UsageError("one group has no order", where=match[0], hint="leave out -pc or -desc")
    group, why = fitting_group(model, asked)
    kind = "symmetric" if not match["asym"] else "with zero points"
    if match["channel"]:
        return Asked(bits, None, not match["asym"], False, f"{bits}-bit {kind}, one group a channel", choices.bits)
    order = ", groups by importance" if by_importance else ""
    return Asked(bits, group, not match["asym"], by_importance, f"{bits}-bit {kind}, {why}{order}", choices.bits)


def source_grid(model: Model, ref: Ref) -> tuple[int, int] | None:
    """Bits and group of the symmetric grid on which a tensor of the source lies, if it does."""
    if ref.type in BLOCKS:
        return BLOCKS[ref.type]
    config, module = model.config.get("quantization_config") or {}, ref.placed.hf.removesuffix(".weight")
    if ref.type.startswith("GPTQ") and config.get("sym") and not config.get("desc_act"):
        own = gptq_settings(config, module)
        return (own["bits"], own["group_size"]) if own["group_size"] > 0 else None
    if ref.type.startswith("CT"):
        weights = compressed_settings(config, module)
        group = weights.get("group_size") or 0
        return (weights["num_bits"], group) if weights.get("symmetric", True) and group > 0 else None
    return None


def taken_over(model: Model, asked: Asked) -> frozenset[str]:
    """The matrices that the grid asked for holds exactly."""
    return frozenset(n for n, r in linear(model).items() if asked.holds(n, source_grid(model, r)))


def note_of(model: Model, asked: Asked, family: str) -> str:
    """The choice in words, with what the source's own grid offers."""
    matrices = linear(model)
    if own := Counter(bits for n in matrices if (bits := asked.bits_of(n)) != asked.bits):
        told = ", ".join(f"{count} matrices with {bits} bits" for bits, count in sorted(own.items()))
        return f"{asked.why}; {told}"
    kept, types = taken_over(model, asked), Counter(r.type for r in matrices.values())
    if kept:
        return f"{asked.why}; {len(kept)} of {len(matrices)} matrices taken over exactly, without calibration"
    grids = {t: g for r in matrices.values() if (g := source_grid(model, r)) for t in (r.type,)}
    if offered := [(t, b, g) for t, (b, g) in grids.items() if b in (*BITS, 5)]:
        kind, bits, group = max(offered, key=lambda o: types[o[0]])
        better = f"{family}-{bits if bits in BITS else 8}bit-{group}g"
        return f"{asked.why}; {better} would hold the source's {kind} exactly, without calibration"
    if any(t in WITH_MINIMUM for t in types):
        kind = next(t for t, _ in types.most_common() if t in WITH_MINIMUM)
        nearest = "" if asked.symmetric else "; what the nearest zeros lose is loss_rounded in layers.csv"
        return f"{asked.why}; {kind} blocks have a real minimum, so no integer grid holds the source exactly{nearest}"
    return asked.why


def of_stem(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a matrix by the names that they have in a file."""
    stem = name.removesuffix(".weight")
    return {f"{stem}.{part}": t for part, t in parts.items()}


def solved_folder(
    target: str,
    format: str,
    model: Model,
    choices: Choices,
    asked: Asked,
    parts: Callable[[str, tuple[int, ...], Asked], list[Spec]],
    pack: Pack,
    config: dict[str, Any],
    files: Mapping[str, str] | None = None,
) -> Output:
    """A folder whose matrices are solved on the grid asked for; `parts` plans and `pack` lays out one, by its name."""
    scaled = choices.solver == SCALED
    kept = frozenset() if scaled else taken_over(model, asked)
    note = asked.why if scaled else note_of(model, asked, "ct" if format == "compressed-tensors" else "gptq")
    if scaled:
        note += "; columns scaled as AWQ does, then solved"
    if choices.inputs == "quantized" and model.experts:
        note += "; calibrated on the source's activations, as mixtures of experts are"
    planned = {n: parts(n, r.shape, asked) for n, r in linear(model).items()}
    solve, solver = solving(asked, kept, pack, scaled), choices.solver or "gptq"
    below = choices.behind(model)
    if solver == LEARNED:
        require_behind(below, target)
        solve, note = learned(solve), f"{note}; ranges learned block by block"
    output = folder_output(
        target, format, note, model, planned, solver, solve, torch.float16, config, files, below, kept
    )
    return replace(output, scaled=scaled, reordered=asked.by_activation)


def solving(
    asked: Asked, kept: frozenset[str], pack: Pack, scaled: bool = False
) -> Callable[[Piece], Iterator[Solved]]:
    """How an output on this grid solves a piece; `pack` lays out a matrix, of so many bits, as parts to write.

    `scaled`: with its columns scaled before, by the exponent that the solver itself does best with.
    """

    def done(name: str, q: Quantized, loss: float, log: dict[str, object], folded: Folded) -> Solved:
        value = q.dequantize()
        undone = folded.undone(name, value) if scaled else None
        ranged = partial(Ranged, (value,), q.groups.long(), lambda f: done(name, q.times(*f), loss, log, folded))
        return Solved(name, pack(name, q, asked.bits_of(name)), value, loss, log, undone, ranged)

    def solve(piece: Piece) -> Iterator[Solved]:
        groups = readers_of(piece)
        members = {name for names in groups.values() for name in names}
        folded = fold(piece, search) if scaled else Folded(dict(piece.weights))
        for name in (n for n in piece.refs if n not in members):
            yield replace(folded.plain(piece, name), unfolded=piece.weights.get(name) if scaled else None)
        for activation, names in groups.items():
            for name in (n for n in names if n in kept):
                weight = piece.weight(name)
                q = exact(weight, asked.grid(name, weight.shape[1]))
                if q is None:
                    raise BadInput("does not lie on the grid of its type", where=name, hint="get the source again")
                yield done(name, q, 0.0, {}, folded)
            for bits in dict.fromkeys(asked.bits_of(n) for n in names):
                together = [n for n in names if n not in kept and asked.bits_of(n) == bits]
                yield from solved(piece, activation, together, folded)

    def search(weights: Tensor, stats: Stats) -> Tensor:
        return awq_scale(weights, stats, asked.grid("", weights.shape[1]), compensated, ROWS_SOLVED)

    def solved(piece: Piece, activation: str, names: list[str], folded: Folded) -> Iterator[Solved]:
        if not names:
            return
        weights, stats = stacked([folded.weights[n] for n in names]), piece.stats[activation]
        if scaled:
            stats = stats.scaled(1 / folded.column(names[0]))
        grid = asked.grid(names[0], weights.shape[1])
        try:
            if why := scarce(piece, activation):
                found = rounding(weights, stats, grid, why)
            else:
                found = (by_activation if asked.by_activation else gptq)(weights, stats, grid)
        except BadInput as e:
            raise BadInput(e.what, where=names[0], hint=e.hint) from e
        for name, s in zip(names, found.rows([len(folded.weights[n]) for n in names]), strict=True):
            yield done(name, s.quantized, s.loss, s.log, folded)

    return solve
