"""Whether a text that is scored on also stands in the text that was calibrated on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.corpus import Text, plain
from quantkit.errors import UsageError

# Scripts written without spaces, where a character stands for a word: Thai to Tibetan, Burmese, Khmer, kana and Han.
UNSPACED = r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
PUNCTUATION = r"\s!-/:-@\[-`{-~\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff00-\uff0f\uff1a-\uff20"
WORD = re.compile(f"[{UNSPACED}]|[^{UNSPACED}{PUNCTUATION}]+")


@dataclass(frozen=True)
class Overlap:
    """How many of the evaluation's n-grams also occur in the calibration text; `example` is the first one."""

    shared: int
    total: int
    example: str | None

    @property
    def share(self) -> float:
        """Between 0 and 1; 0 for a text too short to have n-grams."""
        return self.shared / self.total if self.total else 0.0


def overlap(calibration: Text, evaluation: Text, n: int = 13) -> Overlap:
    """The contamination check of GPT-3 (Brown et al. 2020, appendix C): n words in a row, without case and punctuation.

    Thirteen words in a row hardly ever meet by chance, while a shared paragraph shares nearly all of its n-grams.
    """
    seen = set(_ngrams(calibration, n))
    shared = total = 0
    example = None
    for gram in _ngrams(evaluation, n):
        total += 1
        if gram in seen:
            shared += 1
            example = example or " ".join(gram)
    return Overlap(shared, total, example)


def _ngrams(text: Text, n: int) -> Iterator[tuple[str, ...]]:
    """Every n words in a row within one document."""
    for document in text.documents:
        words = WORD.findall(plain(document).lower())
        yield from zip(*(words[start:] for start in range(n)), strict=False)


def refuse_overlap(calibration: Text, evaluation: Text, force: bool = False) -> str | None:
    """None for two texts that share nothing; UsageError for two that do, or with `force` a line of warning instead.

    A model calibrated on the text it is scored on looks better than it is.
    """
    if calibration.sha256 == evaluation.sha256:
        finding = f"calibration and evaluation are the same text ({evaluation.name})"
    else:
        found = overlap(calibration, evaluation)
        if not found.shared:
            return None
        finding = (
            f"{found.shared} of {found.total} 13-word sequences of the evaluation text {evaluation.name} also stand "
            f'in the calibration text {calibration.name}, the first being "{found.example}"'
        )
    if not force:
        raise UsageError(finding, hint="choose another text for one of the two, or pass --force to go on")
    return f"{finding}; the score will look better than it is"
