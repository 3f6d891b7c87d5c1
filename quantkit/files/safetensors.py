"""Safetensors folders: lazily read through the safetensors library, streamed out with offsets known in advance.

The library's own writer wants every tensor in memory at once. The format is simple enough to stream: eight bytes of
header length, a JSON header, then the data without holes (huggingface/safetensors, README "Format"). A layout is
computed from names, types and shapes alone, so that a plan knows the size of a folder to the byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open

from quantkit.errors import BadInput, FormatError
from quantkit.files.raw import Bytes, mapped, put, raw_bytes
from quantkit.later import Tensor, torch

SHARD_BYTES = 5 * 10**9  # transformers' default `max_shard_size`
INDEX = "model.safetensors.index.json"

TYPES = {  # the format's name -> torch's, and the bytes of an element
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
NAMES = {theirs: name for name, (theirs, _) in TYPES.items()}


def type_of(dtype: torch.dtype | str) -> str:
    """The format's name of a type of torch's, which may be given by its own name."""
    return NAMES[str(dtype).removeprefix("torch.")]


def nbytes_of(dtype: torch.dtype | str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return prod(shape) * TYPES[type_of(dtype)][1]


@dataclass(frozen=True)
class Entry:
    """One tensor in a folder: which file holds it, its type by the format's name, its shape, and where it begins."""

    file: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * TYPES[self.type][1]


@dataclass(frozen=True)
class Folder:
    """A readable folder of safetensors: every tensor by name. No data is read before `read` or `stored`."""

    path: Path
    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in its own type."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=getattr(torch, TYPES[entry.type][0]))
        if entry.nbytes:  # copied: a map of the file would follow its changes
            out.view(-1).view(torch.uint8).copy_(torch.from_numpy(self.stored(name)))
        return out

    def stored(self, name: str) -> Bytes:
        """Its bytes, as they lie in the file."""
        entry = self.entries[name]
        with open(self.path / entry.file, "rb") as f:
            return mapped(f.fileno(), entry.offset, entry.nbytes)


def _lacking(path: Path) -> str:
    """What to do about a folder without weights that can be read."""
    if any(path.glob("*.safetensors")):
        return f"{INDEX} is missing: download it again"
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return "pickled weights (.bin) are not read: save them as safetensors"
    return "give a GGUF file or an HF model folder"


def open_folder(path: Path) -> Folder:
    """Index the safetensors of a folder: `model.safetensors`, or the shards that its index names.

    Raises BadInput where there are none, and FormatError for a damaged file or a shard that is missing.
    """
    if (path / INDEX).is_file():
        try:
            files = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise FormatError("the index is not readable", where=path / INDEX, hint="download it again") from None
    elif (path / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise BadInput("no model.safetensors in this folder", where=path, hint=_lacking(path))
    entries: dict[str, Entry] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not (path / file).is_file():
            raise FormatError(f"the shard {file} is missing", where=path, hint="download it again")
        try:
            with safe_open(path / file, framework="np"):  # the library's own checks of a header
                entries |= _entries(path / file)
        except (SafetensorError, OSError) as e:
            raise FormatError(f"no readable safetensors file ({e})", where=path / file, hint="get it again") from None
        except KeyError as e:
            known = " ".join(TYPES)
            raise FormatError(f"unknown tensor type {e}", where=path / file, hint=f"known: {known}") from None
    return Folder(path, entries)


def _entries(path: Path) -> dict[str, Entry]:
    """What the header of a file says; KeyError for a type that is not known."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, told in header.items():
        TYPES[told["dtype"]]
        entries[name] = Entry(path.name, told["dtype"], tuple(told["shape"]), 8 + length + told["data_offsets"][0])
    return entries


@dataclass(frozen=True)
class Shard:
    """One file to be: its name, its header, and where each tensor begins; offsets count from the start of the file."""

    file: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """A folder's weights to be: the shards, and the text of the index where there is more than one."""

    shards: tuple[Shard, ...]
    index: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the index included."""
        return sum(s.nbytes for s in self.shards) + len((self.index or "").encode())


Spec = tuple[str, Any, tuple[int, ...]]  # name, type (torch's, or its name), shape


def layout_folder(tensors: Sequence[Spec], shard_bytes: int = SHARD_BYTES) -> Layout:
    """Lay tensors out in order, a new shard where the next one would pass `shard_bytes`."""
    groups: list[list[Spec]] = [[]]
    room = shard_bytes
    for spec in tensors:
        size = nbytes_of(spec[1], spec[2])
        if groups[-1] and size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(spec)
        room -= size
    if len(groups) == 1:
        return Layout((_shard("model.safetensors", groups[0]),), None)
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    total = sum(nbytes_of(dtype, shape) for _, dtype, shape in tensors)
    where = {spec[0]: name for name, group in zip(names, groups, strict=True) for spec in group}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
    return Layout(tuple(_shard(n, g) for n, g in zip(names, groups, strict=True)), index)


def _shard(file: str, tensors: Sequence[Spec]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin, offsets = 0, {}
    # Wide types first, as the library does: every tensor then lies at a multiple of its element size.
    for name, dtype, shape in sorted(tensors, key=lambda t: (-TYPES[type_of(t[1])][1], t[0])):
        size = nbytes_of(dtype, shape)
        header[name] = {"dtype": type_of(dtype), "shape": list(shape), "data_offsets": [begin, begin + size]}
        offsets[name] = begin
        begin += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return Shard(
        file, len(text).to_bytes(8, "little") + text, {n: start + o for n, o in offsets.items()}, start + begin
    )


class FolderWriter:
    """Writes the tensors of a `Layout` into a folder in any order, each once, holding none of them."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._files: dict[str, int] = {}
        self._where: dict[str, tuple[str, int]] = {}
        for shard in layout.shards:
            fd = os.open(path / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._files[shard.file] = fd
            put(fd, memoryview(shard.header), 0)
            self._where |= {name: (shard.file, offset) for name, offset in shard.offsets.items()}
        if layout.index:
            (path / INDEX).write_text(layout.index, encoding="utf-8")

    def write(self, name: str, tensor: Any) -> None:
        """Write one tensor, or the bytes of one; its type and shape are those of the layout."""
        file, offset = self._where.pop(name)
        put(self._files[file], raw_bytes(tensor), offset)

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        for fd in self._files.values():
            os.close(fd)
        if kind is None and self._where:
            raise RuntimeError(f"tensors were planned and never written: {', '.join(sorted(self._where)[:5])}")
