"""Opens a GGUF - one file or a split set - as one frozen record: metadata, tensor table, and bytes on demand.

Nothing of the weights is read here. `GGUF.stored` maps one tensor at a time, and the mapping goes when the tensor does,
so memory is bounded by the tensors in use, never by the model. No file is held open: a file that changed since it was
read is noticed and refused. Only metadata types, keys and block sizes come from gguf-py.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import Keys

from quantkit import codecs
from quantkit.errors import BadInput, FormatError
from quantkit.files.gguf_header import Header, TensorInfo, parse_header
from quantkit.files.gguf_values import AGAIN, Value
from quantkit.files.raw import Bytes, mapped
from quantkit.later import Tensor, torch

__all__ = ["GGUF", "TensorInfo", "Value", "read_gguf"]

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)  # llama_split_path
SPLIT_KEYS = (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = SPLIT_KEYS
SET_AGAIN = "the set is mixed up or damaged: download all of it again"

Stamp = tuple[int, int, int]  # inode, size in bytes, time of the last change in ns


@dataclass(frozen=True)
class GGUF:
    """One model: `paths` are its shards in order, `tensors` are in file order, `metadata` is the first shard's.

    The split.* keys describe the files, not the model, and are left out of `metadata`. A tensor may be a stack of
    others that the file holds one by one: `stacks` says of which.
    """

    paths: tuple[Path, ...]
    version: int
    byteorder: str
    alignment: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    stamps: tuple[Stamp, ...]
    stacks: Mapping[str, tuple[TensorInfo, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all the files together."""
        return sum(size for _, size, _ in self.stamps)

    def get(self, key: str, default: Any = None) -> Any:
        """The plain data of a metadata key, or `default`."""
        value = self.metadata.get(key)
        return default if value is None else value.data

    def stored(self, name: str) -> Bytes:
        """The stored bytes of a tensor, (nbytes,) uint8, as a little-endian file has them.

        A little-endian file is mapped, not copied; writing into the result changes neither the file nor other results.
        Raises KeyError for an unknown name, BadInput where the file changed or went away since.
        """
        if name in self.stacks:
            return np.concatenate([self._mapped(part) for part in self.stacks[name]])
        return self._mapped(self.tensors[name])

    def stored_matrix(self, name: str, index: int) -> Bytes:
        """The stored bytes of one matrix of a stack, as `stored` gives them."""
        if name in self.stacks:
            return self._mapped(self.stacks[name][index])
        info = self.tensors[name]
        return self._mapped(info).reshape(info.shape[0], -1)[index]

    def raw(self, name: str) -> Tensor:
        """`stored` as a tensor."""
        return torch.from_numpy(self.stored(name))

    def _mapped(self, info: TensorInfo) -> Bytes:
        path = self.paths[info.shard]
        try:
            with open(path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamps[info.shard]:
                    raise BadInput("the file changed since it was opened", where=path, hint="run the command again")
                stored = mapped(file.fileno(), info.offset, info.nbytes)
        except OSError as e:
            hint = "leave the file in place while it is in use"
            raise BadInput(f"tensor {info.name} cannot be read: {e.strerror or e}", where=path, hint=hint) from None
        return stored if self.byteorder == "little" else codecs.lookup(info.type).byteswap(stored)


def read_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Open a GGUF file, or a split set by the name of any of its shards.

    Raises BadInput for a path that cannot be opened, FormatError (with the byte offset) for a file that breaks a rule.
    """
    path = Path(path)
    opened = _open_header(path)
    count = _split(opened[0], SPLIT_COUNT, path) if SPLIT_COUNT in opened[0].metadata else 1
    if count <= 1:
        return _assemble([path], [opened])
    paths = _siblings(path, count)
    shards = [opened if sibling == path else _open_header(sibling) for sibling in paths]
    _check_split(paths, [header for header, _ in shards])
    return _assemble(paths, shards)


def stacked(gguf: GGUF, stacks: Mapping[str, Sequence[str]]) -> GGUF:
    """The GGUF with new tensors, each a stack of old ones in their place; FormatError where these are not alike."""
    made: dict[str, tuple[TensorInfo, ...]] = {}
    first: dict[str, str] = {}
    for name, parts in stacks.items():
        infos = tuple(gguf.tensors[part] for part in parts)
        if odd := [i for i in infos if (i.shape, i.type) != (infos[0].shape, infos[0].type)]:
            what = f"the tensor {odd[0].name} is {odd[0].type} {odd[0].shape}, and {parts[0]} is not"
            raise FormatError(what, where=gguf.paths[0], hint="the experts of a layer must be alike")
        made[name], first[parts[0]] = infos, name
    gone = {part for parts in stacks.values() for part in parts}
    tensors = {}
    for old, info in gguf.tensors.items():
        if old in first:
            name, count = first[old], len(made[first[old]])
            tensors[name] = replace(info, name=name, shape=(count, *info.shape), nbytes=count * info.nbytes)
        elif old not in gone:
            tensors[old] = info
    return replace(gguf, tensors=tensors, stacks=made)


def _open_header(path: Path) -> tuple[Header, Stamp]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir():  # a pipe would be waited for
            raise BadInput("not a regular file", where=path, hint="give a .gguf file")
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise FormatError("the file is empty", where=path, offset=0, hint=AGAIN)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return parse_header(view, path), _stamp(status)
    except FileNotFoundError:
        raise BadInput("no such file", where=path, hint="check the path") from None
    except IsADirectoryError:
        raise BadInput("a folder, not a file", where=path, hint="give the .gguf file inside it") from None
    except OSError as e:
        raise BadInput(f"cannot be opened: {e.strerror or e}", where=path, hint="check its permissions") from None


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _split(header: Header, key: str, path: Path) -> int:
    value = header.metadata.get(key)
    if value is None or type(value.data) is not int:  # a bool is an int by inheritance only
        raise FormatError(f"{key} is {'missing' if value is None else 'not an integer'}", where=path, hint=SET_AGAIN)
    return value.data


def _siblings(path: Path, count: int) -> list[Path]:
    """The paths of all `count` shards, by the name of one."""
    match = SHARD_NAME.fullmatch(path.name)
    if not match or int(match["count"]) != count or not 1 <= int(match["no"]) <= count:
        raise FormatError(
            f"this is one of {count:,} shards, but its name does not say so",
            where=path,
            hint=f"name the shards as llama.cpp does, the first {path.stem}-00001-of-{count:05d}.gguf",
        )
    paths = [path.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise FormatError(f"shard {missing[0]}{more} is missing", where=path, hint="download it to the same folder")
    return paths


def _check_split(paths: list[Path], headers: list[Header]) -> None:
    """Every shard must agree on how many they are and which it is; together they hold each tensor once."""
    total = sum(len(header.tensors) for header in headers)
    for key in SPLIT_KEYS:
        for shard, (path, header) in enumerate(zip(paths, headers, strict=True)):
            right = {SPLIT_NO: shard, SPLIT_COUNT: len(paths), SPLIT_TENSORS: total}[key]
            if (stored := _split(header, key, path)) != right:
                raise FormatError(f"{key} is {stored:,}, but the set makes it {right:,}", where=path, hint=SET_AGAIN)
    seen: set[str] = set()
    for path, header in zip(paths, headers, strict=True):
        if header.order != headers[0].order:
            raise FormatError("its byte order is not the first shard's", where=path, hint=SET_AGAIN)
        if twice := sorted(seen & header.tensors.keys()):
            raise FormatError(f"tensor {twice[0]} is in an earlier shard too", where=path, hint=SET_AGAIN)
        seen |= header.tensors.keys()


def _assemble(paths: list[Path], shards: list[tuple[Header, Stamp]]) -> GGUF:
    first, _ = shards[0]
    tensors = [replace(info, shard=i) for i, (header, _) in enumerate(shards) for info in header.tensors.values()]
    return GGUF(
        paths=tuple(paths),
        version=first.version,
        byteorder="little" if first.order == "<" else "big",
        alignment=first.alignment,
        metadata={key: value for key, value in first.metadata.items() if key not in SPLIT_KEYS},
        tensors={info.name: info for info in tensors},
        stamps=tuple(stamp for _, stamp in shards),
    )
