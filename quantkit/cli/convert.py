"""`quantkit convert`: the main job. Reads the source once, makes every target, checks and scores each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.compare import illustrate_conversion
from quantkit.cli.fitting import calibration_rows, fitted, write_recipe
from quantkit.cli.options import CHAT_TEMPLATE, OVERRIDE, SOURCE
from quantkit.cli.show import bars, err, out, size, variants_table
from quantkit.convert import claim, convert
from quantkit.corpus import Text, evaluation_chunks
from quantkit.errors import VerifyError
from quantkit.evaluate import Score
from quantkit.events import Failed, Progress, Resumed, SourceScored, TensorDone, VariantDone
from quantkit.files.atomic import staged
from quantkit.fit import Choice
from quantkit.fit_plots import draw_choice
from quantkit.forward import limit_device, place_of
from quantkit.hardware import keep_freed_memory
from quantkit.later import Device, Tensor, on_cpu, torch
from quantkit.model import Model, open_model
from quantkit.overlap import refuse_overlap
from quantkit.plan import Plan, make_plan
from quantkit.plots import write_figure
from quantkit.recipe import GGUF, Recipe, load_recipe, target_bytes
from quantkit.report import fallbacks, fingerprinting, layers_csv, report, text_record, upcasts, variant_record
from quantkit.texts import load_text


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


def carry_out(model: Model, settings: Recipe, output: Path, force: bool, as_json: bool) -> None:
    """Convert a model as a recipe has it, and show what came of it; VerifyError where an output failed its check."""
    where = place_of(settings.device)
    if settings.vram and not on_cpu(where):
        limit_device(torch.device(where), target_bytes(settings.vram))
    settings, choice = fitted(model, settings, where)
    plan = make_plan(model, settings, where)
    claim(model, output, plan, force)
    failed = _run(model, settings, plan, output, where, force, as_json, choice)
    if failed:
        raise VerifyError(f"{len(failed)} of {len(plan.outputs)} outputs failed: {failed[0]}", where=str(output))


def _run(
    model: Model,
    settings: Recipe,
    plan: Plan,
    output: Path,
    device: Device,
    force: bool,
    as_json: bool,
    choice: Choice | None,
) -> list[VerifyError]:
    """Calibrate, convert, score and report; returns the outputs' failures."""
    warnings: list[str] = []
    text, rows = calibration_rows(model, settings, torch.device(device)) if plan.calibrated else (None, None)
    words, chunks = _evaluation(model, settings)
    if text and words and (warning := refuse_overlap(text, words, force)):
        warnings.append(warning)
    if rows is not None and len(rows) < settings.samples:
        warnings.append(f"calibration text {settings.calibration} gives {len(rows)} of {settings.samples} samples")
    plan = make_plan(model, settings, device, rows=None if rows is None else len(rows))
    for o in plan.outputs:
        err.print(f"{o.target}: {o.note}; {size(o.nbytes)}", soft_wrap=True)
    for warning in warnings:
        err.print(f"warning: {warning}", soft_wrap=True)
    variants: list[dict[str, Any]] = []
    tensors: dict[str, list[TensorDone]] = {o.target: [] for o in plan.outputs}
    source_score, failed, sha256 = None, [], fingerprinting(model)
    scores: dict[str, Score] = {}
    resumed: dict[str, str] = {}
    if plan.calibrated and on_cpu(device):
        keep_freed_memory()
    with bars(plan.stages) as bar:
        for event in convert(model, plan, output, device, rows, text, chunks, force):
            match event:
                case Progress(stage, done, total):
                    bar.step(stage, done, total)
                case TensorDone(target):
                    tensors[target].append(event)
                case Resumed(target, layer):
                    resumed[target] = f"{target}: blocks 0 to {layer} are those of a run that had not ended"
                case SourceScored(score):
                    source_score = score
                case VariantDone(made, _, score):
                    scores |= {made.target: score} if score else {}
                    variants.append(variant_record(event, tensors[made.target], model.parameters))
                case Failed(_, error):
                    failed.append(error)
    if not variants:  # all failed: nothing was made, and nothing is left to lay a report beside
        return failed
    every = [t for done in tensors.values() for t in done]
    grown = [*resumed.values(), *upcasts(model, every), *fallbacks(every)]
    for warning in grown:
        err.print(f"warning: {warning}", soft_wrap=True)
    record = report(
        model,
        settings,
        source_score,
        variants,
        text_record(text, rows) if text is not None and rows is not None else None,
        text_record(words, chunks) if words is not None and chunks is not None else None,
        str(device),
        [*warnings, *grown],
        sha256.result(),
    )
    with staged(output / "report.json", replace=True) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
    if GGUF in settings.to or settings.layers:
        write_recipe(settings, output / "recipe.yaml")
    pictures = illustrate_conversion(model, record, output, scores, words, chunks, device)
    if choice:
        pictures += write_figure(draw_choice(choice), output, "types")
    if solved := layers_csv(variants):
        with staged(output / "layers.csv", replace=True) as partial:
            partial.write_text(solved)
    if as_json:
        print(json.dumps(record, indent=2))
        return failed
    out.print(variants_table(record))
    for v in variants:
        out.print(f"{v['target']:<14} {output / v['path']}", soft_wrap=True)
    for path in (output / "report.json", *pictures):
        out.print(f"{'report':<14} {path}", soft_wrap=True)
    out.print(record["lineage"]["note"], soft_wrap=True)
    return failed


def _evaluation(model: Model, settings: Recipe) -> tuple[Text | None, Tensor | None]:
    if settings.eval_text is None:
        return None, None
    text, tokenizer = load_text(settings.eval_text), model.tokenizer()
    ids = tokenizer.encode(text.plain())
    return text, evaluation_chunks(ids, settings.ctx, tokenizer, settings.eval_chunks)


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
