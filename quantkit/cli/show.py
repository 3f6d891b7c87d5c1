"""What a person sees: progress bars on stderr, tables on stdout."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# A table in a log or a pipe is not folded to the 80 columns of a terminal that is not there.
out = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False)


def size(nbytes: float) -> str:
    """Bytes with a unit of 1000, as the Hub shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


class Bars:
    """One bar for the whole work, weighted by `expected` seconds a stage, and one for the stage that is running."""

    def __init__(self, progress: Progress, expected: Mapping[str, float]) -> None:
        self._progress, self._expected = progress, expected
        self._whole = progress.add_task("in all", total=sum(expected.values()) or 1.0)
        self._stage, self._before = "", 0.0
        self._task: TaskID | None = None

    def step(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are over."""
        if stage != self._stage:
            self._before += self._expected.get(self._stage, 0.0)
            self._stage = stage
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=total)
            if not self._progress.console.is_terminal:
                self._progress.console.print(f"{stage} ...")
        if self._task is not None:
            self._progress.update(self._task, completed=done)
        self._progress.update(self._whole, completed=self._before + self._expected.get(stage, 0.0) * done / total)


@contextmanager
def bars(expected: Mapping[str, float]) -> Iterator[Bars]:
    """Show progress while a stream runs; plain lines where stderr is no terminal."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield Bars(progress, expected)


def empty_table(title: str) -> Table:
    """A table with its title over it, without columns."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def variants_table(report: Mapping[str, Any]) -> Table:
    """The table at the end of a conversion."""
    source, evaluation = report["source"], report["evaluation"]
    title = "No variant was scored"
    if evaluation:
        title = f"Scored on {evaluation['name']}: {evaluation['rows']} chunks of {evaluation['seqlen']} tokens"
    table = empty_table(title)
    for name in ("variant", "format"):
        table.add_column(name, no_wrap=True)
    for name in ("bits/w", "size", "perplexity", "change", "mean KL", "same top"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [{**source, "target": "(source)"}, *report["variants"]]
    for v in rows:
        scored = v.get("perplexity") is not None
        kl = v.get("kl_divergence")
        table.add_row(
            v["target"],
            v["format"],
            f"{v['bits_per_weight']:.2f}",
            size(v["bytes"]),
            f"{v['perplexity']:.3f} ± {v['stderr']:.3f}" if scored else "",
            f"{100 * math.expm1(v['delta_ln_ppl']):+.2f}%" if v.get("delta_ln_ppl") is not None else "",
            f"{kl['mean']:.5f}" if kl else "",
            f"{100 * v['same_top']:.2f}%" if v.get("same_top") is not None else "",
        )
    return table


__all__ = ["Bars", "bars", "empty_table", "err", "out", "size", "variants_table"]
