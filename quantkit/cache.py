"""What is kept between runs: hashes of model files, and tensors under a name that says all they depend on.

The folder is `quantkit` in the user's cache folder ($XDG_CACHE_HOME). It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.files.atomic import staged
from quantkit.later import Tensor
from quantkit.model import Model

LIMIT = 32 << 30  # bytes of kept tensors; beyond it the longest unread give way


def folder() -> Path:
    """The cache folder. It need not be there, and where it cannot be made, things are computed anew."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"


def made(path: Path) -> Path:
    """A path in the cache folder, once the folder that it lies in is there; OSError where it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def fingerprint(model: Model) -> dict[str, str]:
    """SHA-256 of every file that holds weights, by name; read once as long as size and time of change stay."""
    files = model.gguf.paths if model.gguf else sorted(model.path.glob("*.safetensors"))
    return {Path(path).name: file_hash(Path(path)) for path in files}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered under its path, size and time of change."""
    stat = path.stat()
    known = folder() / "hashes" / f"{key(str(path.resolve()), stat.st_size, stat.st_mtime_ns)}.txt"
    with suppress(OSError):
        return known.read_text(encoding="utf-8")
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    with suppress(OSError, QuantkitError), staged(made(known), replace=True) as partial:
        partial.write_text(found, encoding="utf-8")
    return found


def key(*parts: Any) -> str:
    """A name for what depends on `parts`: anything that JSON holds."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def hash_of(tensor: Tensor) -> str:
    """A hash of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()


def load(name: str) -> dict[str, Tensor] | None:
    """The tensors kept under `name`, mapped from the disk; None where there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder() / "scores" / f"{name}.safetensors"
    try:
        tensors = load_file(path)
        os.utime(path)
    except (OSError, SafetensorError):
        return None
    return tensors


def keep(name: str, tensors: dict[str, Tensor]) -> None:
    """Keep `tensors` under `name`. A disk that is full or read-only costs time in the next run, not this one."""
    from safetensors.torch import save_file

    try:
        path = made(folder() / "scores" / f"{name}.safetensors")
        with staged(path, replace=True) as partial:
            save_file({n: t.contiguous() for n, t in tensors.items()}, partial)
        _make_room(path.parent)
    except (OSError, QuantkitError):
        return


def _make_room(where: Path) -> None:
    total = 0
    for path in sorted(where.glob("*.safetensors"), key=lambda p: -p.stat().st_mtime):
        total += path.stat().st_size
        if total > LIMIT:
            path.unlink(missing_ok=True)
