"""Every error quantkit raises on purpose, as one tree.

    QuantkitError            exit 1    something we foresaw and cannot go on from
    ├── UsageError           exit 2    the command line, a recipe or a target name is wrong
    ├── BadInput             exit 65   a file or a model cannot be used
    │   ├── FormatError                a file contradicts its own format (carries the byte offset)
    │   └── Unsupported                a well-formed file holds something quantkit has no entry for
    ├── VerifyError          exit 70   an output, reopened from disk, is not what was computed
    └── Resumable            exit 75   the machine gave out (disk, memory); the same command may be run again

Each says what is wrong, where (a tensor, a key, a path) and what to do next, in one line. Only `quantkit.cli` turns
them into text and an exit status (codes of BSD sysexits.h: 65 EX_DATAERR, 70 EX_SOFTWARE, 75 EX_TEMPFAIL).
"""

from __future__ import annotations

import os


class QuantkitError(Exception):
    """The root: `what` is wrong, `where` (tensor, key or path), and the `hint` that says what to do next."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | os.PathLike[str] | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, None if where is None else os.fspath(where), hint
        place = f"{self.where}: " if self.where else ""
        super().__init__(f"{place}{what}" + (f"; {hint}" if hint else ""))


class UsageError(QuantkitError):
    """The request itself is wrong: an unknown target, contradictory options, an output that is already there."""

    exit_code = 2


class BadInput(QuantkitError):
    """The input cannot be used: it is missing, empty, or no model."""

    exit_code = 65


class FormatError(BadInput):
    """A file breaks the rules of its format; `offset` is the byte at which it does, where that is known."""

    def __init__(
        self,
        what: str,
        *,
        where: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.offset = offset
        super().__init__(what if offset is None else f"{what} (at byte {offset})", where=where, hint=hint)


class Unsupported(BadInput):
    """A well-formed file holds an architecture, a tensor type or a tokenizer that quantkit has no entry for."""


class VerifyError(QuantkitError):
    """A written output does not read back as what was computed; it does not get its final name."""

    exit_code = 70


class Resumable(QuantkitError):
    """The machine gave out, not the input: a full disk, too little memory. The same command may be run again."""

    exit_code = 75
