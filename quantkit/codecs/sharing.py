"""Work on a matrix shared out to threads, a slab of rows at a time.

A slab is small enough that its temporaries stay in a processor's caches, where a chain of steps over it takes a third
of the time that whole tensors take, and nothing of the tensor's own size is ever made. The steps are torch's, numpy's
and ggml's, which all drop the interpreter's lock. On another device one thread gives the orders, and slabs are as large
as it needs.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from threading import Barrier, get_native_id, local
from typing import Any, TypeVar, cast

from quantkit.later import Device, Tensor, on_cpu, torch, torch_is_there

P = TypeVar("P")
T = TypeVar("T")
Rows = Callable[[slice], Tensor]  # rows of a matrix (rows, width), read or computed when they are asked for
Share = Callable[[Callable[[slice], Any], int], list[Any]]  # what work makes of so many things, part by part

SLAB = 1 << 20  # weights: with fewer, threads wait for the interpreter's lock, or to be woken, between short steps
SLAB_ELSEWHERE = 1 << 24
LEAST = 1 << 18  # weights that are worth a second thread
PARTS = 2  # of what `in_two` shares out
NICE = 10  # how far threads that come last step back: but not behind other programs


def thread_count() -> int:
    """How many threads share the work: torch's count where it is loaded, else OpenMP's, else the cores there are."""
    if torch_is_there():
        return torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slabs(rows: int, width: int, device: Device = "cpu", first: int = 0) -> list[slice]:
    """Slices of whole rows that make up `rows` rows from `first` on; on the CPU as many for each thread, or one."""
    most, least, threads = (SLAB, LEAST, thread_count()) if on_cpu(device) else (SLAB_ELSEWHERE, SLAB_ELSEWHERE, 1)
    count = max(1, -(-rows * width // most))
    if rows * width > least:
        count = -(-count // threads) * threads
    step, end = max(1, -(-rows // count)), first + rows
    return [slice(at, min(end, at + step)) for at in range(first, end, step)]


def one_each(rows: int, device: Device = "cpu", least: int = 1, most: int | None = None) -> list[slice]:
    """`rows` rows cut once for each thread, into parts of `least` rows or more: for work of many small steps.

    Into more parts where they would have over `most` rows.
    """
    threads = thread_count() if on_cpu(device) else 1
    step = min(-(-rows // max(1, min(threads, rows // least))), most or rows)
    return [slice(at, min(rows, at + step)) for at in range(0, rows, step)]


def share_out(work: Callable[[P], T], parts: Sequence[P], device: Device = "cpu") -> list[T]:
    """What `work` returns for each of `parts`, in order; on the CPU by as many threads as torch uses.

    Work that shares out in its turn does its parts itself: waiting for its own pool, it would wait for ever.
    """
    threads = thread_count()
    if threads < 2 or len(parts) < 2 or not on_cpu(device) or hasattr(_here, "shared"):
        return [work(part) for part in parts]
    return list(_pool(threads, torch_is_there()).map(work, parts))


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for many small operations of torch's: waking a second one costs more than it does."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def all_at_once(work: Callable[[slice], T], count: int) -> list[T]:
    """What `work` returns for `count` things at once."""
    return [work(slice(0, count))]


def in_two(last: bool = False) -> Share:
    """A way to share `count` things out to two threads, which have torch's cores between them.

    No more than two, for each has its temporaries in memory. `last`: they take what time others leave of the cores.
    With fewer cores the parts are the same, so that sums over them are.
    """
    cores = thread_count() // PARTS
    parted = _pool(PARTS, True, cores, last).map if cores else map

    def share(work: Callable[[slice], Any], count: int) -> list[Any]:
        step = -(-count // PARTS)
        return list(parted(work, [slice(at, min(count, at + step)) for at in range(0, count, step)]))

    return share


def ahead(steps: Iterator[T], one_core: bool = False) -> Iterator[T]:
    """The same steps, each made by another thread while the one before it is at work."""
    end = object()
    with nullcontext(_pool(1, with_torch=True, last=True)) if one_core else ThreadPoolExecutor(1) as thread:
        due = thread.submit(next, steps, end)
        while (step := due.result()) is not end:
            due = thread.submit(next, steps, end)
            yield cast(T, step)


_here = local()  # has `shared` in the threads of a pool


@functools.cache
def _pool(threads: int, with_torch: bool, cores: int = 1, last: bool = False) -> ThreadPoolExecutor:
    """Threads in which torch uses `cores` each: as they are, every one would bring a team of its own to every step.

    `last`: they come after all other threads, where threads have a priority of their own.
    """
    started, count = Barrier(threads + 1), torch.get_num_threads() if with_torch else 0

    def alone() -> None:
        _here.shared = True
        if with_torch:
            torch.get_num_threads()  # a thread's first question sets it to the default
            torch.set_num_threads(cores)  # of this thread, and what later ones begin with: the caller puts that right
        if last and sys.platform == "linux":
            with suppress(OSError):  # a sandbox may refuse it: then all threads are alike
                os.setpriority(os.PRIO_PROCESS, get_native_id(), NICE)
        started.wait()

    pool = ThreadPoolExecutor(threads, initializer=alone)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    if with_torch:
        torch.set_num_threads(count)
    return pool
