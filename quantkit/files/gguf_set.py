"""A GGUF as a set of shards in a folder of their own: one staged folder appears whole or not at all, as one file does.

Names and keys are `llama-gguf-split`'s (see `gguf_writer.split_layout`), and so a set opens by its first shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.files.gguf_writer import GGUFWriter, Layout


@dataclass(frozen=True)
class SetLayout:
    """The layouts of all shards by file name, in order."""

    files: Mapping[str, Layout]

    @property
    def nbytes(self) -> int:
        """Of all the files together."""
        return sum(layout.nbytes for layout in self.files.values())


class SetWriter:
    """`GGUFWriter` for a set: tensors come in any order and each goes to the shard that was planned for it."""

    def __init__(self, folder: Path, layout: SetLayout) -> None:
        self._writers = [GGUFWriter(folder / name, shard) for name, shard in layout.files.items()]
        self._shard_of = {tensor: writer for writer in self._writers for tensor in writer.layout.sizes}
        self._open = ExitStack()

    def __enter__(self) -> SetWriter:
        with ExitStack() as opening:
            for writer in self._writers:
                opening.enter_context(writer)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, name: str, raw: Any) -> None:
        """Write one tensor's bytes; see `GGUFWriter.write`."""
        self._shard_of[name].write(name, raw)
