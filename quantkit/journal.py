"""Blocks of an output that takes long to solve, kept until it is complete: a run that was ended goes on behind them.

A block's tensors are kept as they are written, with the hidden states of the output's calibration rows behind the last
one, in the cache folder, under a name that says all they depend on. So what is found there is of the same work, and a
run that goes on makes the bytes that one run makes.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.cache import fingerprint, folder, hash_of, key
from quantkit.errors import QuantkitError, Resumable
from quantkit.files.atomic import staged
from quantkit.later import Device, Tensor, torch
from quantkit.model import Model
from quantkit.targets import Output, Solved


@dataclass(frozen=True)
class Entry:
    """One tensor as it was written: what of `Solved` goes into files and report, and the hash to verify it by."""

    source: str
    parts: dict[str, Tensor]
    loss: float
    log: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Journal:
    """The folder of one output's blocks."""

    path: Path

    def resume(self) -> tuple[int, Tensor] | None:
        """The last block kept and the hidden states (n, T, hidden) behind it; None where not all up to it are whole."""
        state = self._read("state")
        if state is None or any(self._read(str(layer)) is None for layer in range(state["layer"] + 1)):
            return None
        return state["layer"], state["hidden"]

    def block(self, layer: int) -> list[Entry]:
        """The tensors of a block that `resume` told of."""
        kept = self._read(str(layer))
        if kept is None:
            hint = f"remove {self.path} and run the same command again"
            raise Resumable("a block kept from an earlier run is gone", where=self.path / f"{layer}.pt", hint=hint)
        return [Entry(**e) for e in kept["tensors"]]

    def keep(self, layer: int, tensors: Sequence[Solved], digests: Mapping[str, str], hidden: Tensor) -> None:
        """Add a block. A disk that is full or read-only costs the time of a later run, and not this one."""
        entries = [Entry(s.source, _tensors(s.parts), s.loss, s.log, digests[s.source]) for s in tensors]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(str(layer), {"tensors": [vars(e) for e in entries]})
            self._write("state", {"layer": layer, "hidden": hidden})
        except (OSError, QuantkitError):
            return

    def clear(self) -> None:
        """Forget it all."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        """What was kept under a name; None where it is not there or damaged: then it is made again."""
        try:
            return torch.load(self.path / f"{name}.pt", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError):
            return None

    def _write(self, name: str, what: dict[str, Any]) -> None:
        with staged(self.path / f"{name}.pt", replace=True) as partial:
            torch.save(what, partial)


def journal(output: Output, model: Model, calibration: Tensor, device: Device) -> Journal:
    """The journal of this output, made of this model and these calibration rows by this version on such a device."""
    plan = [output.target, output.note, [asdict(row) for row in output.rows]]
    versions = [version("gguf-quantkit"), version("torch"), str(device)]
    name = key(versions, fingerprint(model), dict(model.facts), plan, hash_of(calibration))
    return Journal(folder() / "unfinished" / name)


def _tensors(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: p.cpu() if isinstance(p, torch.Tensor) else torch.from_numpy(np.array(p)) for n, p in parts.items()}
