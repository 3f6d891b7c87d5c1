"""A loop of many small operations as one launch on a CUDA device: recorded once, then replayed on other numbers.

A column of GPTQ is a handful of operations that take a GPU less time than launching them does. As a CUDA graph the
columns of a group are one launch. Everywhere else the loop is simply run.
"""

from __future__ import annotations

from collections.abc import Callable

from quantkit.later import Tensor, torch

Work = Callable[..., tuple[Tensor, ...]]


def replayed(work: Work, *examples: Tensor) -> Work:
    """`work` for tensors of the shapes of `examples`; where those are on a CUDA device, recorded as a graph.

    It must not wait for the device, and return new tensors: they are valid until the next call.
    """
    return _recorded(work, *examples) if examples[0].is_cuda else work


def _recorded(work: Work, *examples: Tensor) -> Work:
    own = [e.clone() for e in examples]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is recorded must have run before: libraries set themselves up then
        work(*[e.clone() for e in own])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads read and hash meanwhile
        made = work(*own)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        for mine, new in zip(own, given, strict=True):
            mine.copy_(new)
        graph.replay()
        return made

    return replay
