"""Runs a command and says what it took: wall seconds, CPU seconds of all its threads, peak resident bytes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    wall: float
    cpu: float
    peak: int


def run(command: Sequence[object], threads: int | None = None) -> Cost:
    """Run `command` to its end; RuntimeError with its last words where it fails."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as an install has them
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command[0]} ended with {process.returncode}: {said.read()[-2000:].decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
