"""Pictures for a model card: KL and perplexity against size, with error bars, and the Pareto front as a line."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from quantkit.compare import Row
from quantkit.files.atomic import staged

FORMATS = ("png", "svg")
BLUE, GREY = "#2b7bba", "#999999"


def blank(title: str, dark: bool = False, height: float = 4.2) -> tuple[Any, str]:
    """A figure without panels, and the colour of its ink."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "quantkit"  # the same picture, the same bytes
    from matplotlib.figure import Figure

    ink = "#e6e6e6" if dark else "#222222"
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.patch.set_alpha(0.0 if dark else 1.0)
    figure.suptitle(title, color=ink, fontsize=10)
    return figure, ink


def dress(axes: Any, across: str, up: str, ink: str) -> None:
    """Name the axes of a panel and colour them."""
    axes.set_facecolor("none")
    axes.set_xlabel(across, color=ink)
    axes.set_ylabel(up, color=ink)
    axes.tick_params(colors=ink)
    axes.grid(alpha=0.25)
    for spine in axes.spines.values():
        spine.set_color(ink)


def draw(rows: Sequence[Row], title: str, dark: bool = False) -> Any:
    """A figure of two panels; broken variants are left out, since they would set the scale."""
    figure, ink = blank(title, dark)
    whole = [r for r in rows if not r.broken]
    left, right = figure.subplots(1, 2)
    _panel(left, whole, [_kl(r) for r in whole], "mean KL (nats)", ink)
    _panel(right, whole, [(r.candidate.score.perplexity, r.candidate.score.stderr) for r in whole], "perplexity", ink)
    if whole and min(_kl(r)[0] for r in whole) > 0:
        left.set_yscale("log")
    return figure


def _panel(axes: Any, rows: Sequence[Row], values: Sequence[tuple[float, float]], label: str, ink: str) -> None:
    dress(axes, "size (MB of 1e6 bytes)", label, ink)
    for row, (value, error) in zip(rows, values, strict=True):
        size, color = row.candidate.nbytes / 1e6, BLUE if row.front else GREY
        axes.errorbar(size, value, yerr=error, fmt="o", color=color, capsize=3)
        axes.annotate(
            row.candidate.name, (size, value), xytext=(5, 4), textcoords="offset points", fontsize=8, color=ink
        )
    front = sorted((r.candidate.nbytes / 1e6, v) for r, (v, _) in zip(rows, values, strict=True) if r.front)
    axes.plot([x for x, _ in front], [y for _, y in front], color=BLUE, linewidth=1, alpha=0.6)


def _kl(row: Row) -> tuple[float, float]:
    kl = row.candidate.score.kl_divergence
    return (kl.mean, kl.stderr) if kl else (0.0, 0.0)


def rendered(figure: Any, kind: str) -> bytes:
    """The picture as the bytes of a `png` or `svg` file."""
    out = BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    figure.savefig(out, format=kind, dpi=150, metadata=metadata)
    return out.getvalue()


def write_figure(figure: Any, folder: Path, stem: str) -> list[Path]:
    """The picture as `stem.png` and `stem.svg` in `folder`; their paths."""
    paths = [folder / f"{stem}.{kind}" for kind in FORMATS]
    for path, kind in zip(paths, FORMATS, strict=True):
        with staged(path, replace=True) as partial:
            partial.write_bytes(rendered(figure, kind))
    return paths
