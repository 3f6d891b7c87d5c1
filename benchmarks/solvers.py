"""GPTQ and AWQ of ours and of GPTQModel, side by side: time of the whole command, perplexity and KL by one scorer.

    python benchmarks/solvers.py SmolLM2.gguf cal.txt test.txt --peer gptqmodel/bin/python --only gptq-4bit-64g
    python benchmarks/solvers.py SmolLM2.gguf cal.txt test.txt --ladder

The peer gets the same token rows and our fp16 folder; it is given its own environment and GPTQMODEL_CPU_WORKERS=2.
`--ladder` times five targets from one `convert` against the GPTQ target alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measured import run

from quantkit import calibration_batch, load_text, open_model

QUANTKIT = [sys.executable, "-m", "quantkit"]
TARGETS = {  # of ours, and what the peer is told for the like of it
    "gptq-4bit-64g": (),
    "gptq-4bit-64g-asym": ("--asym",),
    "gptq-3bit-64g": ("--bits", "3"),
    "awq-4bit-64g": ("--method", "awq", "--asym"),
}
LADDER = ("fp16", "gptq-4bit-64g", "awq-4bit-64g", "Q4_K_M", "Q5_K_M")
SHAPE = ("--samples", "32", "--seqlen", "512")


def scored(folder: Path, args: argparse.Namespace) -> str:
    """Perplexity, its error and the mean KL to the source, as cells of a table."""
    command = [*QUANTKIT, "perplexity", folder, "--text", args.text, "--chunks", "20", "--reference", args.source]
    done = subprocess.run([*map(str, command), "--json"], check=True, capture_output=True, text=True)
    score = json.loads(done.stdout)
    return f"{score['perplexity']:.3f} ± {score['stderr']:.3f} | {score['kl_divergence']['mean']:.4f}"


def converted(args: argparse.Namespace, out: Path, targets: tuple[str, ...]) -> float:
    """Wall seconds of one conversion without scores."""
    named = [f"--to={t}" for t in targets]
    return run(
        [*QUANTKIT, "convert", args.source, "-o", out, *named, *SHAPE, "--no-eval", "--calibration", args.calibration]
    ).wall


def against_peer(args: argparse.Namespace, scratch: Path, target: str) -> None:
    """One row for ours, and one for the peer's where it is there."""
    scratch.mkdir()
    seconds = converted(args, scratch / "ours", (target,))
    print(f"| {target} | quantkit | {seconds:.0f} | {scored(scratch / 'ours' / target, args)} |", flush=True)
    if not args.peer:
        return
    converted_fp16 = [*QUANTKIT, "convert", args.source, "-o", scratch / "plain", "--to", "fp16", "--no-eval"]
    run(converted_fp16)
    model = open_model(args.source)
    rows = calibration_batch(load_text(args.calibration), model.tokenizer(), int(SHAPE[1]), int(SHAPE[3]), 0)
    (scratch / "rows.json").write_text(json.dumps(rows.tolist()))
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    script = Path(__file__).parent / "peers" / "quantize_gptqmodel.py"
    command = [args.peer, script, scratch / "plain" / "fp16", scratch / "theirs", "--rows", scratch / "rows.json"]
    peer = run([*command, *TARGETS[target]]).wall
    print(f"| {target} | GPTQModel | {peer:.0f} | {scored(scratch / 'theirs', args)} |", flush=True)
    print(f"time: ours over theirs {seconds / peer:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--peer", help="the Python of an environment that has GPTQModel")
    parser.add_argument("--only", choices=TARGETS, help="one row, and not all of them")
    parser.add_argument("--ladder", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.ladder:
            alone = converted(args, Path(folder) / "alone", LADDER[1:2])
            all_five = converted(args, Path(folder) / "all", LADDER)
            print(f"gptq alone {alone:.0f} s, five targets {all_five:.0f} s, ratio {all_five / alone:.2f}")
            return
        print("| target | by | seconds | perplexity | mean KL |\n|---|---|---|---|---|")
        for target in [args.only] if args.only else TARGETS:
            against_peer(args, Path(folder) / target, target)


if __name__ == "__main__":
    main()
