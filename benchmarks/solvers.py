"""GPTQ and AWQ of ours and of others, side by side: wall and CPU seconds of the whole command, one scorer for all.

    python benchmarks/solvers.py SmolLM2.gguf cal.txt test.txt --gptqmodel gptqmodel/bin/python --only gptq-4bit-64g
    python benchmarks/solvers.py SmolLM2.gguf cal.txt test.txt --autoround autoround/bin/python --only awq-4bit-64g
    python benchmarks/solvers.py SmolLM2.gguf cal.txt test.txt --ladder

A peer gets the same token rows and our fp16 folder, in an environment of its own; GPTQModel GPTQMODEL_CPU_WORKERS=2.
AutoRound beside GPTQ is in `learned.py`.
`--ladder` times five targets from one `convert` against the GPTQ target alone. With `--keep FOLDER` nothing there is
made again, so that a run may be taken up where it was left; `--no-scores` leaves scoring to such a later run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from measured import Cost, run

from quantkit import calibration_batch, load_text, open_model

QUANTKIT = [sys.executable, "-m", "quantkit"]
TARGETS = {  # of ours, and what a peer is told for the like of it
    "gptq-4bit-64g": {"gptqmodel": ()},
    "gptq-4bit-64g-asym": {"gptqmodel": ("--asym",)},
    "gptq-3bit-64g": {"gptqmodel": ("--bits", "3")},
    "awq-4bit-64g": {
        "gptqmodel": ("--method", "awq", "--asym"),
        "autoround": ("--algorithm", "awq", "--format", "auto_awq"),
    },
}
PEERS = {"gptqmodel": "GPTQModel", "autoround": "AutoRound"}
LADDER = ("fp16", "gptq-4bit-64g", "awq-4bit-64g", "Q4_K_M", "Q5_K_M")
SAMPLES, SEQLEN = 32, 512


def scored(folder: Path, args: argparse.Namespace) -> str:
    """Perplexity, its error and the mean KL to the source, as cells of a table."""
    command = [*QUANTKIT, "perplexity", folder, "--text", args.text, "--chunks", "20", "--reference", args.source]
    done = subprocess.run([*map(str, command), "--json"], check=True, capture_output=True, text=True)
    score = json.loads(done.stdout)
    return f"{score['perplexity']:.3f} ± {score['stderr']:.3f} | {score['kl_divergence']['mean']:.4f}"


def converted(args: argparse.Namespace, out: Path, targets: tuple[str, ...]) -> Cost:
    """What one conversion without scores takes."""
    named = [f"--to={t}" for t in targets]
    shape = ["--samples", args.samples, "--seqlen", SEQLEN]
    command = [*QUANTKIT, "convert", args.source, "-o", out, *named, *shape, "--calibration", args.calibration]
    return once(", ".join(targets), out, lambda: run([*command, "--no-eval"]))


def once(what: str, out: Path, make: Callable[[], Cost]) -> Cost:
    """The cost of making `out`, told as soon as it is known, and noted beside it for the next time."""
    note = out.parent / f"{out.name}.json"
    if not note.exists():
        cost = make()
        note.write_text(json.dumps(asdict(cost)))
    cost = Cost(**json.loads(note.read_text()))
    print(f"{what}: {cost.wall:.0f} s, {cost.cpu:.0f} CPU s, {cost.peak >> 20} MiB", flush=True)
    return cost


def against_peer(args: argparse.Namespace, scratch: Path, target: str) -> None:
    """One row for ours, and one for each peer that is there: all are timed before any is scored."""
    scratch.mkdir(exist_ok=True)
    made = {"quantkit": (converted(args, scratch / "ours", (target,)), scratch / "ours" / target)}
    for peer in (p for p in TARGETS[target] if getattr(args, p)):
        theirs = scratch / peer
        cost = once(PEERS[peer], theirs, lambda peer=peer, theirs=theirs: by_peer(args, theirs, target, peer))
        (config,) = theirs.rglob("config.json")
        made[PEERS[peer]] = cost, config.parent
    for by, (cost, folder) in made.items():
        score = "" if args.no_scores else scored(folder, args)
        print(f"| {target} | {by} | {cost.wall:.0f} | {cost.cpu:.0f} | {score} |", flush=True)


def by_peer(args: argparse.Namespace, theirs: Path, target: str, peer: str) -> Cost:
    """What a peer's whole command takes, on the same token rows and our fp16 folder."""
    plain, rows = theirs.parent / "plain", theirs.parent / "rows.json"
    run([*QUANTKIT, "convert", args.source, "-o", plain, "--to", "fp16", "--no-eval", "--force"])
    tokenizer = open_model(args.source).tokenizer()
    ids = calibration_batch(load_text(args.calibration), tokenizer, args.samples, SEQLEN, 0)
    rows.write_text(json.dumps(ids.tolist()))
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    script = Path(__file__).parent / "peers" / f"quantize_{peer}.py"
    return run([getattr(args, peer), script, plain / "fp16", theirs, "--rows", rows, *TARGETS[target][peer]])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("text")
    for peer, name in PEERS.items():
        parser.add_argument(f"--{peer}", help=f"the Python of an environment that has {name}")
    parser.add_argument("--only", choices=TARGETS, help="one row, and not all of them")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration rows; GPTQModel's AWQ asks for few")
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--keep", help="a folder for what is made, which is not made again where it is there")
    parser.add_argument("--no-scores", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep) as folder:
        scratch = Path(folder)
        scratch.mkdir(exist_ok=True)
        if args.ladder:
            alone = converted(args, scratch / "alone", LADDER[1:2])
            five = converted(args, scratch / "all", LADDER)
            print(f"five targets over one: {five.wall / alone.wall:.2f}, in CPU seconds {five.cpu / alone.cpu:.2f}")
            return
        print("| target | by | wall s | CPU s | perplexity | mean KL |\n|---|---|---|---|---|---|", flush=True)
        for target in [args.only] if args.only else TARGETS:
            against_peer(args, scratch / target, target)


if __name__ == "__main__":
    main()
