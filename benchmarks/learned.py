"""`--solver learned` and AutoRound at equal iterations: the same rows of tokens, whole commands, one scorer for both.

    python benchmarks/learned.py SmolLM2.gguf cal.txt test.txt --peer peer/bin/python --bits 2 --keep bench/learned

AutoRound gets our fp16 folder and the same token rows in an environment of its own; docs/verification.md says how it is
made. With `--keep FOLDER` nothing there is made again, so that a run may be taken up where it was left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measured import run
from solvers import QUANTKIT, SAMPLES, SEQLEN, once, scored

from quantkit import calibration_batch, load_text, open_model
from quantkit.solvers.learned import ITERATIONS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--peer", help="the Python of an environment that has AutoRound")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--keep", type=Path, required=True, help="a folder for what is made")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    plain, rows = args.keep / "plain", args.keep / "rows.json"
    if not plain.exists():
        run([*QUANTKIT, "convert", args.source, "-o", plain, "--to", "fp16", "--no-eval"])
    tokenizer = open_model(args.source).tokenizer()
    ids = calibration_batch(load_text(args.calibration), tokenizer, SAMPLES, SEQLEN, 0)
    rows.write_text(json.dumps(ids.tolist()))
    print("| target | by | wall s | CPU s | perplexity | mean KL |\n|---|---|---|---|---|---|", flush=True)
    for bits in args.bits:
        target = f"gptq-{bits}bit-64g"
        ours = args.keep / f"ours-{bits}"
        text = ["--calibration", args.calibration, "--samples", SAMPLES, "--seqlen", SEQLEN]
        how = ["--to", target, "--solver", "learned", *text, "--no-eval"]
        command = [*QUANTKIT, "convert", args.source, "-o", ours, *how]
        cost = once("learned", ours, lambda command=command: run(command))
        made = {"quantkit": (cost, ours / target)}
        if args.peer:
            theirs = args.keep / f"theirs-{bits}"
            script = Path(__file__).parent / "peers" / "quantize_autoround.py"
            command = [args.peer, script, plain / "fp16", theirs, "--rows", rows, "--bits", bits, "--iters", ITERATIONS]
            cost = once("AutoRound", theirs, lambda command=command: run(command))
            (config,) = theirs.rglob("config.json")
            made["AutoRound"] = cost, config.parent
        for by, (cost, folder) in made.items():
            print(f"| {target} | {by} | {cost.wall:.0f} | {cost.cpu:.0f} | {scored(folder, args)} |", flush=True)


if __name__ == "__main__":
    main()
