"""Causal attention on a CPU in steps of queries (`quantkit/attention.py`) against torch's kernel asked once, in turns.

    python benchmarks/attention.py --threads 1

A table of ratios: under 1, the steps take less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measured import spread
from torch.nn.functional import scaled_dot_product_attention

from quantkit.attention import causal_in_steps

SHAPES = {  # query heads, key heads, their width
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2.5-0.5B": (14, 2, 64),
    "Gemma-3-270m": (4, 1, 256),
}
SEQUENCES, LENGTHS, RUNS = 4, (128, 256, 512), 9


def seconds(work: Callable[[], object]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(heads: int, of_keys: int, width: int, length: int, dtype: torch.dtype) -> list[float]:
    """The time in steps over that at once, of each pair of runs."""
    query, key, value = (torch.randn(SEQUENCES, n, length, width).to(dtype) for n in (heads, of_keys, of_keys))
    module = torch.nn.Module()

    def in_steps() -> object:
        return causal_in_steps(module, query, key, value, None)

    def at_once() -> object:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return [seconds(in_steps) / seconds(at_once) for _ in range(RUNS + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print("| heads of | tokens | float32 | bf16 |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        for length in LENGTHS:
            cells = [spread(ratios(*shape, length, dtype)) for dtype in (torch.float32, torch.bfloat16)]
            print(f"| {name} | {length} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
