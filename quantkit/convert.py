"""`convert`: run a plan block by block and yield one record per step: progress bar and report are that stream.

One walk over the source serves every target: a block is read once, run once over the calibration rows while its
statistics are taken, and handed to each output in turn. Then every output is verified, named, and scored.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.corpus import Text
from quantkit.errors import UsageError, VerifyError
from quantkit.evaluate import Predictions, Score, predict, score
from quantkit.files.atomic import require_space, staged, syncing
from quantkit.files.imatrix import write_imatrix
from quantkit.forward import EMBEDDING, Network, States, embed, for_calibration, network
from quantkit.importance import Sums, imatrix_of, squares
from quantkit.journal import Journal, journal
from quantkit.later import Device, Tensor, torch
from quantkit.model import Model, open_model
from quantkit.plan import Plan
from quantkit.prefix import Inputs, prefix
from quantkit.seal import check_seals, seal
from quantkit.sensitivity import outer_statistics
from quantkit.targets import Output, Piece, Row, Solved
from quantkit.targets.gguf import IMATRIX_FILE
from quantkit.verify import digest, verify
from quantkit.walk import Step, held, walk

OUTER_ROWS = 8  # calibration rows that are run back as well, for statistics of embedding and output matrix


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a stage are over."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class TensorDone:
    """One tensor of one output is written; `loss` and `log` are those of `targets.target.Solved`."""

    target: str
    row: Row
    loss: float
    seconds: float
    log: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VariantDone:
    """One output has its final name: read back, compared, and scored where a text was given."""

    output: Output
    seconds: float
    score: Score | None


@dataclass(frozen=True)
class SourceScored:
    """The source's own score on the evaluation text."""

    score: Score


@dataclass(frozen=True)
class Resumed:
    """A block of an output was taken over from a run that had not ended."""

    target: str
    layer: int


@dataclass(frozen=True)
class Failed:
    """An output did not pass its verification and has no final name; the others go on."""

    output: Output
    error: VerifyError


Event = Progress | TensorDone | VariantDone | SourceScored | Resumed | Failed


@dataclass
class _Product:
    """An output being made: where its bytes go for now, the hashes of what was written, the time it took."""

    output: Output
    partial: Path
    staging: ExitStack  # closing it gives the product its final name
    writing: ExitStack  # closing it completes the files
    writer: Any
    thread: ThreadPoolExecutor  # where it is written
    storing: Future[None] | None = None
    digests: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    embedding: Tensor | None = None  # as it is quantized, until what is behind it is known
    journal: Journal | None = None  # of its blocks, where they take long

    def settle(self) -> None:
        """Wait for what is being written, so that no more than one tensor is kept for it; raises what it raised."""
        if self.storing:
            self.storing.result()
            self.storing = None


def convert(
    model: Model,
    plan: Plan,
    out: Path,
    device: Device,
    calibration: Tensor | None,
    text: Text | None,
    evaluation: Tensor | None,
    force: bool = False,
) -> Iterator[Event]:
    """Make every output of `plan` under `out`.

    `calibration` are token ids (rows, seqlen), `text` what they were taken from, `evaluation` chunks (n, ctx) to score
    on; None where nothing is calibrated or scored. Raises UsageError where an output is already there and `force` is
    not given, Resumable where the disk is too full; outputs that were not complete then are gone.
    """
    with folder_for(out, plan, force):
        net = None
        if plan.calibrated or evaluation is not None:
            net = network(model, torch.device(device), batch_tokens=plan.batch_tokens)
        with ExitStack() as all_products:
            products = [_open(o, out, force, all_products) for o in plan.outputs]
            sums: Sums = {}
            calibrated = calibration if plan.calibrated else None
            yield from _solve(model, net and for_calibration(net), products, device, calibrated, sums)
            weighted = any(o.format == "gguf" and o.calibrated and not o.behind for o in plan.outputs)
            if weighted and calibration is not None and text is not None:
                write_imatrix(out / IMATRIX_FILE, imatrix_of(model, sums, text.name, calibration))
            finished = []
            for p in products:
                passed = yield from _finish(p)
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
def folder_for(out: Path, plan: Plan, force: bool) -> Iterator[None]:
    """Have the output folder, with room for the plan; one that was made here and stays empty goes again."""
    claim(out, plan, force)
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        require_space(out, plan.disk)
        yield
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def claim(out: Path, plan: Plan, force: bool) -> None:
    """Refuse an output folder that holds something, unless `force`; then refuse what is not ours to replace."""
    if out.exists() and not out.is_dir():
        raise UsageError("is a file", where=out, hint="give a folder with -o")
    if out.exists() and any(out.iterdir()) and not force:
        raise UsageError("the output folder is not empty", where=out, hint="choose another, or pass --force to replace")
    for o in plan.outputs:
        if o.is_folder and (out / o.root).is_file():
            raise UsageError("a file has the name of an output folder", where=out / o.root, hint="move it away")


def _open(output: Output, out: Path, force: bool, parent: ExitStack) -> _Product:
    staging = parent.enter_context(ExitStack())
    partial = staging.enter_context(staged(out / output.root, replace=force))
    writing = staging.enter_context(ExitStack())
    writer = writing.enter_context(output.writer(partial))
    return _Product(output, partial, staging, writing, writer, writing.enter_context(ThreadPoolExecutor(1)))


def _solve(
    model: Model,
    net: Network | None,
    products: list[_Product],
    device: Device,
    calibration: Tensor | None,
    sums: Sums,
) -> Iterator[Event]:
    """Walk over the source once and write every output; what an importance matrix needs is left in `sums`."""
    outer = list(model.outer().items())
    total = len(outer) + model.layers
    stage = "calibrating and solving" if calibration is not None else "writing"
    yield Progress(stage, 0, total)
    known = {}
    if net and calibration is not None and any(p.output.outer for p in products):
        known = outer_statistics(net, calibration[:OUTER_ROWS], seed=0)
    for done, (name, ref) in enumerate(outer):
        weights = held({name: ref}, device) if calibration is not None else {}
        stats = {name: known[name]} if name in known else {}
        yield from _each(products, Piece(model, {name: ref}, weights, stats, device))
        yield Progress(stage, done + 1, total)
    states = embed(net, calibration) if net and calibration is not None else None
    rows: dict[str, States] = {}
    if net and states and calibration is not None:
        for p in (p for p in products if p.output.behind):
            rows[p.output.target] = _own_rows(p, net, states, calibration)
            p.journal = journal(p.output, model, calibration) if p.output.lasting else None
    shared = any(p.output.calibrated and (p.output.scaled or not p.output.behind) for p in products)
    for step in walk(model, net, states, device, shared, bool(rows)):
        others = [p for p in products if p.output.target not in rows]
        yield from _each(others, Piece(model, step.refs, step.weights, step.stats, device))
        for p in products:
            if net and p.output.target in rows:
                yield from _behind(p, net, step, rows[p.output.target], device)
        sums |= squares(step.layer, step.stats)
        yield Progress(stage, len(outer) + step.layer + 1, total)


def _own_rows(p: _Product, net: Network, states: States, calibration: Tensor) -> States:
    """The hidden states before the first block of an output: behind its own embedding, where that is quantized."""
    embedding, p.embedding = p.embedding, None
    return prefix(states) if embedding is None else embed(net, calibration, embedding)


def _behind(p: _Product, net: Network, step: Step, own: States, device: Device) -> Iterator[Event]:
    """One block of an output that is calibrated behind its own: solved, or taken over from its journal."""
    assert step.before is not None
    if p.journal and (kept := p.journal.block(step.layer)) is not None:
        p.settle()
        rows = {r.source: r for r in p.output.rows}
        for e in kept:
            p.digests[e.source] = e.digest
            for name, part in e.parts.items():
                p.writer.write(name, part)
            yield TensorDone(p.output.target, rows[e.source], e.loss, 0.0, e.log)
        if (hidden := p.journal.hidden(step.layer)) is not None:
            own.hidden.copy_(hidden)
        yield Resumed(p.output.target, step.layer)
        return
    made: list[Solved] = []
    inputs = Inputs(net, step.layer, step.before, own, step.weights, step.kept)
    piece = Piece(net.model, step.refs, step.weights, inputs, device, step.stats, inputs.learn)
    yield from _each([p], piece, made if p.journal else None)
    inputs.advance()
    if p.journal:
        p.settle()
        p.journal.keep(step.layer, made, p.digests, own.hidden)


def _each(products: list[_Product], piece: Piece, made: list[Solved] | None = None) -> Iterator[Event]:
    """Hand a piece to every output; what comes back is hashed and written while the next tensor is solved.

    What was written is also added to `made`, without the weights that it stands for.
    """
    for p in products:
        rows = {r.source: r for r in p.output.rows}
        start = time.perf_counter()
        for solved in p.output.solve(piece):
            if isinstance(piece.stats, Inputs):
                piece.stats.take(solved.source, solved.value if solved.unfolded is None else solved.unfolded)
            elif solved.source == EMBEDDING and p.output.behind and rows[solved.source].solver != "cast":
                p.embedding = solved.value
            if solved.draft:
                continue
            if made is not None:
                made.append(replace(solved, value=None, unfolded=None, ranged=None))
            p.settle()
            p.storing = p.thread.submit(_store, p, solved)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            p.seconds += seconds
            yield TensorDone(p.output.target, rows[solved.source], solved.loss, seconds, solved.log)


def _store(p: _Product, solved: Solved) -> None:
    value = None if p.output.sealed else solved.value
    p.digests[solved.source] = seal(solved.parts.values()) if value is None else digest(value)
    for name, part in solved.parts.items():
        p.writer.write(name, part)


def _finish(p: _Product) -> Generator[Event, None, bool]:
    """Complete, verify and name one output; the value of `yield from` says whether it passed."""
    start, stage = time.perf_counter(), f"verifying {p.output.target}"
    p.settle()
    p.writing.close()
    if p.journal:
        p.journal.clear()
    try:
        check = check_seals if p.output.sealed else verify
        with syncing(p.partial):
            for done, _ in enumerate(check(p.output, p.partial, p.digests)):
                yield Progress(stage, done + 1, len(p.output.rows))
    except VerifyError as e:
        p.staging.__exit__(type(e), e, e.__traceback__)
        yield Failed(p.output, e)
        return False
    p.staging.close()
    p.seconds += time.perf_counter() - start
    return True


def _predict(net: Network, chunks: Tensor, stage: str) -> Generator[Event, None, Predictions]:
    yield Progress(stage, 0, net.model.layers)
    for step in predict(net, chunks):
        if isinstance(step, Predictions):
            return step
        yield Progress(stage, step + 1, net.model.layers)
    raise AssertionError("a network predicts")
