"""Text to calibrate on and to score on: where it comes from, how it becomes rows of token ids, and how it is cut.

A `Text` is a frozen record of documents with the hash of the bytes they were read from, so that a report can say what a
model was calibrated on and scored on. A document is a string, or a dialogue, rendered through the chat template of the
model at hand. Text that a model writes for itself is decoded elsewhere and arrives here as a `Text`.

Left out: streaming. A calibration text is a few megabytes, and sampling evenly needs the whole of it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from quantkit.chat import render
from quantkit.errors import BadInput, UsageError
from quantkit.later import Tensor, torch
from quantkit.resources import resource

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


# ------------------------------------------------------------------------------------------------------------- loading

SEPARATOR = re.compile(r"^%%%%$", re.MULTILINE)  # between two documents of a built-in file

DEFAULT_FILES = ("prose-en.txt", "prose-multi.txt", "code.txt", "tables-math.txt", "dialogues.jsonl")

# The archive that llama.cpp's scripts/get-wikitext-2.sh downloads, at one revision, and the file in it on which its
# published perplexities are measured: the test split of wikitext-2-raw-v1 (Merity et al. 2016, CC BY-SA 3.0 and GFDL).
WIKITEXT2_REPO = "ggml-org/ci"
WIKITEXT2_REVISION = "927b3642933080f1b0e811e2f916e14c292992f9"
WIKITEXT2_ARCHIVE = "wikitext-2-raw-v1.zip"
WIKITEXT2_MEMBER = "wikitext-2-raw/wiki.test.raw"
WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"

# What GPTQ's papers and their successors score on: the first 1,100 documents of C4's validation split, a space apart,
# at the revision that their code names (Raffel et al. 2020, ODC-BY).
C4_REPO = "allenai/c4"
C4_REVISION = "607bd4c8450a42878aa9ddc051a65a055450ef87"
C4_FILE = "en/c4-validation.00000-of-00008.json.gz"
C4_DOCUMENTS = 1100


def load_text(name_or_path: str | Path) -> Text:
    """A text by its name, or from a file.

    Names: `default` is the calibration text that ships with quantkit; `demo` a short text of ours for evaluation, held
    out from it; `wikitext2` the file wiki.test.raw, byte for byte, from the Hub (1.3 MB in an archive of 4.7 MB, which
    the Hub's cache keeps); `c4` the beginning of C4's validation split. Write ./default for a file of that name.

    Files, by suffix: .jsonl has one document a line, in "text" or in "messages"; .parquet one a row, in a column "text"
    (needs pyarrow); any other file is one document, UTF-8, exactly as it is. Empty documents are dropped.

    Raises BadInput for a file that is missing, empty or unreadable, and for a download that fails.
    """
    built_in = BUILT_IN.get(str(name_or_path))
    return built_in() if built_in else _load_file(Path(name_or_path))


def _load_file(path: Path) -> Text:
    """Raises BadInput, also for a name that is neither built in nor a file."""
    if not path.is_file():
        hint = f"give a .txt, .jsonl or .parquet file, or one of: {', '.join(BUILT_IN)}"
        raise BadInput("no such text file", where=path, hint=hint)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=path) from error
    reader = READERS.get(path.suffix.lower(), lambda raw, where: [_decode(raw, where)])
    return _text(path.stem, reader(raw, path), raw, str(path))


def _load_default() -> Text:
    """The calibration text that ships with quantkit: prose in English and other languages, code, tables, dialogues."""
    paths = [resource("calibration", "default", name) for name in DEFAULT_FILES]
    raws = [path.read_bytes() for path in paths]
    documents: list[Document] = []
    for path, raw in zip(paths, raws, strict=True):
        documents += _from_jsonl(raw, path) if path.suffix == ".jsonl" else _from_separated(raw, path)
    return _text("default", documents, b"".join(raws), "built-in")


def _load_demo() -> Text:
    """A short text of ours for evaluation, held out from `default`."""
    path = resource("calibration", "eval", "demo.txt")
    raw = path.read_bytes()
    return _text("demo", [_decode(raw, path)], raw, "built-in")


def _load_wikitext2() -> Text:
    """The test split of wikitext-2-raw-v1 as one document: the bytes of wiki.test.raw, checked by their hash.

    Salesforce/wikitext holds the same text as parquet rows, where a blank line (" \\n" in the raw file) has become "".
    """
    hint = "download wiki.test.raw elsewhere and pass that file"
    archive, source = _from_hub("wikitext2", WIKITEXT2_REPO, WIKITEXT2_REVISION, WIKITEXT2_ARCHIVE, hint)
    try:
        with zipfile.ZipFile(archive) as bundle:
            raw = bundle.read(WIKITEXT2_MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"the archive cannot be read: {error}", where=archive, hint=hint) from error
    if hashlib.sha256(raw).hexdigest() != WIKITEXT2_SHA256:
        raise BadInput(f"{WIKITEXT2_MEMBER} is not the published text", where=archive, hint=hint)
    return _text("wikitext2", [_decode(raw, Path(archive))], raw, source)


def _load_c4() -> Text:
    """The first documents of C4's validation split as one, as GPTQ's own evaluation joins them."""
    hint = "download that file elsewhere, unpack it and pass it as .jsonl"
    archive, source = _from_hub("c4", C4_REPO, C4_REVISION, C4_FILE, hint)
    try:
        with gzip.open(archive) as lines:
            raw = b"".join(line for _, line in zip(range(C4_DOCUMENTS), lines, strict=False))
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"the archive cannot be read: {error}", where=archive, hint=hint) from error
    return _text("c4", [" ".join(map(plain, _from_jsonl(raw, Path(archive))))], raw, source)


def _from_hub(name: str, repo: str, revision: str, file: str, hint: str) -> tuple[str, str]:
    """A file of a dataset at one revision, through the Hub's cache: its path, and its place in words."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    source = f"{repo}@{revision}/{file}"
    try:
        return hf_hub_download(repo_id=repo, filename=file, repo_type="dataset", revision=revision), source
    except (OSError, HTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadInput(f"{name} cannot be downloaded: {reason}", where=source, hint=hint) from error


BUILT_IN: dict[str, Callable[[], Text]] = {
    "default": _load_default,
    "demo": _load_demo,
    "wikitext2": _load_wikitext2,
    "c4": _load_c4,
}


def _text(name: str, documents: Sequence[Document], raw: bytes, source: str) -> Text:
    """Drops documents without content; raises BadInput when none is left."""
    kept = tuple(document for document in documents if plain(document).strip())
    if not kept:
        raise BadInput("there is no text in it", where=source)
    return Text(name, kept, hashlib.sha256(raw).hexdigest(), source)


def _decode(raw: bytes, where: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 text (at byte {error.start})", where=where, hint="convert it to UTF-8") from error


def _from_separated(raw: bytes, where: Path) -> list[Document]:
    """Documents between lines that hold only %%%%."""
    return [document.strip("\n") for document in SEPARATOR.split(_decode(raw, where))]


def _from_jsonl(raw: bytes, where: Path) -> list[Document]:
    """One document a line: {"text": ...} or {"messages": [{"role": ..., "content": ...}, ...]}."""
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    lines = enumerate(_decode(raw, where).split("\n"), start=1)
    return [_document(line, f"{where}, line {number}") for number, line in lines if line.strip()]


def _document(line: str, where: str) -> Document:
    """One line of a .jsonl file; raises BadInput naming the line."""
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError, or an integer beyond what Python parses
        raise BadInput(f"not JSON: {error}", where=where) from error
    match record:
        case {"text": str(text)}:
            return text
        case {"messages": [*messages]}:
            return tuple(_message(message, where) for message in messages)
    raise BadInput('a document needs a string "text" or a list "messages"', where=where)


def _message(message: object, where: str) -> Message:
    match message:
        case {"role": str(role), "content": str(content)}:
            return Message(role, content)
    raise BadInput('a message needs a "role" and a "content", both strings', where=where)


def _from_parquet(raw: bytes, where: Path) -> list[Document]:
    """One document a row of the column "text"."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        hint = "pip install pyarrow, or convert the file to .jsonl"
        raise BadInput("reading .parquet needs pyarrow", where=where, hint=hint) from error
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(raw), columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise BadInput('no parquet file with a column "text"', where=where) from error
    if not all(isinstance(row, str | None) for row in rows):
        raise BadInput('the column "text" does not hold strings', where=where)
    return [row or "" for row in rows]


READERS: dict[str, Callable[[bytes, Path], list[Document]]] = {".jsonl": _from_jsonl, ".parquet": _from_parquet}


# ------------------------------------------------------------------------------------------------------ rows of tokens


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
