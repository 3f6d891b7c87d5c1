"""Peak memory of scoring, beside one block and the output head: `perplexity_memory.py MODEL.gguf...`, of rising size.

    python benchmarks/synthetic.py 1b bench/Synthetic-1b.Q8_0.gguf
    python benchmarks/perplexity_memory.py bench/Synthetic-*.gguf

With --reference each model is also scored against itself, which takes a second head.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from math import prod
from pathlib import Path

from measured import run

from quantkit.model import open_model

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--reference", action="store_true")
    o = parser.parse_args()
    for path in o.models:
        model = open_model(path)
        block = 4 * sum(prod(r.shape) for r in model.block(0).values())
        head = 4 * model.config["vocab_size"] * model.config["hidden_size"]
        command = [sys.executable, "-m", "quantkit", "perplexity", path, "--chunks", o.chunks, "--device", "cpu"]
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            cost = run([*command, "--reference", path] if o.reference else command)
        parts = f"block {block / MIB:.0f}, head {head / MIB:.0f}, peak {cost.peak / MIB:.0f} MiB"
        print(f"{path.name}: {parts}: {(cost.peak - block - head) / MIB:.0f} MiB over both; {cost.wall:.0f} s")


if __name__ == "__main__":
    main()
