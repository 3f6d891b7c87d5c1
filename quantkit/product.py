"""One output being made: solved piece by piece, written by a thread of its own, verified, and only then named."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.errors import VerifyError
from quantkit.events import Event, Failed, Progress, Resumed, TensorDone
from quantkit.files.atomic import Syncing, staged
from quantkit.files.raw import seal
from quantkit.forward import EMBEDDING, Network, States
from quantkit.journal import Entry, Journal
from quantkit.later import Device, Tensor
from quantkit.model import in_rows
from quantkit.prefix import Inputs
from quantkit.seal import check_seals
from quantkit.targets import Output, Piece, Solved
from quantkit.verify import digest, verify
from quantkit.walk import Step


@dataclass
class Product:
    """An output being made: where its bytes go for now, the hashes of what was written, the time it took."""

    output: Output
    partial: Path
    staging: ExitStack  # closing it gives the product its final name
    writing: ExitStack  # closing it completes the files
    writer: Any
    syncing: Syncing
    thread: ThreadPoolExecutor  # where it is written
    storing: Future[None] | None = None
    digests: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    embedding: Tensor | None = None  # as it is quantized, until what is behind it is known
    journal: Journal | None = None  # of its blocks, where they take long
    resumed: tuple[int, Tensor] | None = None  # the last block that is taken over from it, and the rows behind that

    def settle(self) -> None:
        """Wait for what is being written, so that no more than one tensor is kept for it; raises what it raised."""
        if self.storing:
            self.storing.result()
            self.storing = None


def opened(output: Output, out: Path, force: bool, parent: ExitStack) -> Product:
    """An output whose bytes go to a hidden sibling of its place under `out`, until `parent` or itself is closed."""
    staging = parent.enter_context(ExitStack())
    partial = staging.enter_context(staged(out / output.root, replace=force))
    syncing = staging.enter_context(Syncing(partial))
    writing = staging.enter_context(ExitStack())
    writer = writing.enter_context(output.writer(partial))
    return Product(output, partial, staging, writing, writer, syncing, writing.enter_context(ThreadPoolExecutor(1)))


def behind(p: Product, net: Network, step: Step, own: States, device: Device) -> Iterator[Event]:
    """One block of an output that is calibrated behind its own: solved, or taken over from its journal."""
    assert step.before is not None
    if p.journal and p.resumed and step.layer <= p.resumed[0]:
        yield from _taken_over(p, p.journal.block(step.layer))
        if step.layer == p.resumed[0]:
            own.hidden.copy_(p.resumed[1])
        yield Resumed(p.output.target, step.layer)
        return
    made: list[Solved] = []
    inputs = Inputs(net, step.layer, step.before, own, step.weights, step.kept)
    piece = Piece(net.model, step.refs, step.weights, inputs, device, step.stats, inputs.learn)
    yield from each([p], piece, made if p.journal else None)
    inputs.advance()
    if p.journal:
        p.settle()
        p.journal.keep(step.layer, made, p.digests, own.hidden)


def _taken_over(p: Product, kept: list[Entry]) -> Iterator[Event]:
    """Write what an earlier run solved."""
    p.settle()
    rows = {r.source: r for r in p.output.rows}
    for e in kept:
        p.digests[e.source] = e.digest
        _write(p, e.parts)
        yield TensorDone(p.output.target, rows[e.source], e.loss, 0.0, e.log)


def each(products: list[Product], piece: Piece, made: list[Solved] | None = None) -> Iterator[Event]:
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


def _store(p: Product, solved: Solved) -> None:
    value = None if p.output.sealed else solved.value
    p.digests[solved.source] = seal(solved.parts.values()) if value is None else digest(in_rows(value), value.shape)
    _write(p, solved.parts)


def _write(p: Product, parts: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        p.writer.write(name, part)
        p.syncing.wrote(part.nbytes)


def finish(p: Product) -> Generator[Event, None, bool]:
    """Complete, verify and name one output; the value of `yield from` says whether it passed."""
    start, stage = time.perf_counter(), f"verifying {p.output.target}"
    p.settle()
    p.writing.close()
    try:
        check = check_seals if p.output.sealed else verify
        p.syncing.start()
        for done, _ in enumerate(check(p.output, p.partial, p.digests)):
            yield Progress(stage, done + 1, len(p.output.rows))
    except VerifyError as e:
        _forget(p)  # or the next run would take it over
        p.staging.__exit__(type(e), e, e.__traceback__)
        yield Failed(p.output, e)
        return False
    p.staging.close()
    _forget(p)
    p.seconds += time.perf_counter() - start
    return True


def _forget(p: Product) -> None:
    if p.journal:
        p.journal.clear()
