"""`quantkit convert`: the main job. Reads the source once, makes every target, checks and scores each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.carry_out import carry_out
from quantkit.cli.fitting import fitted
from quantkit.cli.options import CHAT_TEMPLATE, OVERRIDE, SOURCE
from quantkit.cli.show import out, size
from quantkit.forward import place_of
from quantkit.model import open_model
from quantkit.plan import Plan, make_plan
from quantkit.recipe import load_recipe


def command(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder for all outputs.")],
    to: Annotated[list[str] | None, typer.Option(help="A target: fp16, gptq, awq-4bit-64g, Q4_K_M ... (again)")] = None,
    recipe: Annotated[str | None, typer.Option(help="A YAML file, or a name in recipes/; options go over it.")] = None,
    calibration: Annotated[str | None, typer.Option(help="default, self, or a file.")] = None,
    no_calibration: Annotated[bool, typer.Option("--no-calibration", help="Quantize GGUF targets blindly.")] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration rows.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=8, help="Tokens to a calibration row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
    eval_text: Annotated[str | None, typer.Option(help="demo, wikitext2, or a file to score on.")] = None,
    eval_chunks: Annotated[int | None, typer.Option(min=1, help="Score the first N chunks only.")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Score nothing.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:i.")] = None,
    vram: Annotated[str | None, typer.Option(help="The most to take of a CUDA device: 24GiB.")] = None,
    override: Annotated[list[str] | None, typer.Option(help=OVERRIDE)] = None,
    chat_template: Annotated[str | None, typer.Option(help=CHAT_TEMPLATE)] = None,
    target_size: Annotated[str | None, typer.Option(help="One target of this size (22GiB).")] = None,
    target_bpw: Annotated[float | None, typer.Option(help="One target of so many bits a weight.")] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="gptq: for GGUF and AWQ too. awq+gptq: scale columns first; learned: tune ranges."),
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="GPTQ: calibrate behind the layers as quantized, or on the source's activations.")
    ] = None,
    imatrix: Annotated[str | None, typer.Option(help="GGUF: an importance matrix, in place of calibrating.")] = None,
    output_type: Annotated[str | None, typer.Option(help="GGUF: the type of the output matrix.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="GGUF: the type of the token embedding.")] = None,
    tensor_type: Annotated[
        list[str] | None, typer.Option(help="GGUF: REGEX=TYPE for the tensors whose name it is found in. (again)")
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="GGUF: one type for all; no mixture.")] = False,
    leave_output: Annotated[bool, typer.Option("--leave-output", help="GGUF: copy the output matrix.")] = False,
    split_max_size: Annotated[str | None, typer.Option(help="GGUF: split in files of at most 2G, 500M ...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs; let calibration and text overlap.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report, or the plan, as JSON.")] = False,
) -> None:
    """Convert a model to every target named with --to, check each output, and score it against the source."""
    options = {
        "to": to or None,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "eval_text": eval_text,
        "eval_chunks": eval_chunks,
        "device": device,
        "vram": vram,
        "override": override or None,
        "chat_template": chat_template,
        "target_size": target_size,
        "target_bpw": target_bpw,
        "solver": solver,
        "inputs": inputs,
        "imatrix": imatrix,
        "output_type": output_type,
        "token_embedding_type": token_embedding_type,
        "tensor_type": tensor_type or None,
        "pure": pure or None,
        "leave_output": leave_output or None,
        "split_max_size": split_max_size,
    }
    settings = load_recipe(recipe, options)
    left_out = {"eval_text": no_eval, "calibration": no_calibration}
    settings = settings.model_copy(update={field: None for field, out_of_it in left_out.items() if out_of_it})
    model = open_model(source, settings.override, settings.chat_template)
    if dry_run:
        where = place_of(settings.device)
        _show_plan(make_plan(model, fitted(model, settings, where)[0], where), as_json)
    else:
        carry_out(model, settings, output, force, as_json)


def _show_plan(plan: Plan, as_json: bool) -> None:
    record = plan.record()
    if as_json:
        print(json.dumps(record, indent=2))
        return
    for o in plan.outputs:
        out.print(f"{o.target}: {o.note}; {size(o.nbytes)} ({o.nbytes:,} bytes) in {o.path}", soft_wrap=True)
        for r in o.rows:
            shape = "x".join(map(str, r.shape))
            out.print(f"  {r.name:<44} {shape:>14}  {r.source_type:>6} -> {r.type} ({r.solver})", soft_wrap=True)
    out.print(f"disk {size(plan.disk)}; peak RAM about {size(plan.peak_ram)}", end="")
    out.print(f", VRAM about {size(plan.peak_vram)}" if plan.peak_vram else "", end="")
    out.print(f"; about {plan.seconds / 60:.1f} minutes")
