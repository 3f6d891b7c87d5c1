"""`advise`: which variant suits some hardware: what fits, how much of it, how fast at most, and one recommendation.

Memory is that of `memory.py`. Speed is an upper bound and named so: a token needs every active weight and the cache
read once, and memory gives no more bytes a second than its bandwidth. Quality is a report's KL, where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import UsageError
from quantkit.hardware import GIB, Machine
from quantkit.memory import Need, Weights, in_ram, on_device, quantized_shapes, token_bytes
from quantkit.model import Model
from quantkit.model.mixed import compressed_settings

MARLIN_GROUPS = (32, 64, 128, -1)  # vLLM `marlin_utils.py`, MARLIN_SUPPORTED_GROUP_SIZES
MARLIN_OUT, MARLIN_IN = 64, 128  # GPTQ_MARLIN_MIN_THREAD_N and _K


@dataclass(frozen=True)
class Ask:
    """What is to be run: tokens of context, the cache's type, and how many sequences at once."""

    context: int
    kv: str = "f16"
    batch: int = 1


@dataclass(frozen=True)
class Option:
    """One variant, with what is known of its quality, and what reads it."""

    weights: Weights
    runtime: str
    kl: float | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Fit:
    """How a variant fits: `layers` of its blocks on the card (None: all of it, and the output), the rest in RAM."""

    option: Option
    where: str  # "vram", "split", "ram" or "no"
    layers: int | None
    device: Need | None
    host: Need
    largest_context: int  # that fits the same way; 0 where nothing does
    bounds: tuple[tuple[str, float], ...]  # memory's name and tokens a second at most

    def record(self) -> dict[str, Any]:
        """As JSON."""
        w = self.option.weights
        return {
            "name": w.name,
            "format": w.format,
            "bytes": w.nbytes,
            "kl": self.option.kl,
            "broken": self.option.broken,
            "fits": self.where,
            "layers_on_device": len(w.blocks) if self.where == "vram" else self.layers or 0,
            "layers": len(w.blocks),
            "device": self.device.record() if self.device else None,
            "host": self.host.record(),
            "largest_context": self.largest_context,
            "tokens_per_second_at_most": dict(self.bounds),
            "runtime": self.option.runtime,
        }


def fit(option: Option, ask: Ask, machine: Machine) -> Fit:
    """Place a variant: wholly on the card, else with as many blocks there as fit, else in RAM, else nowhere."""
    w, trained = option.weights, option.weights.config["max_position_embeddings"]
    where, layers = place(w, ask, machine)
    device, host = _needs(w, ask, where, layers)
    fits = lambda ctx: _same_place(w, Ask(ctx, ask.kv, ask.batch), machine, where, layers)  # noqa: E731
    most = _largest(fits, trained) if where != "no" else 0
    return Fit(option, where, layers, device, host, most, _bounds(w, ask, machine, where, layers))


def room(w: Weights, ask: Ask, machine: Machine, least_embedding: int) -> int:
    """Bytes that the file of a model may have so that it runs wholly on the card, or in RAM where there is no card.

    An untied embedding, of `least_embedding` bytes at least, does not go on the card. UsageError where the cache and
    the buffers alone are too much.
    """
    if machine.vram is None:
        need, memory, beside = in_ram(w, ask.context, ask.kv, ask.batch), machine.ram, 0
    else:
        need, memory = on_device(w, ask.context, ask.kv, ask.batch)[0], machine.vram
        beside = 0 if w.config.get("tie_word_embeddings") else least_embedding
    left = memory - (need.total - need.weights) + beside
    if left <= 0:
        what = f"the cache and buffers take {(need.total - need.weights) / GIB:.2f} GiB of {memory / GIB:.2f}"
        raise UsageError(what, where="--context", hint="take a shorter one, or a --kv of q8_0 or q4_0")
    return left


def place(w: Weights, ask: Ask, machine: Machine) -> tuple[str, int | None]:
    """Where a variant goes, and how many of its blocks on the card; only GGUFs are split between card and RAM."""
    if machine.vram is not None and _same_place(w, ask, machine, "vram", None):
        return "vram", None
    if w.format != "gguf" and machine.vram is not None:
        return "no", None
    if machine.vram is not None:
        for count in range(len(w.blocks), 0, -1):
            if _same_place(w, ask, machine, "split", count):
                return "split", count
    return ("ram", 0) if _same_place(w, ask, machine, "ram", 0) else ("no", None)


def _needs(w: Weights, ask: Ask, where: str, layers: int | None) -> tuple[Need | None, Need]:
    if where in ("ram", "no"):
        return None, in_ram(w, ask.context, ask.kv, ask.batch)
    return on_device(w, ask.context, ask.kv, ask.batch, layers)


def _same_place(w: Weights, ask: Ask, machine: Machine, where: str, layers: int | None) -> bool:
    device, host = _needs(w, ask, where, layers)
    return host.total <= machine.ram and (device is None or device.total <= (machine.vram or 0))


def _largest(fits: Any, most: int) -> int:
    """The largest context up to `most`, in steps of 256, for which `fits`."""
    low, high = 0, most // 256
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle - 1)
    return 256 * low


def _bounds(w: Weights, ask: Ask, machine: Machine, where: str, layers: int | None) -> tuple[tuple[str, float], ...]:
    """Tokens a second at most, one sequence, on each card whose bandwidth is told; of a split, by both memories."""
    weights, cache = token_bytes(w, ask.context, ask.kv)
    total = weights + cache
    ram = machine.ram_gb_per_s
    if where == "vram":
        return tuple((c.name, c.gb_per_s * 1e9 / total) for c in machine.cards)
    if where == "ram":
        return (("RAM", ram * 1e9 / total),) if ram else ()
    if where == "split" and ram and layers:
        on_card = total * layers / (len(w.blocks) + 1)
        times = [(c.name, on_card / (c.gb_per_s * 1e9) + (total - on_card) / (ram * 1e9)) for c in machine.cards]
        return tuple((f"{name} and RAM", 1 / seconds) for name, seconds in times)
    return ()


def runtime(model: Model) -> str:
    """What reads a model, in words."""
    if model.format == "gguf":
        return "llama.cpp"
    if model.format == "dense":
        return "vLLM, transformers"
    quantization = model.config.get("quantization_config") or {}
    if model.format == "compressed-tensors":
        packed = [n.removesuffix(".weight") for n, r in model.tensors.items() if r.type.startswith("CT")]
        own = compressed_settings(quantization, packed[0]) if packed else {}
        quantization = {"bits": own.get("num_bits"), "group_size": own.get("group_size") or -1}
    return runtime_of(quantization, quantized_shapes(model))


def runtime_of(quantization: dict[str, Any], shapes: set[tuple[int, ...]]) -> str:
    """What reads a packed folder: vLLM's marlin kernels where every shape (out, in) fits them, else its slower ones."""
    if reason := marlin_refuses(quantization, shapes):
        return f"vLLM without marlin ({reason})"
    return "vLLM with marlin"


def marlin_refuses(quantization: dict[str, Any], shapes: set[tuple[int, ...]]) -> str | None:
    """Why vLLM's marlin kernels do not take a packed folder, or None (vLLM `marlin_utils.py`)."""
    bits, group = quantization.get("bits"), quantization.get("group_size", -1)
    if bits not in (4, 8):
        return f"{bits} bits, it takes 4 and 8"
    if quantization.get("quant_method") == "gptq" and not quantization.get("sym", True):
        return "it takes symmetric GPTQ only"
    if group not in MARLIN_GROUPS:
        return f"groups of {group}, it takes {', '.join(map(str, MARLIN_GROUPS))}"
    for out, inner in sorted(shapes):
        if out % MARLIN_OUT or inner % MARLIN_IN:
            return f"a matrix of {out} x {inner}, it takes multiples of {MARLIN_OUT} x {MARLIN_IN}"
    return None


ORDER = ("vram", "split", "ram", "no")


def recommend(fits: Sequence[Fit]) -> tuple[Fit, str] | None:
    """The one to take, and why; None where nothing fits."""
    whole = [f for f in fits if not f.option.broken]
    for where in ORDER[:-1]:
        if found := [f for f in whole if f.where == where]:
            return _best(found, where)
    return None


def _best(found: list[Fit], where: str) -> tuple[Fit, str]:
    places = {"vram": "wholly on the card", "ram": "in RAM"}
    if where == "split":
        best = max(found, key=lambda f: ((f.layers or 0) / len(f.option.weights.blocks), -_loss(f)))
        count = len(best.option.weights.blocks)
        return best, f"none fits wholly on the card; of this one the most does, {best.layers} of {count} layers"
    if all(f.option.kl is not None for f in found):
        best = min(found, key=lambda f: (_loss(f), f.option.weights.nbytes))
        return best, f"the least KL ({best.option.kl:.5f}) of the {len(found)} that fit {places[where]}"
    best = max(found, key=lambda f: f.option.weights.nbytes)
    return best, f"the largest of the {len(found)} that fit {places[where]}; compare them to know their quality"


def _loss(f: Fit) -> float:
    return f.option.kl if f.option.kl is not None else -f.option.weights.nbytes
