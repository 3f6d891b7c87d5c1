"""What a CUDA device does with the heavy parts, as a page of Markdown: `make gpu` writes it to docs/gpu.md.

Two measurements: encoders against libggml on this machine's processor (medians of several runs, with their spread), and
one block of the 70B shape through `convert` to GPTQ, with all of the device's memory and within 24 GiB (one run each).
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from synthetic import Size, write

from quantkit import Recipe, convert, device_of, make_plan, open_model, prefix, walk
from quantkit.codecs import encode
from quantkit.errors import UsageError
from quantkit.events import Progress
from quantkit.forward import limit_device
from quantkit.recipe import target_bytes
from quantkit.targets import grids

TYPES = ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
LLAMA_70B_WEIGHTS = 68.977e9
LLAMA_70B = Size(layers=1, hidden=8192, ffn=28672, heads=64, kv_heads=8)  # Llama-2-70B and miqu, one block of 80


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


@dataclass
class Clock:
    """Seconds spent in functions, by what they do; where one calls another, the outer one's count without it."""

    device: torch.device
    spent: dict[str, float] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    since: float = 0.0

    def turn(self) -> None:
        """Count the time since the last turn for what runs now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.inside:
            self.spent[self.inside[-1]] = self.spent.get(self.inside[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def watching(self, owner: Any, name: str, what: str) -> Iterator[None]:
        """Count what `owner.name` takes as `what`."""
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            self.turn()
            self.inside.append(what)
            try:
                return function(*args, **options)
            finally:
                self.turn()
                self.inside.pop()

        with mock.patch.object(owner, name, timed):
            yield


PARTS = (  # where a block's time goes: what is watched, and what it is called
    (walk, "_statistics", "the source's forward pass"),
    (prefix.Inputs, "_measured", "forward passes behind the prefix, and statistics"),
    (prefix.Inputs, "advance", "the output's forward pass"),
    (grids, "gptq", "solving"),
)


def one_block(size: Size, rows: int, seqlen: int, device: torch.device, vram: str | None) -> list[str]:
    """`quantkit convert` to GPTQ 4-bit, group 128, of a model with one block: where the block's time goes, and VRAM."""
    with tempfile.TemporaryDirectory() as scratch:
        model = open_model(write(Path(scratch, "block.gguf"), size))
        recipe = Recipe(to=("gptq-4bit-128g",), samples=rows, seqlen=seqlen, eval_text=None, vram=vram)
        try:
            plan = make_plan(model, recipe, device)
        except UsageError as e:
            return [f"Not run: {e}."]
        if vram:
            limit_device(device, target_bytes(vram))
        ids = torch.randint(2, size.vocab, (rows, seqlen), generator=torch.Generator().manual_seed(0))
        clock, ends = Clock(device), []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with ExitStack() as stack:
            for owner, name, what in PARTS:
                stack.enter_context(clock.watching(owner, name, what))
            for event in convert(model, plan, Path(scratch, "out"), device, ids, None, None):
                if isinstance(event, Progress) and event.stage == "calibrating and solving":
                    clock.turn()
                    ends.append(time.perf_counter())
    block = ends[-1] - ends[-2]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    shares = [f"| {what} | {s:.2f} | {s / block:.0%} |" for what, s in clock.spent.items()]
    left = block - sum(clock.spent.values())
    return [
        f"{rows} x {seqlen} tokens, {plan.batch_tokens} at once, {vram or 'all'} of the device's memory:",
        "",
        "| part | s | share |",
        "|---|---|---|",
        *shares,
        f"| the rest: reading, packing, waiting for the writer | {left:.2f} | {left / block:.0%} |",
        "",
        f"One block {block:.1f} s, 80 blocks {80 * block / 60:.0f} minutes. Peak device memory {peak:.1f} GiB,",
        f"planned {plan.peak_vram / 2**30:.1f} GiB.",
    ]


def main() -> None:
    """Print the page; exit 1 where there is no device."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device on this machine")
    name = torch.cuda.get_device_name()
    print(f"# On a GPU\n\n`make gpu` on {name}, {platform.machine()}, torch {torch.__version__}.\n")
    print("## Encoders, with importance weights, on 4,096 random rows of 8,192\n")
    print("\n".join(encoders()))
    for vram in (None, "24GiB"):
        print(f"\n## One block of the 70B shape, {vram or 'all'} of the memory\n")
        print("\n".join(one_block(LLAMA_70B, 128, 2048, device_of("cuda"), vram)))


if __name__ == "__main__":
    main()
