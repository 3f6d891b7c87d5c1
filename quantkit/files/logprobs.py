"""What `llama-perplexity --kl-divergence-base FILE` writes: a model's predictions about a text, 16 bits a logit.

Source: llama.cpp `tools/perplexity/perplexity.cpp`. Little-endian; a record for every scored position of every chunk:

    "_logits_" | uint32 ctx | int32 vocabulary | int32 chunks | chunks x ctx x int32 token
    record: float32 scale | float32 floor | vocabulary x uint16 code, padded to an even count
    log-probability = scale * code + floor

Whatever lies 16 or more under the largest logit has code 0, so a record says nothing about it: llama.cpp leaves out of
the divergence what is under e^-16.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantkit.errors import BadInput, FormatError
from quantkit.later import Tensor, torch

MAGIC = b"_logits_"
HEADER = struct.Struct("<8sIii")
HEAD = 4  # uint16 values before a record's codes: two floats
MOST = 1 << 31  # of a count: what llama.cpp's integers hold


@dataclass(frozen=True)
class LogProbs:
    """A reference's log-probabilities at `counts` = (chunks, scored positions a chunk), read as they are asked for.

    `tokens` (chunks, ctx) int64 are the text's as it was cut, without the BOS that replaces a chunk's first.
    """

    path: Path
    tokens: Tensor
    vocabulary: int
    records: np.ndarray = field(repr=False)  # (chunks * positions, HEAD + padded vocabulary) uint16, mapped
    floor: float = -16.0

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def counts(self) -> tuple[int, int]:
        """Chunks, and scored positions in each."""
        return len(self.tokens), len(self.records) // len(self.tokens)

    def logprobs(self, rows: slice) -> Tensor:
        """Log-probabilities of scored positions `rows` (flattened), float32 (rows, vocabulary); not normalized."""
        records = np.ascontiguousarray(self.records[rows])
        scale, floor = torch.from_numpy(records[:, :HEAD].copy().view(np.float32))[:, :, None].unbind(1)
        codes = torch.from_numpy(records[:, HEAD : HEAD + self.vocabulary].astype(np.float32))
        return codes.mul_(scale).add_(floor)


def is_logprobs(path: str | Path) -> bool:
    """Whether a file begins as these do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_logprobs(path: str | Path) -> LogProbs:
    """Open a file, of which only the tokens are read. BadInput where it cannot be opened, FormatError if damaged."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as e:
        raise BadInput(f"cannot be opened: {e.strerror or e}", where=path, hint="check the path") from None
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise FormatError("not a file of log-probabilities", where=path, hint="llama-perplexity writes them")
    _, ctx, vocabulary, chunks = HEADER.unpack(header)
    if not (4 <= ctx < MOST and vocabulary > 0 and chunks > 0):
        raise FormatError(f"{chunks} chunks of {ctx} tokens out of {vocabulary}", where=path, offset=len(MAGIC))
    positions, width = ctx - 1 - ctx // 2, HEAD + 2 * ((vocabulary + 1) // 2)
    begin = HEADER.size + 4 * chunks * ctx
    needed = begin + 2 * chunks * positions * width
    if size != needed:
        hint = "the run that wrote it did not end, or the copy is not whole"
        raise FormatError(f"has {size:,} bytes where its header asks for {needed:,}", where=path, hint=hint)
    tokens = np.fromfile(path, "<i4", chunks * ctx, offset=HEADER.size).reshape(chunks, ctx)
    records = np.memmap(path, "<u2", "r", begin, (chunks * positions, width))
    return LogProbs(path, torch.from_numpy(tokens.astype(np.int64)), vocabulary, records)
