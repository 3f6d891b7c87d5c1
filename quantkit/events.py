"""What a conversion tells while it runs, one record a step: bars, report and exit status are made from this stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import VerifyError
from quantkit.evaluate import Score
from quantkit.targets import Output, Row


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
