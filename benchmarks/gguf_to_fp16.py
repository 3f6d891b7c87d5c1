"""GGUF -> fp16 folder against copying the output's bytes, and against transformers' own loader; peak memory by size.

    python benchmarks/synthetic.py 300m bench/Synthetic-300m.Q8_0.gguf
    python benchmarks/synthetic.py 1b bench/Synthetic-1b.Q8_0.gguf
    python benchmarks/gguf_to_fp16.py bench/Synthetic-300m.Q8_0.gguf bench/Synthetic-1b.Q8_0.gguf --runs 3

The fair copy is brought to the disk (fsync), as our outputs are; one that is left in memory is stated beside it.
transformers (which needs `pip install accelerate` for it) loads the whole model and saves it again, and syncs nothing;
ours also reads back what it wrote, hashes the source and states every tensor's error. Runs take turns.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from math import prod
from pathlib import Path

from measured import Cost, run, spread

from quantkit.files.gguf import read_gguf

COPY = """
import os, shutil, sys
os.mkdir(sys.argv[2])
for name in os.listdir(sys.argv[1]):
    copy = os.path.join(sys.argv[2], name)
    shutil.copyfile(os.path.join(sys.argv[1], name), copy)
    if sys.argv[3] == "synced":
        with open(copy, "rb") as f:
            os.fsync(f.fileno())
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, name, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float16)
model.hf_quantizer = None  # it refuses to be saved otherwise
model.save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--no-copies", action="store_true", help="where the disk has no room for two outputs")
    options = parser.parse_args()
    print(
        "| source | wall s | over a synced copy | over a plain copy | transformers over ours | peak | bound | theirs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for source in options.sources:
        with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
            print("| " + " | ".join(measured(source, Path(scratch), options)) + " |", flush=True)


def measured(source: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    ours: list[Cost] = []
    copies: dict[str, list[Cost]] = {"synced": [], "plain": []}
    theirs: list[Cost] = []
    for _ in range(options.runs):
        for name in ("ours", "theirs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        convert = [sys.executable, "-m", "quantkit", "convert", source, "-o", folder / "ours", "--to", "fp16"]
        ours.append(run([*convert, "--no-eval", "--device", "cpu"], options.threads))
        for how in () if options.no_copies else copies:
            copies[how].append(run([sys.executable, "-S", "-c", COPY, folder / "ours" / "fp16", folder / "copy", how]))
            shutil.rmtree(folder / "copy")
        if not options.no_transformers:
            load = [sys.executable, "-c", TRANSFORMERS, source.parent, source.name, folder / "theirs"]
            theirs.append(run(load, options.threads))
    largest = 4 * max(prod(t.shape) for t in read_gguf(source).tensors.values())
    return [
        source.name,
        spread([c.wall for c in ours]),
        *(over(ours, made) for made in copies.values()),
        over(theirs, ours),
        f"{max(c.peak for c in ours) / 2**20:.0f} MiB",
        f"{(2**30 + 2 * largest) / 2**20:.0f} MiB",
        f"{max(c.peak for c in theirs) / 2**20:.0f} MiB" if theirs else "",
    ]


def over(a: list[Cost], b: list[Cost]) -> str:
    """Wall times of neighbouring runs, one over the other; nothing where one was not run."""
    return spread([x.wall / y.wall for x, y in zip(a, b, strict=True)]) if a and b else ""


if __name__ == "__main__":
    main()
