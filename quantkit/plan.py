"""`Plan`: every output of a conversion before it begins: each tensor's type, each file's exact size, time and memory.

No weight is read. Sizes are exact, because layouts are; memory and time are estimates, from the widths of the model and
one short matrix product on the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from typing import Any

from quantkit import sensitivity
from quantkit.activations import readers, widths
from quantkit.codecs.sharing import PARTS
from quantkit.errors import UsageError
from quantkit.evaluate import HEAD_LOGITS
from quantkit.forward import BATCH_TOKENS
from quantkit.later import Device, on_cpu, torch
from quantkit.model import Model
from quantkit.prefix import KEPT_BYTES, second_sums
from quantkit.recipe import Recipe, target_bytes
from quantkit.solvers.learned import HELD_OUT, ITERATIONS, ROWS
from quantkit.stats import Stats
from quantkit.targets import Calibration, Output, plan_output
from quantkit.targets.folder import linear

# Resident before any weight is read, measured: the interpreter with torch and transformers imported.
BASE_BYTES = 430 * 2**20
# Of the peak matmul speed, what a forward pass or a solver reaches (measured on two CPU cores, SmolLM2-135M).
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Plan:
    """Outputs to make, and what making them takes: bytes, and estimated seconds by stage (as `convert` names them)."""

    outputs: tuple[Output, ...]
    peak_ram: int
    peak_vram: int
    stages: dict[str, float]
    batch_tokens: int = BATCH_TOKENS  # that go through a block at once

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())

    @property
    def disk(self) -> int:
        """Bytes of all outputs."""
        return sum(o.nbytes for o in self.outputs)

    @property
    def calibrated(self) -> bool:
        """Whether any output needs activation statistics."""
        return any(o.calibrated for o in self.outputs)

    def record(self) -> dict[str, Any]:
        """The dry run as JSON."""
        return {
            "outputs": [
                {
                    "target": o.target,
                    "format": o.format,
                    "path": o.path,
                    "bytes": o.nbytes,
                    "note": o.note,
                    "tensors": [
                        {
                            "name": r.name,
                            "shape": list(r.shape),
                            "source_type": r.source_type,
                            "type": r.type,
                            "solver": r.solver,
                            "bytes": r.nbytes,
                        }
                        for r in o.rows
                    ],
                }
                for o in self.outputs
            ],
            "peak_ram_bytes": self.peak_ram,
            "peak_vram_bytes": self.peak_vram,
            "batch_tokens": self.batch_tokens,
            "disk_bytes": self.disk,
            "seconds_estimate": round(self.seconds, 1),
        }


def make_plan(model: Model, recipe: Recipe, device: Device, rows: int | None = None) -> Plan:
    """Plan every target of `recipe`; `rows` is what the calibration text really gives, where that is known.

    Raises UsageError for a target that is unknown, that a shape of the model does not fit, or that needs a calibration
    where the recipe has none.
    """
    text = recipe.calibration
    calibration = Calibration(text, rows or recipe.samples, recipe.seqlen) if text else None
    choices = recipe.choices()
    outputs = tuple(plan_output(name, model, calibration, choices) for name in recipe.to)
    paths = [o.path.lower() for o in outputs]  # not every disk tells capitals apart
    if doubled := [o.target for o in outputs if paths.count(o.path.lower()) > 1]:
        raise UsageError(f"the target {doubled[0]} is named twice", where="--to", hint="name each target once")
    _require_heeded(recipe, outputs)
    if calibration is None and (needy := [o.target for o in outputs if o.calibrated]):
        raise UsageError("needs a calibration text", where=needy[0], hint="do without --no-calibration")
    batch, working = _batch(model, recipe, device, outputs)
    calibrated = any(o.calibrated for o in outputs)
    states = _state_bytes(model, recipe) + _prefix_bytes(model, recipe, sum(o.behind for o in outputs))
    states += _block_bytes(model) if calibrated else 0  # the next one, read ahead
    if any(o.outer for o in outputs):  # over before the others begin
        states = max(states, _kept_bytes(model, recipe))
    on_gpu = not on_cpu(device)
    if any(o.behind for o in outputs) and not on_gpu:  # and run ahead
        states += PARTS * _batch_bytes(model, batch) + min(KEPT_BYTES, 4 * sum(k * k for k in widths(model)))
        if sums := second_sums(model):  # another thread's
            lasting = any(o.lasting for o in outputs)
            states += _batch_bytes(model, batch) + sums + 2 * _block_bytes(model) * lasting
    return Plan(
        outputs,
        peak_ram=BASE_BYTES + states + (_largest(model) if on_gpu else working),
        peak_vram=working if on_gpu else 0,
        stages=_seconds(model, recipe, outputs, device),
        batch_tokens=batch,
    )


# What a recipe asks of GGUF targets and of no others.
_OF_GGUF = ("output_type", "token_embedding_type", "tensor_type", "pure", "leave_output", "split_max_size", "imatrix")


def _require_heeded(recipe: Recipe, outputs: tuple[Output, ...]) -> None:
    """UsageError for what a recipe asks and no target of it heeds, which would be passed over in silence."""
    formats, choices = {o.format for o in outputs}, recipe.choices()
    if choices.bits and not formats & {"gptq", "compressed-tensors"}:
        hint = "name a GPTQ or compressed-tensors target, or give types"
        raise UsageError("no target has bits of single layers", where="layers", hint=hint)
    if choices.layers and "gguf" not in formats:
        hint = "name a GGUF target, or give bits"
        raise UsageError("no target has types of single layers", where="layers", hint=hint)
    if (asked := [f for f in _OF_GGUF if getattr(recipe, f)]) and "gguf" not in formats:
        option = f"--{asked[0].replace('_', '-')}"
        hint = "name one such as Q4_K_M with --to, or leave it out"
        raise UsageError("is for GGUF targets, and none is made", where=option, hint=hint)
    solved = any(r.solver == recipe.solver for o in outputs for r in o.rows)
    if recipe.solver and not solved and not formats & {"gptq", "awq", "compressed-tensors"}:
        hint = "name a target that is solved, or leave it out"
        raise UsageError(f"no tensor of any target is solved by {recipe.solver}", where="--solver", hint=hint)


def _batch(model: Model, recipe: Recipe, device: Device, outputs: tuple[Output, ...]) -> tuple[int, int]:
    """Tokens through a block at once, and the bytes on the device that go with them: halved until `--vram` holds them.

    UsageError where it does not hold a single calibration row, or where the work is not done on a device.
    """
    limit = target_bytes(recipe.vram) if recipe.vram else None
    if limit and on_cpu(device):
        raise UsageError("limits a CUDA device, and this runs on the CPU", where="--vram", hint="leave it out")
    least = max(recipe.seqlen, recipe.ctx if recipe.eval_text else 0)
    batch = max(BATCH_TOKENS, least)  # a row is never cut
    learning = _learning_bytes(model, recipe) if any(o.lasting for o in outputs) else 0
    while (working := learning + _working_bytes(model, recipe, outputs, batch)) > (limit or working):
        if batch <= least:
            raise UsageError(
                f"this takes about {working / 2**30:.2f} GiB on the device, more than {recipe.vram}",
                where="--vram",
                hint="allow more, use --device cpu, or a target that needs no calibration",
            )
        batch = max(least, batch // 2)
    return batch, working


def _largest(model: Model) -> int:
    return 4 * max(prod(r.shape) for r in model.tensors.values())


def _block_bytes(model: Model) -> int:
    return 4 * sum(prod(r.shape) for r in model.block(0).values())


def _batch_bytes(model: Model, tokens: int) -> int:
    """Activations of one batch inside a block."""
    return 4 * tokens * 4 * model.config["intermediate_size"]


def _working_bytes(model: Model, recipe: Recipe, outputs: tuple[Output, ...], batch: int) -> int:
    """Weights, statistics and temporaries at the fullest moment: a block being solved, or the heads being scored.

    Solvers hold two matrices of the size of the largest statistics beside those, or one, and six of the size of the
    weights that read one activation (counted on a stand-in for a card, `tests/card.py`). Act-order and column scales
    take one of each more, for statistics of their own.
    """
    heads = 3 * 4 * model.config["vocab_size"] * model.config["hidden_size"]  # two, and one as it is read
    scoring = heads + 8 * 4 * HEAD_LOGITS if recipe.eval_text else 0
    block, solving = _block_bytes(model), 0
    if any(o.calibrated for o in outputs):
        below, scaled = any(o.behind for o in outputs), any(o.scaled for o in outputs)
        own = scaled or any(o.reordered for o in outputs)  # statistics of other columns than the block has
        grams = Stats.nbytes(widths(model))
        shared = scaled or any(o.calibrated and not o.behind for o in outputs)
        inside = sum(4 * n * k if stream else 4 * k * k for n, k, stream in _readers(model))
        statistics = grams * (below + shared) + (inside if below else 0)
        most = max(
            max((2 + own) * k * k + (3 + own) * n * k, (1 + own) * k * k + (6 + own) * n * k)
            for n, k, _ in _readers(model)
        )
        folded = scaled or any(o.format == "awq" for o in outputs)
        solving = block * (below + folded) + statistics + 4 * most
    outside = 5 if any(o.outer for o in outputs) else 1  # times the embedding: solved as a whole, or made in slabs
    return max(block + solving + _batch_bytes(model, batch), outside * _largest(model), scoring)


def _readers(model: Model) -> list[tuple[int, int, bool]]:
    """Of each activation of a block: outputs and inputs of its readers as one, whether these end in the stream."""
    stream, paths = model.arch.residual(), readers(model)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for ref in model.block(0).values():
        if ref.placed.reads:
            shapes.setdefault(ref.placed.reads, []).append(ref.shape)
    return [(sum(s[0] for s in found), found[0][1], paths.get(a) in stream) for a, found in shapes.items()]


def _state_bytes(model: Model, recipe: Recipe) -> int:
    tokens = max(recipe.samples * recipe.seqlen, (recipe.eval_chunks or 32) * recipe.ctx * 2)
    return 4 * tokens * model.config["hidden_size"]


def _kept_bytes(model: Model, recipe: Recipe) -> int:
    """Hidden states before every block, of the rows that are run back."""
    tokens = min(recipe.samples, sensitivity.ROWS) * recipe.seqlen
    return 4 * tokens * model.config["hidden_size"] * (model.layers + 2)


def _prefix_bytes(model: Model, recipe: Recipe, outputs: int) -> int:
    """Of outputs with calibration rows of their own: those, the rows before two blocks, what is kept of both.

    And of one output, what reaches the ends of attention and MLP, and what comes of the former.
    """
    tokens = recipe.samples * recipe.seqlen
    own = 4 * tokens * model.config["hidden_size"]
    kept = 4 * tokens * sum(widths(model))
    return (outputs + 4) * own + 3 * min(KEPT_BYTES, kept) if outputs else 0


def _learning_bytes(model: Model, recipe: Recipe) -> int:
    """Of ranges that are learned: a block's weights in two terms, multiplied, and its gradient; a step's activations.

    Those are what autograd keeps of every token: some eight tensors as wide as the stream, five as wide as the MLP.
    """
    hidden, ffn = model.config["hidden_size"], model.config["intermediate_size"]
    return 4 * _block_bytes(model) + 4 * ROWS * recipe.seqlen * (8 * hidden + 5 * ffn)


# Products with a Gram matrix, or work that costs as much, that each kind of output makes for every matrix.
_PRODUCTS = {"gptq": 4, "awq": 24, "gguf": 4}
_READ_BYTES_PER_SECOND = 400e6  # of float32 weights decoded, hashed and compared, measured on two CPU cores


def _seconds(model: Model, recipe: Recipe, outputs: tuple[Output, ...], device: Device) -> dict[str, float]:
    params = sum(prod(r.shape) for r in linear(model).values())
    calibrated = any(o.calibrated for o in outputs)
    speed = _flops_per_second(device) * EFFICIENCY if calibrated or recipe.eval_text else 1.0
    reading = 4 * model.parameters / _READ_BYTES_PER_SECOND
    solving = reading * (1 + len(outputs))
    if calibrated:
        tokens = recipe.samples * recipe.seqlen
        per_column = sum(2 * r.shape[0] * r.shape[1] ** 2 for r in linear(model).values())
        flops: float = 2 * tokens * (params + model.layers * sum(k * k for k in widths(model)))
        # A pass forth and back is three forth; there is one over all rows besides, and two over those held out.
        passes = 3 * ITERATIONS * ROWS + recipe.samples * (1 + 2 / HELD_OUT)
        flops += 2 * sum(o.lasting for o in outputs) * params * recipe.seqlen * passes
        solving += (flops + per_column * sum(_PRODUCTS.get(o.format, 0) for o in outputs)) / speed
    stages = {"calibrating and solving" if calibrated else "writing": solving}
    stages |= {f"verifying {o.target}": reading for o in outputs}
    if recipe.eval_text:
        tokens = (recipe.eval_chunks or 24) * recipe.ctx
        head = model.config["vocab_size"] * model.config["hidden_size"]
        scoring = reading + 2 * tokens * (params + head) / speed
        stages |= {"scoring the source": scoring} | {f"scoring {o.target}": scoring for o in outputs}
    return stages


def _flops_per_second(device: Device) -> float:
    a = torch.randn(1024, 1024, device=device)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a = a @ a / 32
    a.sum().item()
    return 4 * 2 * 1024**3 / (time.perf_counter() - start)
