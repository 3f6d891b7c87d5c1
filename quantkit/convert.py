"""`convert`: run a plan block by block and yield one record per step: progress bar and report are that stream.

One walk over the source serves every target: a block is read once, run once over the calibration rows while its
statistics are taken, and handed to each output in turn. Then every output is verified, named, and scored.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quantkit.corpus import Text
from quantkit.errors import UsageError
from quantkit.evaluate import Predictions, predict, score
from quantkit.events import Event, Progress, SourceScored, VariantDone
from quantkit.files.atomic import abandoned, require_space, sweep
from quantkit.files.imatrix import write_imatrix
from quantkit.forward import Network, States, embed, for_calibration, network
from quantkit.importance import Sums, imatrix_of, squares
from quantkit.journal import journal
from quantkit.later import Device, Tensor, torch
from quantkit.model import Model, open_model
from quantkit.plan import Plan
from quantkit.prefix import prefix
from quantkit.product import Product, behind, each, finish, opened
from quantkit.sensitivity import outer_statistics
from quantkit.stats import Stats
from quantkit.targets import Piece
from quantkit.targets.gguf import IMATRIX_FILE
from quantkit.walk import held, walk


def convert(
    model: Model,
    plan: Plan,
    out: Path,
    device: Device,
    calibration: Tensor | None,
    text: Text | None,
    evaluation: Tensor | None,
    force: bool = False,
) -> Generator[Event, None, None]:
    """Make every output of `plan` under `out`.

    `calibration` are token ids (rows, seqlen), `text` what they were taken from, `evaluation` chunks (n, ctx) to score
    on; None where nothing is calibrated or scored. Raises UsageError where an output is already there and `force` is
    not given, Resumable where the disk is too full; outputs that were not complete then are gone.
    """
    with folder_for(model, out, plan, force):
        net = None
        if plan.calibrated or evaluation is not None:
            net = network(model, torch.device(device), batch_tokens=plan.batch_tokens)
        with ExitStack() as all_products:
            products = [opened(o, out, force, all_products) for o in plan.outputs]
            sums: Sums = {}
            calibrated = calibration if plan.calibrated else None
            yield from _solve(model, net and for_calibration(net), products, device, calibrated, sums)
            if calibration is not None and text is not None and any(o.weighted for o in plan.outputs):
                write_imatrix(out / IMATRIX_FILE, imatrix_of(model, sums, text.name, calibration))
            finished = []
            for p in products:
                passed = yield from finish(p)
                finished += [p] if passed else []
        if net is None or evaluation is None:
            yield from (VariantDone(p.output, p.seconds, None) for p in finished)
            return
        reference = yield from _predict(net, evaluation, "scoring the source")
        yield SourceScored(score(reference, evaluation))
        for p in finished:
            variant = network(open_model(out / p.output.path), net.device, batch_tokens=plan.batch_tokens)
            predictions = yield from _predict(variant, evaluation, f"scoring {p.output.target}")
            yield VariantDone(p.output, p.seconds, score(predictions, evaluation, reference))


@contextmanager
def folder_for(model: Model, out: Path, plan: Plan, force: bool) -> Iterator[None]:
    """Have the output folder, with room for the plan; one that was made here and stays empty goes again."""
    claim(model, out, plan, force)
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        require_space(out, plan.disk)
        yield
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def claim(model: Model, out: Path, plan: Plan, force: bool) -> None:
    """Refuse an output folder that holds something, unless `force`; then refuse what is not ours to replace."""
    there = next(p for p in (out, *Path(os.path.abspath(out)).parents) if p.exists())
    if not there.is_dir():
        raise UsageError("is a file", where=there, hint="give a folder with -o")
    if not os.access(there, os.W_OK):
        raise UsageError("may not be written to", where=there, hint="give another folder with -o")
    held = sorted(p.name for p in out.iterdir() if not abandoned(p)) if out.exists() else []
    if held and not force:
        what = f"the output folder is not empty: it holds {held[0]}"
        raise UsageError(what, where=out, hint="choose another, or pass --force to replace")
    source = [Path(p).resolve() for p in (model.gguf.paths if model.gguf else [model.path])]
    for o in plan.outputs:
        root = (out / o.root).resolve()
        if any(root == path or root in path.parents for path in source):
            raise UsageError("is the source itself", where=out / o.root, hint="choose another output folder")
        if o.is_folder and (out / o.root).is_file():
            raise UsageError("a file has the name of an output folder", where=out / o.root, hint="move it away")


def _solve(
    model: Model,
    net: Network | None,
    products: list[Product],
    device: Device,
    calibration: Tensor | None,
    sums: Sums,
) -> Iterator[Event]:
    """Walk over the source once and write every output; what an importance matrix needs is left in `sums`."""
    outer = model.outer()
    total = len(outer) + model.layers
    stage = "calibrating and solving" if calibration is not None else "writing"
    yield Progress(stage, 0, total)
    known = {}
    if net and calibration is not None and any(p.output.outer for p in products):
        known = outer_statistics(net, calibration, seed=0)
    for done, name in enumerate(outer):
        yield from each(products, _outside(model, name, known, device))
        yield Progress(stage, done + 1, total)
    states = embed(net, calibration) if net and calibration is not None else None
    rows: dict[str, States] = {}
    if net and states and calibration is not None:
        for p in (p for p in products if p.output.behind):
            rows[p.output.target] = _own_rows(p, net, states, calibration)
            if p.output.lasting:
                p.journal = journal(p.output, model, calibration, device)
                p.resumed = p.journal.resume()
    shared = any(p.output.calibrated and (p.output.scaled or not p.output.behind) for p in products)
    weighted = any(p.output.weighted for p in products)
    for step in walk(model, net, states, device, Stats if shared else None, bool(rows), exact=weighted):
        others = [p for p in products if p.output.target not in rows]
        yield from each(others, Piece(model, step.refs, step.weights, step.stats, device))
        for p in products:
            if net and p.output.target in rows:
                yield from behind(p, net, step, rows[p.output.target], device)
        sums |= squares(step.layer, step.stats)
        yield Progress(stage, len(outer) + step.layer + 1, total)


def _outside(model: Model, name: str, known: dict[str, Stats], device: Device) -> Piece:
    """One tensor outside the blocks; where it is known what it reads, it is held to be solved."""
    refs = {name: model.tensors[name]}
    if name not in known:
        return Piece(model, refs, {}, {}, device)
    return Piece(model, refs, held(refs, device), {name: known[name]}, device)


def _own_rows(p: Product, net: Network, states: States, calibration: Tensor) -> States:
    """The hidden states before the first block of an output: behind its own embedding, where that is quantized."""
    embedding, p.embedding = p.embedding, None
    return prefix(states) if embedding is None else embed(net, calibration, embedding)


def _predict(net: Network, chunks: Tensor, stage: str) -> Generator[Event, None, Predictions]:
    yield Progress(stage, 0, net.model.layers)
    for step in predict(net, chunks):
        if isinstance(step, Predictions):
            return step
        yield Progress(stage, step + 1, net.model.layers)
    raise AssertionError("a network predicts")
