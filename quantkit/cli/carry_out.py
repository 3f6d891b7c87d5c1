"""What `quantkit convert` and `quantkit advise --make` do with a recipe: calibrate, convert, score, report, show."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.cli.compare import illustrate_conversion
from quantkit.cli.device import own
from quantkit.cli.fitting import calibration_rows, fitted, write_recipe
from quantkit.cli.show import bars, err, out, size, variants_table
from quantkit.convert import claim, convert
from quantkit.corpus import Text, evaluation_chunks
from quantkit.errors import VerifyError
from quantkit.evaluate import Score
from quantkit.events import Event, Failed, Progress, Resumed, SourceScored, TensorDone, VariantDone
from quantkit.files.atomic import staged
from quantkit.fit import Choice
from quantkit.fit_plots import draw_choice
from quantkit.forward import limit_device, place_of
from quantkit.hardware import keep_freed_memory
from quantkit.later import Device, Tensor, on_cpu, torch
from quantkit.model import Model
from quantkit.overlap import refuse_overlap
from quantkit.plan import Plan, make_plan
from quantkit.plots import write_figure
from quantkit.recipe import GGUF, Recipe, target_bytes
from quantkit.report import fallbacks, fingerprinting, layers_csv, report, text_record, upcasts, variant_record
from quantkit.texts import load_text


@dataclass(frozen=True)
class Job:
    """What is to be done: a model, the recipe with every type chosen, where it goes and is computed."""

    model: Model
    settings: Recipe
    output: Path
    device: Device
    force: bool
    choice: Choice | None  # where the recipe asked for a size

    def plan(self, rows: int | None = None) -> Plan:
        """The plan, for the calibration rows that the text really gives where they are known."""
        return make_plan(self.model, self.settings, self.device, rows)


@dataclass(frozen=True)
class Texts:
    """What is read beside the model, where it is: calibration rows (samples, seqlen) and chunks to score (n, ctx)."""

    calibration: Text | None
    rows: Tensor | None
    evaluation: Text | None
    chunks: Tensor | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Made:
    """What came of a conversion, by its events."""

    source: Score | None
    variants: list[VariantDone]
    tensors: dict[str, list[TensorDone]]  # by target
    resumed: dict[str, int]  # target -> the last block of an earlier run
    failed: list[VerifyError]


def carry_out(model: Model, settings: Recipe, output: Path, force: bool, as_json: bool) -> None:
    """Convert a model as a recipe has it, and show what came of it; VerifyError where an output failed its check."""
    where = place_of(settings.device)
    if settings.vram and not on_cpu(where):
        limit_device(torch.device(where), target_bytes(settings.vram))
    settings, choice = fitted(model, settings, where)
    job = Job(model, settings, output, where, force, choice)
    plan = job.plan()
    claim(model, output, plan, force)
    texts = _texts(job, plan.calibrated)
    plan = job.plan(None if texts.rows is None else len(texts.rows))
    for o in plan.outputs:
        err.print(f"{o.target}: {o.note}; {size(o.nbytes)}", soft_wrap=True)
    _warn(texts.warnings)
    if plan.calibrated and on_cpu(where):
        keep_freed_memory()
    if plan.calibrated or texts.chunks is not None:
        own(torch.device(where))
    sha256 = fingerprinting(model)
    events = convert(model, plan, output, where, texts.rows, texts.calibration, texts.chunks, force)
    made = _followed(events, plan)
    if made.variants:  # or nothing was made, and nothing is left to lay a report beside
        record = _record(job, texts, made, sha256.result())
        _show(record, output, _written(job, texts, made, record), as_json)
    if made.failed:
        what = f"{len(made.failed)} of {len(plan.outputs)} outputs failed: {made.failed[0]}"
        raise VerifyError(what, where=str(output))


def _texts(job: Job, calibrated: bool) -> Texts:
    """Calibration and evaluation text; UsageError where they overlap and nothing forces it."""
    settings, warnings = job.settings, []
    text, rows = calibration_rows(job.model, settings, torch.device(job.device)) if calibrated else (None, None)
    words, chunks = _evaluation(job.model, settings)
    if text and words and (warning := refuse_overlap(text, words, job.force)):
        warnings.append(warning)
    if rows is not None and len(rows) < settings.samples:
        warnings.append(f"calibration text {settings.calibration} gives {len(rows)} of {settings.samples} samples")
    return Texts(text, rows, words, chunks, tuple(warnings))


def _evaluation(model: Model, settings: Recipe) -> tuple[Text | None, Tensor | None]:
    if settings.eval_text is None:
        return None, None
    text, tokenizer = load_text(settings.eval_text), model.tokenizer()
    ids = tokenizer.encode(text.plain())
    return text, evaluation_chunks(ids, settings.ctx, tokenizer, settings.eval_chunks)


def _followed(events: Generator[Event, None, None], plan: Plan) -> Made:
    """Run a conversion, with bars, to its end; where it is ended early, what is half-written is removed at once."""
    source, resumed = None, {}
    tensors: dict[str, list[TensorDone]] = {o.target: [] for o in plan.outputs}
    variants, failed = [], []
    with closing(events), bars(plan.stages) as bar:
        for event in events:
            match event:
                case Progress(stage, done, total):
                    bar.step(stage, done, total)
                case TensorDone(target):
                    tensors[target].append(event)
                case Resumed(target, layer):
                    resumed[target] = layer
                case SourceScored(score):
                    source = score
                case VariantDone():
                    variants.append(event)
                case Failed(_, error):
                    failed.append(error)
    return Made(source, variants, tensors, resumed, failed)


def _record(job: Job, texts: Texts, made: Made, sha256: dict[str, str]) -> dict[str, Any]:
    """The report, as JSON; what it warns of beside the texts is said here."""
    every = [t for done in made.tensors.values() for t in done]
    resumed = [f"{t}: blocks 0 to {layer} are those of a run that had not ended" for t, layer in made.resumed.items()]
    grown = [*resumed, *upcasts(job.model, every), *fallbacks(every)]
    _warn(grown)
    return report(
        job.model,
        job.settings,
        made.source,
        [variant_record(v, made.tensors[v.output.target], job.model.parameters) for v in made.variants],
        text_record(texts.calibration, texts.rows),
        text_record(texts.evaluation, texts.chunks),
        str(job.device),
        [*texts.warnings, *grown],
        sha256,
    )


def _written(job: Job, texts: Texts, made: Made, record: dict[str, Any]) -> list[Path]:
    """Write the report and all that lies beside it; the paths that are shown."""
    path = job.output / "report.json"
    _keep(path, json.dumps(record, indent=2) + "\n")
    if GGUF in job.settings.to or job.settings.layers:
        write_recipe(job.settings, job.output / "recipe.yaml")
    if solved := layers_csv(record["variants"]):
        _keep(job.output / "layers.csv", solved)
    scores = {v.output.target: v.score for v in made.variants if v.score}
    drawn = illustrate_conversion(job.model, record, job.output, scores, texts.evaluation, texts.chunks, job.device)
    return [path, *drawn, *(write_figure(draw_choice(job.choice), job.output, "types") if job.choice else [])]


def _keep(path: Path, text: str) -> None:
    with staged(path, replace=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _show(record: dict[str, Any], output: Path, reports: list[Path], as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, indent=2))
        return
    out.print(variants_table(record))
    for v in record["variants"]:
        out.print(f"{v['target']:<14} {output / v['path']}", soft_wrap=True)
    for path in reports:
        out.print(f"{'report':<14} {path}", soft_wrap=True)
    out.print(record["lineage"]["note"], soft_wrap=True)


def _warn(warnings: tuple[str, ...] | list[str]) -> None:
    for warning in warnings:
        err.print(f"warning: {warning}", soft_wrap=True)
