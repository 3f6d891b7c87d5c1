"""`quantkit advise`: which variant suits this machine, or another: memory by parts, context, speed, one choice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.advise import Ask, Fit, Option, fit, recommend, room, runtime
from quantkit.cli.carry_out import carry_out
from quantkit.cli.options import SOURCE
from quantkit.cli.show import empty_table, err, out, size
from quantkit.compare import block_bits, named, read_folder, verdict
from quantkit.errors import UsageError
from quantkit.files.gguf_writer import tensor_nbytes
from quantkit.fit_types import types_of_width
from quantkit.forward import EMBEDDING
from quantkit.hardware import GIB, Machine, machine
from quantkit.memory import KV_BYTES, weights_of, weights_of_output
from quantkit.model import open_model
from quantkit.recipe import load_recipe
from quantkit.targets import Calibration, Choices, plan_output

WORDS = {"vram": "wholly", "split": "split", "ram": "in RAM", "no": "does not fit"}


def tokens(text: str | int) -> int:
    """Tokens as they are named: 8192, or 16k, which is 16 x 1024."""
    found = re.fullmatch(r"([1-9]\d{0,8})(k?)", str(text), re.ASCII | re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is no number of tokens such as 8192 or 16k")
    return int(found[1]) * (1024 if found[2] else 1)


def command(
    models: Annotated[list[str], typer.Argument(help=f"Folders that `quantkit convert` filled, or models. {SOURCE}")],
    vram: Annotated[
        str | None, typer.Option(help="Such as 24GiB, or a card such as 'RTX 4090'; else this machine's own.")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Such as 64GiB; else this machine's own.")] = None,
    context: Annotated[
        int, typer.Option(parser=tokens, metavar="TOKENS", help="Tokens of context to run with: 8192, 16k.")
    ] = 8192,
    kv: Annotated[str, typer.Option(help="The cache's type: f16, q8_0 or q4_0.")] = "f16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once, each with that context.")] = 1,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="Predict a target of the one model named, unmade: Q4_K_M. (again)"),
    ] = None,
    make: Annotated[
        Path | None, typer.Option(help="Make the GGUF of the one model named that just fits, in this folder.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Of --make: a YAML file with its calibration and all else.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which variants fit a card or this machine, in what memory and how fast at most, and recommend one."""
    if kv not in KV_BYTES:
        raise UsageError(f"unknown type {kv!r} of a cache", where="--kv", hint=f"known: {', '.join(KV_BYTES)}")
    place = machine(vram, ram)
    if make:
        _make(models, Ask(context, kv, batch), place, make, recipe, as_json)
        return
    options = _predicted(models, types) if types else _made(models)
    fits = [fit(o, Ask(context, kv, batch), place) for o in options]
    fits.sort(key=lambda f: -f.option.weights.nbytes)
    choice = recommend(fits)
    if as_json:
        hardware = {"vram_bytes": place.vram, "ram_bytes": place.ram, "cards": [c.name for c in place.cards]}
        chosen = {"name": choice[0].option.weights.name, "reason": choice[1]} if choice else None
        ask = {"context": context, "kv": kv, "batch": batch}
        record = {"hardware": hardware, **ask, "variants": [f.record() for f in fits], "recommendation": chosen}
        print(json.dumps(record, indent=2))
        return
    _show(fits, place, f"{context:,} tokens of {kv} cache" + (f", {batch} sequences" if batch > 1 else ""))
    if choice is None:
        out.print("Nothing fits: take a smaller type, a shorter --context or a --kv of q8_0 or q4_0.")
        return
    best, reason = choice
    if best.bounds:
        each = ", ".join(f"{_speed(bound)} ({name})" for name, bound in best.bounds)
        out.print(f"tokens/s at most, from bytes a token and memory bandwidth alone: {each}", soft_wrap=True)
    out.print(f"Take {best.option.weights.name}: {reason}.", soft_wrap=True)


def _make(models: list[str], ask: Ask, place: Machine, output: Path, recipe: str | None, as_json: bool) -> None:
    """Convert the one model to a GGUF that takes all the memory the rest leaves, of the types of least predicted KL."""
    if len(models) != 1:
        raise UsageError(f"{len(models)} models", where="--make", hint="name the one to convert")
    asked = load_recipe(recipe, {"target_size": "1GB"})  # its own size is not known before the model's
    model = open_model(models[0], asked.override, asked.chat_template)
    shape = model.tensors[EMBEDDING].shape
    embedding = tensor_nbytes("token_embd.weight", shape, types_of_width(shape[1])[0])
    nbytes = room(weights_of(model.name, model), ask, place, embedding)
    err.print(f"weights may take {nbytes / GIB:.2f} GiB beside {ask.context:,} tokens of {ask.kv} cache")
    settings = load_recipe(recipe, {"target_size": f"{nbytes // 1000 / 1000:.3f}MB"})
    settings = settings.model_copy(update={"solver": settings.solver or "gptq"})
    carry_out(model, settings, output, force=False, as_json=as_json)


def _made(models: list[str]) -> list[Option]:
    """Variants that are there, with their KL where a report has it, and what is broken about them."""
    reported: dict[str, dict[str, Any]] = {}
    for source in models:
        folder = read_folder(source)
        if folder and folder.report.get("evaluation"):
            reported |= {str(Path(source) / v["path"]): v for v in folder.report["variants"]}
    options = []
    for name, path in named(models).items():
        model, found = open_model(path), reported.get(path)
        if found is None:
            options.append(Option(weights_of(name, model), runtime(model)))
            continue
        kl = (found.get("kl_divergence") or {}).get("mean")
        fault = verdict(kl, found.get("delta_ln_ppl"), found.get("same_top"), block_bits(model))
        options.append(Option(weights_of(name, model), runtime(model), kl, fault))
    return options


def _predicted(models: list[str], types: list[str]) -> list[Option]:
    """Targets of one model, planned from its headers; no weight is read."""
    if len(models) != 1:
        raise UsageError(f"{len(models)} models", where="--type", hint="name the one to predict from")
    model, found = open_model(models[0]), []
    for name in types:
        planned = plan_output(name, model, Calibration("default", 64, 512), Choices())
        reads = "llama.cpp" if planned.format == "gguf" else "vLLM"
        found.append(Option(weights_of_output(planned, model), reads))
    return found


def _show(fits: list[Fit], place: Machine, asked: str) -> None:
    vram = f"{place.vram / GIB:.1f} GiB of VRAM, " if place.vram is not None else "no card, "
    title = f"{vram}{place.ram / GIB:.1f} GiB of RAM; {asked}; memory in GiB"
    table = empty_table(title)
    table.add_column("variant", overflow="fold")  # a long one is folded, and no figure beside it
    for name in ("file", "mean KL", "fits", "weights", "KV", "compute", "other", "in all", "most context"):
        table.add_column(name, justify="left" if name == "fits" else "right", no_wrap=True)
    table.add_column("tokens/s <=", justify="right", no_wrap=True)
    for f in fits:
        need, w = f.device or f.host, f.option.weights
        parts = (need.weights, need.kv, need.compute, need.output + need.overhead, need.total)
        table.add_row(
            w.name,
            size(w.nbytes),
            "" if f.option.kl is None else f"{f.option.kl:.5f}",
            "BROKEN" if f.option.broken else f"{f.layers} of {len(w.blocks)} layers" if f.layers else WORDS[f.where],
            *(f"{part / GIB:.2f}" for part in parts),
            f"{f.largest_context:,}" if f.largest_context else "",
            _range([bound for _, bound in f.bounds]),
        )
    out.print(table)
    for f in fits:
        out.print(f"{f.option.weights.name}: read by {f.option.runtime}", soft_wrap=True)


def _range(bounds: list[float]) -> str:
    low, high = (min(bounds), max(bounds)) if bounds else (0.0, 0.0)
    return "" if not bounds else _speed(low) if len(bounds) == 1 else f"{_speed(low)} to {_speed(high)}"


def _speed(bound: float) -> str:
    return f"{bound:,.0f}" if bound >= 10 else f"{bound:.1f}"
