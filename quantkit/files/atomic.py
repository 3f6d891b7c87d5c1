"""Outputs that appear whole or not at all: work goes to a hidden sibling, which takes the final name when complete.

The sibling lies in the same folder, so the last step is a rename within one filesystem. Whatever ends the work - an
error, a full disk, Ctrl-C - removes it; a kill that runs no code leaves it, hidden, and never under the final name,
until the next run in that folder (`sweep`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.errors import Resumable, UsageError

# What the system says when there is no more room: on the disk, in the user's quota, under the file-size limit.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SYNCED_AT_ONCE = 64 << 20  # bytes, at least: a disk takes few large pieces sooner than many small ones


@contextmanager
def staged(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder at; on success it is synced and becomes `path`.

    A file replaces a file in one step. Where a folder is on either side, what is there gives way only with
    `replace=True`, and is kept until the new is complete. Raises UsageError where `path` is taken, is a device or has
    no parent, Resumable where the disk is full; any other exception passes through. In all these cases what was written
    is gone and what was there stands.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise UsageError("there is no such folder to write in", where=path.parent, hint="make it first")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError("not a regular file", where=path, hint="choose another name")
    if path.is_dir() and not replace:
        raise _taken(path)
    partial = _hidden(path, "partial")
    try:
        with disk_errors(path):
            yield partial
            _sync(partial)
            _publish(partial, path, replace)
            _sync_one(path.parent)
    except BaseException:
        _remove(partial)
        raise


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the system's "no more room" into Resumable, with the bytes that are free where `path` is to be."""
    try:
        yield
    except OSError as e:
        if e.errno not in NO_ROOM:
            raise
        raise Resumable(
            f"no more room to write ({os.strerror(e.errno)}; {free_bytes(path):,} bytes are free)",
            where=path,
            hint="free some space and run the same command again",
        ) from e


def require_space(path: str | os.PathLike[str], nbytes: int) -> None:
    """Raise Resumable where the filesystem that is to hold `path` has fewer than `nbytes` bytes free."""
    free = free_bytes(path)
    if free < nbytes:
        what = f"{nbytes:,} bytes are needed and {free:,} are free"
        raise Resumable(what, where=path, hint=f"free {nbytes - free:,} bytes and run the same command again")


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes this user may still write on the filesystem of `path`, which need not exist yet."""
    path = Path(os.path.abspath(path))
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def _taken(path: Path) -> UsageError:
    return UsageError("it exists already", where=path, hint="choose another name, or ask to replace it")


def _hidden(path: Path, why: str) -> Path:
    """A name that no other run takes: process ids repeat across containers that share a disk, so a token is added."""
    return path.with_name(f".{path.name}.{why}-{_host()}-{os.getpid()}-{secrets.token_hex(3)}")


def _host() -> str:
    """Where a process id means something: a machine, and on Linux its containers each by themselves."""
    namespace = Path("/proc/self/ns/pid")
    place = socket.gethostname() + (os.readlink(namespace) if namespace.is_symlink() else "")
    return hashlib.sha256(place.encode()).hexdigest()[:6]


def abandoned(path: Path) -> bool:
    """Whether a path is what a run on this machine was writing when it was killed."""
    made = re.fullmatch(r"\..+\.partial-([0-9a-f]{6})-(\d+)-[0-9a-f]{6}", path.name)
    return made is not None and made[1] == _host() and not _alive(int(made[2]))


def sweep(folder: Path) -> None:
    """Remove what killed runs were writing in a folder."""
    for path in filter(abandoned, list(folder.iterdir())):
        _remove(path)


def _alive(process: int) -> bool:
    if os.name == "nt":
        return True  # to ask is to end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _publish(partial: Path, path: Path, replace: bool) -> None:
    """Give what is complete its final name."""
    if not partial.is_dir() and not path.is_dir():
        os.replace(partial, path)
    elif not os.path.lexists(path):
        os.rename(partial, path)
    elif replace:
        _swap(partial, path)
    else:
        raise _taken(path)


def _swap(partial: Path, path: Path) -> None:
    """A folder cannot be replaced in one step: move the old one aside, and back if the new one does not get there."""
    old = _hidden(path, "old")
    try:
        os.rename(path, old)
        os.rename(partial, path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        raise
    _remove(old)


class Syncing:
    """Brings what is written at `path` to the disk while other work goes on, so that little is waited for at the end.

    A system left alone keeps it in memory for half a minute, or until a tenth of that is full. What goes wrong is
    raised at the next call of `wrote`, or when the context is left, as `disk_errors` has it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._thread = path, ThreadPoolExecutor(1)
        self._since = 0
        self._last: Future[Any] = self._thread.submit(int)  # begins with nothing

    def wrote(self, nbytes: int) -> None:
        """Note that so many bytes more were written; once they are many, they are brought to the disk."""
        self._since += nbytes
        if self._since >= SYNCED_AT_ONCE and self._last.done():
            self._settle()
            self.start()

    def start(self) -> None:
        """Bring all that is written by now to the disk."""
        self._since, self._last = 0, self._thread.submit(self._after, self._last)

    def _after(self, before: Future[Any]) -> None:
        before.result()
        _sync(self._path)

    def _settle(self) -> None:
        with disk_errors(self._path):
            self._last.result()

    def __enter__(self) -> Syncing:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self._settle()


def _sync(path: Path) -> None:
    """Bring a file, or a folder and all that is in it, to the disk."""
    if path.is_dir():
        for folder, _, files in os.walk(path):
            for name in files:
                _sync_one(os.path.join(folder, name))
            _sync_one(folder)
    else:
        _sync_one(path)


def _sync_one(path: str | os.PathLike[str]) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows has no handle to sync for a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
