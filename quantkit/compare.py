"""`compare`: variants of one model as a table: sorted by KL, ties told from differences, broken ones not ranked.

A difference counts where the paired difference of KL, position by position, is more than two of its standard errors;
otherwise the two are a tie. A variant is on the Pareto front where no smaller file is as good or better.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quantkit.errors import BadInput
from quantkit.evaluate import Score, mean_and_error
from quantkit.model import Model

TIE_ERRORS = 2.0  # standard errors of the paired difference
# What no rounding of weights does, to a variant that is otherwise whole. Rounding to b bits costs a KL in proportion
# to 4^-b: 20 to 60 times that in published tables and on small models; ten times as much is a fault of the file.
MAX_PPL_RATIO, MIN_SAME_TOP = 10.0, 0.25
KL_FLOOR, KL_PER_STEP = 0.01, 600.0
# Keys that a forward pass computes with; a variant has those of its source.
COMPUTED_WITH = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "rms_norm_eps",
    "sliding_window",
    "head_dim",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Candidate:
    """A model that was scored against the reference."""

    name: str
    path: Path
    format: str
    nbytes: int
    bits_per_weight: float
    block_bits: float  # of the matrices in its blocks
    score: Score
    differs: str | None = None  # how its configuration differs from the reference's
    extra: dict[str, Any] | None = None  # what llama.cpp's run of it adds


@dataclass(frozen=True)
class Row:
    """A line of the table: `rank` is None for what is broken; `ties` are the names it is not told apart from."""

    candidate: Candidate
    rank: int | None
    front: bool = False
    ties: tuple[str, ...] = ()
    broken: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        c = self.candidate
        return {
            "name": c.name,
            "path": str(c.path),
            "format": c.format,
            "bytes": c.nbytes,
            "bits_per_weight": round(c.bits_per_weight, 4),
            "rank": self.rank,
            "pareto": self.front,
            "ties": list(self.ties),
            "broken": self.broken,
            **c.score.record(),
            **(c.extra or {}),
        }


def candidate(
    name: str, model: Model, score: Score, reference: Model, extra: dict[str, Any] | None = None
) -> Candidate:
    """A scored model as a candidate."""
    return Candidate(
        name,
        model.path,
        model.format,
        model.disk_bytes,
        8 * model.nbytes / model.parameters,
        block_bits(model),
        score,
        differences(model, reference),
        extra,
    )


def differences(model: Model, reference: Model) -> str | None:
    """The first key that a forward pass computes with and that is not the reference's, in words."""
    for name in COMPUTED_WITH:
        ours, theirs = model.config.get(name), reference.config.get(name)
        if ours != theirs:
            return f"{name} is {ours} where the reference has {theirs}"
    return None


def broken(c: Candidate) -> str | None:
    """Why a variant is broken, or None."""
    kl = c.score.kl_divergence
    worst = kl.mean if kl and math.isfinite(kl.max) else None
    return c.differs or verdict(worst, c.score.delta_ln_ppl, c.score.same_top, c.block_bits)


def verdict(kl: float | None, delta_ln_ppl: float | None, same_top: float | None, bits: float) -> str | None:
    """What is broken about a variant of `bits` bits a weight with these scores: what no rounding to its bits does.

    A number that is not finite, or None in its place, is broken.
    """
    if kl is None or delta_ln_ppl is None or not (math.isfinite(kl) and math.isfinite(delta_ln_ppl)):
        return "predicts values that are not finite"
    if (ratio := math.exp(min(delta_ln_ppl, 700.0))) > MAX_PPL_RATIO:
        return f"perplexity is {ratio:.3g} times the reference's"
    if (same_top or 0.0) < MIN_SAME_TOP:
        return f"only {100 * (same_top or 0.0):.1f}% of its top tokens are the reference's"
    if kl > (bound := KL_FLOOR + KL_PER_STEP * 4**-bits):
        return f"KL {kl:.3g} is over {bound:.3g}, ten times what {bits:.1f} bits cost"
    return None


def block_bits(model: Model) -> float:
    """Bits a weight of the matrices in a model's blocks, where its quality is decided."""
    matrices = [r for r in model.tensors.values() if r.placed.layer is not None and len(r.shape) > 1]
    return 8 * sum(r.nbytes for r in matrices) / sum(prod(r.shape) for r in matrices)


def tied(a: Candidate, b: Candidate) -> bool:
    """Whether two variants cannot be told apart: the paired difference of their KL lies inside its error bars."""
    ours, theirs = a.score.positions, b.score.positions
    assert ours is not None and theirs is not None and ours.kl is not None and theirs.kl is not None
    difference, error = mean_and_error(ours.kl - theirs.kl)
    return abs(difference) <= TIE_ERRORS * error


def compare(candidates: Sequence[Candidate]) -> list[Row]:
    """The table: whole variants by KL, ties sharing a rank, then the broken ones by name."""
    reasons = {c.name: broken(c) for c in candidates}
    whole = sorted((c for c in candidates if not reasons[c.name]), key=lambda c: (_kl(c), c.nbytes))
    rows: list[Row] = []
    for place, c in enumerate(whole):
        ties = tuple(o.name for o in whole if o is not c and tied(c, o))
        head = rows[-1].rank if rows and rows[-1].rank else 1  # the first of those that share the rank before
        rank = head if rows and tied(c, whole[head - 1]) else place + 1
        rows.append(Row(c, rank, on_front(c, whole), ties))
    lost = [Row(c, None, broken=reasons[c.name]) for c in sorted(candidates, key=lambda c: c.name) if reasons[c.name]]
    return rows + lost


def on_front(c: Candidate, others: Sequence[Candidate]) -> bool:
    """Whether no other is smaller and as good, or as small and better."""
    return not any(
        (o.nbytes < c.nbytes and (_kl(o) <= _kl(c) or tied(o, c)))
        or (o.nbytes == c.nbytes and _kl(o) < _kl(c) and not tied(o, c))
        for o in others
        if o is not c
    )


def _kl(c: Candidate) -> float:
    return c.score.kl_divergence.mean if c.score.kl_divergence else math.inf


COLUMNS = ("rank", "name", "format", "bits_per_weight", "bytes", "kl", "kl_stderr", "perplexity", "stderr")
MORE = ("ln_ppl_ratio", "ln_ppl_ratio_stderr", "same_top", "pareto", "ties", "broken")


def flat(row: Row) -> dict[str, Any]:
    """A row as plain columns."""
    r = row.record()
    kl = r.get("kl_divergence") or {}
    values = r | {"kl": kl.get("mean"), "kl_stderr": kl.get("stderr"), "ties": " ".join(r["ties"])}
    values |= {"ln_ppl_ratio": r.get("delta_ln_ppl"), "ln_ppl_ratio_stderr": r.get("delta_ln_ppl_stderr")}
    return {name: values.get(name) for name in (*COLUMNS, *MORE)}


def as_csv(rows: Sequence[Row]) -> str:
    """The table as CSV, numbers unrounded."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*COLUMNS, *MORE], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat(row) for row in rows)
    return out.getvalue()


HEADINGS = ("", "variant", "bits/w", "size", "mean KL", "perplexity", "PPL ratio", "same top", "")


def cells(row: Row) -> tuple[str, ...]:
    """A row in words, under `HEADINGS`."""
    c, score, kl = row.candidate, row.candidate.score, row.candidate.score.kl_divergence
    shared = "=" if row.ties and row.rank else ""
    note = "front" if row.front else "a smaller file is as good or better"
    note = f"BROKEN: {row.broken}" if row.broken else note
    if row.ties and not row.broken:
        note += f"; tie with {', '.join(row.ties)}"
    numbers = ("", "", "", "")
    if kl and score.delta_ln_ppl is not None and math.isfinite(kl.mean):
        ratio = math.exp(min(score.delta_ln_ppl, 700.0))
        numbers = (
            f"{kl.mean:.5f} ± {kl.stderr:.5f}",
            f"{score.perplexity:.3f} ± {score.stderr:.3f}",
            f"{ratio:.4f} ± {ratio * (score.delta_ln_ppl_stderr or 0.0):.4f}",
            f"{100 * (score.same_top or 0.0):.2f}%",
        )
    rank = "-" if row.rank is None else f"{row.rank}{shared}"
    return (rank, c.name, f"{c.bits_per_weight:.2f}", f"{c.nbytes / 1e6:.1f} MB", *numbers, note)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for a model card."""
    align = [" --- " if i in (1, 8) else " ---: " for i in range(len(HEADINGS))]
    lines = [" | ".join(HEADINGS).join(("| ", " |")), f"|{'|'.join(align)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(r))} |" for r in rows)]) + "\n"


@dataclass(frozen=True)
class Folder:
    """What a folder that `convert` filled holds: its variants by name, its source, the text they were scored on."""

    variants: dict[str, Path]
    source: Path
    report: dict[str, Any]

    @property
    def text(self) -> str | None:
        """The name or path of the text that it was scored on."""
        return (self.report.get("recipe") or {}).get("eval_text")


def read_folder(source: str) -> Folder | None:
    """A folder's report; None where `source` has none. BadInput where the report is damaged."""
    path = Path(source)
    found = path / "report.json"
    if not found.is_file():
        return None
    try:
        report = json.loads(found.read_text(encoding="utf-8"))
        variants = {v["target"]: path / v["path"] for v in report["variants"]}
        return Folder(variants, Path(report["source"]["path"]), report)
    except (ValueError, KeyError, TypeError) as e:
        raise BadInput(f"not a report that can be read ({e!r})", where=found, hint="convert again") from None


def named(sources: Sequence[str]) -> dict[str, str]:
    """Every model to compare, by a name of its own: a report's targets, or the model's file name."""
    out: dict[str, str] = {}
    for source in sources:
        folder = read_folder(source)
        found = {n: str(p) for n, p in folder.variants.items()} if folder else {Path(source).name: source}
        for name, model in found.items():
            own = name if name not in out else model
            out[own if own not in out else f"{own} #{len(out) + 1}"] = model
    return out


def largest(models: dict[str, Model]) -> str:
    """The name of the model that holds the most bits a weight: the reference where none is named."""
    return max(models, key=lambda n: models[n].nbytes / models[n].parameters)


NEAR = 0.02  # share of perplexity that may be lost, at the far end of its error bar


def recommended(rows: Sequence[Row]) -> tuple[Row, str] | None:
    """The one to take where no hardware is named, and why; None where all are broken."""
    whole = [r for r in rows if not r.broken]
    near = [r for r in whole if _far_ratio(r.candidate.score) <= 1 + NEAR]
    if near:
        best = min(near, key=lambda r: (r.candidate.nbytes, _kl(r.candidate)))
        return best, f"the smallest whose perplexity is within {NEAR:.0%} of the reference's, errors counted"
    return (whole[0], f"the least KL; none stays within {NEAR:.0%} of the reference's perplexity") if whole else None


def _far_ratio(score: Score) -> float:
    return math.exp(min((score.delta_ln_ppl or 0.0) + TIE_ERRORS * (score.delta_ln_ppl_stderr or 0.0), 700.0))
