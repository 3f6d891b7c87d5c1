"""Perplexity of one model by three programs, runs taking turns: quantkit, `llama-perplexity`, transformers' plain loop.

    quantkit convert SmolLM2-135M-Instruct.Q4_1.gguf -o f16 --to F16 --to fp16 --no-eval
    python benchmarks/perplexity.py f16/SmolLM2-135M-Instruct-F16.gguf f16/fp16 TEXT --peer build/bin/llama-perplexity

All use the same threads and the same chunks, in float32 (llama.cpp: F16 weights). Each run is a process of its own and
pays for starting, tokenizing the text and reading the weights; quantkit's cache is empty at every run.
How the peer is built: gguf_quantize.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from measured import Cost, run, spread

LOOP = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, chunks = sys.argv[1], open(sys.argv[2], encoding="utf-8").read(), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
losses = []
with torch.no_grad():
    for i in range(chunks):
        row = ids[i * 512 : (i + 1) * 512]
        logits = model(row[None]).logits[0, 256:511]
        losses.append(torch.nn.functional.cross_entropy(logits, row[257:], reduction="none"))
print(torch.cat(losses).mean().exp().item())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path, help="the same weights as an HF folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    o = parser.parse_args()
    common = [o.text, "--chunks", o.chunks]
    commands = {
        "quantkit": [sys.executable, "-m", "quantkit", "perplexity", o.gguf, "--text", *common, "--device", "cpu"],
        "llama-perplexity": [o.peer, "-m", o.gguf, "-f", *common, "-t", o.threads],
        "transformers": [sys.executable, "-c", LOOP, o.folder, o.text, o.chunks],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(o.runs):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as cache:
                os.environ["XDG_CACHE_HOME"] = cache
                costs[name].append(run(command, o.threads))
    ours = costs["quantkit"]
    for name, theirs in costs.items():
        ratio = spread([a.wall / b.wall for a, b in zip(ours, theirs, strict=True)])
        wall, cpu = spread([c.wall for c in theirs]), spread([c.cpu for c in theirs])
        peak = max(c.peak for c in theirs) >> 20
        print(f"{name}: wall {wall} s, CPU {cpu} s, peak {peak} MiB; quantkit takes {ratio} of its wall time")


if __name__ == "__main__":
    main()
