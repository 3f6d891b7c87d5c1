"""GGUF files of the same types and size, against llama.cpp's with an importance matrix: KL, perplexity, time, memory.

    python benchmarks/gguf_quality.py MODEL --calibration calibration.txt --text wiki.test.txt --peers build/bin

MODEL is an F16 or F32 GGUF, or a folder. llama.cpp makes its importance matrix from the first rows of the calibration
text; all files are scored by our scorer against MODEL on the same chunks. `gguf_quantize.py` says how the peers are
built. Prints a table; a file that is already in the scratch folder is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measured import run

OURS = (sys.executable, "-m", "quantkit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True, help="the folder of llama-imatrix and llama-quantize")
    parser.add_argument("--scratch", type=Path, default=Path("bench/quality"))
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--by-size", action="store_true", help="also a file of each one's size, of types chosen for it")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    source = as_gguf(options)
    imatrix = made(
        options.scratch / "imatrix.gguf",
        [options.peers / "llama-imatrix", "-m", source, "-f", options.calibration, "-c", 512, "--no-ppl"],
        ["--chunks", options.samples, "-o"],
    )
    print(
        "| file | made by | bytes | mean KL | perplexity | same top | s | peak MiB |\n|---|---|---|---|---|---|---|---|"
    )
    for kind in options.types:
        theirs = options.scratch / f"llama-{kind}.gguf"
        if not theirs.exists():
            subprocess.run(
                [str(c) for c in (options.peers / "llama-quantize", "--imatrix", imatrix, source, theirs, kind)],
                check=True,
                capture_output=True,
            )
        print(line(kind, "llama.cpp, imatrix", theirs, scored(options, source, theirs), ""), flush=True)
        print(converted(options, source, kind, "quantkit, gptq", ["--to", kind]), flush=True)
        if options.by_size:
            nbytes = f"{theirs.stat().st_size / 1e6:.4f}MB"
            print(
                converted(options, source, "gguf", f"quantkit, gptq, {nbytes}", ["--target-size", nbytes]), flush=True
            )


def as_gguf(options: argparse.Namespace) -> Path:
    """The model as a file that llama.cpp's programs read."""
    if options.model.is_file():
        return options.model
    out = options.scratch / "source"
    if not out.exists():
        run([*OURS, "convert", options.model, "--to", "F16", "--no-calibration", "--no-eval", "-o", out])
    return next(out.glob("*.gguf"))


def made(path: Path, *command: list[object]) -> Path:
    """`path`, by a command that takes it as its last argument, unless it is there."""
    if not path.exists():
        subprocess.run([str(c) for part in command for c in part] + [str(path)], check=True, capture_output=True)
    return path


def converted(options: argparse.Namespace, source: Path, kind: str, by: str, target: list[object]) -> str:
    """Make and score one file of ours; the line of the table."""
    out = options.scratch / f"ours-{'-'.join(map(str, target)).strip('-')}"
    text = ["--calibration", options.calibration, "--samples", options.samples, "--no-eval"]
    cost = run([*OURS, "convert", source, *target, "--solver", "gptq", *text, "--force", "-o", out])
    (path,) = (p for p in out.glob("*.gguf") if p.name != "imatrix.gguf")
    return line(kind, by, path, scored(options, source, path), f"{cost.wall:.0f} | {cost.peak / 2**20:.0f}")


def scored(options: argparse.Namespace, source: Path, path: Path) -> dict[str, object]:
    """What `quantkit perplexity --json` says of a file."""
    command = [*OURS, "perplexity", path, "--reference", source, "--text", options.text, "--chunks", options.chunks]
    said = subprocess.run([*map(str, command), "--json"], check=True, capture_output=True, text=True)
    return json.loads(said.stdout)


def line(kind: str, by: str, path: Path, score: dict[str, object], cost: str) -> str:
    """A row of the table."""
    kl = score["kl_divergence"]
    figures = f"{kl['mean']:.4f} ± {kl['stderr']:.4f} | {score['perplexity']:.2f} ± {score['stderr']:.2f}"
    return f"| {kind} | {by} | {path.stat().st_size:,} | {figures} | {100 * score['same_top']:.1f}% | {cost or ' | '} |"


if __name__ == "__main__":
    main()
