"""Where a `Text` comes from: built in, from the Hub, or a file.

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
from pathlib import Path

from quantkit.corpus import Document, Message, Text, plain
from quantkit.errors import BadInput
from quantkit.resources import resource

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
