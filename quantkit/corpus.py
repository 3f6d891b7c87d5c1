"""Text to calibrate on and to score on: how it becomes rows of token ids, and how it is cut (`texts`: where from).

A `Text` is a frozen record of documents with the hash of the bytes they were read from, so that a report can say what a
model was calibrated on and scored on. A document is a string, or a dialogue, rendered through the chat template of the
model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from quantkit.chat import render
from quantkit.errors import BadInput, UsageError
from quantkit.later import Tensor, torch

if TYPE_CHECKING:
    from quantkit.arch.tokenizer import Tokenizer


class Message(NamedTuple):
    """One turn of a dialogue; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Dialogue = tuple[Message, ...]
Document = str | Dialogue


@dataclass(frozen=True)
class Text:
    """Documents in their order, and what is needed to name them in a report.

    `sha256` is that of the bytes read (of all files in order, where there are several); `source` is a path, a place on
    the Hub, or "built-in".
    """

    name: str
    documents: tuple[Document, ...]
    sha256: str
    source: str

    def plain(self) -> str:
        """The whole text as one string, to be scored: a document exactly as it is, several a blank line apart."""
        return "\n\n".join(map(plain, self.documents))


def plain(document: Document) -> str:
    """A document as a reader sees it; a dialogue as "role: content" lines."""
    return document if isinstance(document, str) else "\n".join(f"{role}: {content}" for role, content in document)


def calibration_batch(text: Text, tokenizer: Tokenizer, samples: int, seqlen: int, seed: int = 0) -> Tensor:
    """Rows of token ids to calibrate on, int64 (samples, seqlen), or fewer rows where the text gives no more.

    The documents, each beginning with BOS where the tokenizer adds it, are joined into one stream, and the rows are
    windows an equal distance apart over all of it, one after the other where they fill it. This is systematic sampling:
    documents of a kind lie together, so every kind is present in proportion to its tokens to within a row, which a
    shuffle would only achieve on average. `seed` chooses the document that the stream begins with (it comes round to
    those before), and so the windows; a single document always begins at its beginning.

    Raises UsageError for sizes below 1, and BadInput when the text does not fill one row.
    """
    if samples < 1 or seqlen < 1:
        raise UsageError(f"{samples} samples of {seqlen} tokens: both must be at least 1")
    first = Random(seed).randrange(len(text.documents))
    documents = text.documents[first:] + text.documents[:first]
    stream = torch.tensor([token for document in documents for token in _encode(document, tokenizer)], dtype=torch.long)
    total = len(stream)
    rows = min(samples, total // seqlen)
    if not rows:
        hint = "give a longer text or a smaller --seqlen"
        raise BadInput(f"{total} tokens do not fill one sample of {seqlen}", where=text.name, hint=hint)
    starts = torch.arange(rows) * total // rows
    return stream[starts[:, None] + torch.arange(seqlen)]


def evaluation_chunks(
    ids: Sequence[int], ctx: int, tokenizer: Tokenizer, chunks: int | None = None, stride: int | None = None
) -> Tensor:
    """Token ids of a whole text -> int64 (n, ctx), cut as llama.cpp's perplexity tool cuts them.

    Where the tokenizer adds BOS, it precedes the text (so the first chunk loses nothing) and then REPLACES the first
    token of every chunk. The tail that does not fill a chunk is dropped; `chunks` keeps only the first so many.
    With a `stride`, chunks begin every `stride` tokens and have ctx + stride/2 tokens, rounded up to 256 as llama.cpp
    rounds a context; BOS replaces nothing.

    Raises BadInput for a text shorter than one chunk (llama.cpp demands two), UsageError for an impossible size.
    """
    if ctx < 4 or (chunks is not None and chunks < 1):
        raise UsageError(f"{chunks or 'all'} chunks of {ctx} tokens: needs at least 1 chunk of at least 4")
    if stride is not None and not 1 <= stride < ctx:
        raise UsageError(f"a stride of {stride} in chunks of {ctx}", where="--stride", hint="give 1 to ctx - 1")
    stream = torch.tensor(_with_bos(list(ids), tokenizer), dtype=torch.long)
    length = ctx if stride is None else -(-(ctx + stride // 2) // 256) * 256
    whole = len(stream) // ctx if stride is None else max(0, -(-(len(stream) - length) // stride))
    if not whole:
        fits = 1 << (len(stream).bit_length() - 1) if len(stream) else 0
        hint = f"--ctx {fits} fits" if fits >= 4 and stride is None else "give a longer text"
        raise BadInput(f"the text has {len(stream)} tokens, one chunk needs {length}", hint=hint)
    rows = stream.unfold(0, length, stride or ctx)[:whole][:chunks].clone()
    if tokenizer.add_bos and stride is None:
        rows[:, 0] = stream[0]
    return rows


def _encode(document: Document, tokenizer: Tokenizer) -> list[int]:
    """A document's token ids, with BOS in front where the tokenizer adds it; a dialogue through the chat template.

    A model without a template, or whose template refuses the dialogue (Gemma's knows no system role), sees plain lines.
    """
    if isinstance(document, tuple) and tokenizer.chat_template:
        names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        special = {n: "" if i is None else tokenizer.backend.id_to_token(i) or "" for n, i in names.items()}
        rendered = render([m._asdict() for m in document], tokenizer.chat_template, special)
        if rendered is not None:
            return _with_bos(tokenizer.encode_special(rendered), tokenizer)
    return _with_bos(tokenizer.encode(plain(document)), tokenizer)


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Puts BOS in front where the tokenizer adds it, once: many a chat template writes it itself."""
    bos = tokenizer.bos if tokenizer.add_bos else None
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
