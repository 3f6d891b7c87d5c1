"""What a CUDA device does with the heavy parts, as a page of Markdown: `make gpu` writes it to docs/gpu.md.

Two measurements: encoders against libggml on this machine's processor, and statistics and GPTQ for one block of the 70B
shape. Times are medians of several runs, with their spread.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

from quantkit.codecs import encode
from quantkit.codecs.grid import Grid
from quantkit.solvers.gptq import gptq
from quantkit.stats import Stats

TYPES = ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
LLAMA_70B_WEIGHTS = 68.977e9
# (activation width, stacked rows of the matrices that read it): Llama-2-70B and miqu
BLOCK_70B = {"attn_in": (8192, 10240), "heads": (8192, 8192), "mlp_in": (8192, 57344), "mlp_mid": (28672, 8192)}
TOKENS = 128 * 2048


def timed(work: Callable[[], object], runs: int = 3) -> tuple[float, float]:
    """Median seconds and the spread (largest less smallest) of `work`, after one run that does not count."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), max(times[1:]) - min(times[1:])


def encoders() -> list[str]:
    """Weights per second of each encoder, with importance, on the device and through libggml on all cores."""
    rows = ["| type | device Mweights/s | libggml Mweights/s | ratio | 70B on the device |", "|---|---|---|---|---|"]
    weight, importance = torch.randn(4096, 8192), torch.rand(8192)
    on_device, there = weight.cuda(), importance.cuda()
    for name in TYPES:
        gpu, spread = timed(lambda n=name: encode(n, on_device, there))
        cpu, _ = timed(lambda n=name: encode(n, weight[:1024], importance), runs=1)
        fast, slow = weight.numel() / gpu, weight.numel() / 4 / cpu
        whole = LLAMA_70B_WEIGHTS / fast
        speed = f"{fast / 1e6:.0f} (± {spread / gpu:.0%}) | {slow / 1e6:.1f} | {fast / slow:.0f}"
        rows.append(f"| {name} | {speed} | {whole:.0f} s |")
    return rows


def block_of_70b() -> list[str]:
    """Seconds for the statistics and the GPTQ solution of each group of matrices in one block."""
    rows = ["| activation | K | N | statistics s | GPTQ 4-bit g128 s |", "|---|---|---|---|---|"]
    total = 0.0
    torch.cuda.reset_peak_memory_stats()
    for name, (k, n) in BLOCK_70B.items():
        x = torch.randn(4096, k, device="cuda")
        stats = Stats.zeros(k, "cuda").add(x)
        once, _ = timed(lambda x=x, k=k: Stats.zeros(k, "cuda").add(x), runs=2)
        gathering = once * TOKENS / len(x)
        weight = torch.randn(n, k, device="cuda")
        solving, _ = timed(lambda w=weight, s=stats: gptq(w, s, Grid(4, 128)), runs=1)
        rows.append(f"| {name} | {k} | {n} | {gathering:.2f} | {solving:.2f} |")
        total += gathering + solving
        del x, stats, weight
    peak = torch.cuda.max_memory_allocated() / 2**30
    rows += ["", f"One block {total:.1f} s, 80 blocks {80 * total / 60:.0f} minutes (forward passes not counted)."]
    return [*rows, f"Peak device memory {peak:.1f} GiB."]


def main() -> None:
    """Print the page; exit 1 where there is no device."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device on this machine")
    name = torch.cuda.get_device_name()
    print(f"# On a GPU\n\n`make gpu` on {name}, {platform.machine()}, torch {torch.__version__}.\n")
    print("## Encoders, with importance weights, on 4,096 random rows of 8,192\n")
    print("\n".join(encoders()))
    print(f"\n## One block of the 70B shape, statistics of {TOKENS:,} tokens\n")
    print("\n".join(block_of_70b()))


if __name__ == "__main__":
    main()
