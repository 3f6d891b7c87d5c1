"""Bytes on a card while a block of the 70B shape is solved: counted on a stand-in, beside what is planned.

    python benchmarks/block_memory.py

The block has a sixteenth of the widths (hidden 8192, ffn 28672, 64 heads over 8) and of the tokens (128 x 2048), and
what is worked on at a time is cut in proportion. So every part of it takes 1/256 of its bytes, and what is printed is
256 times what was counted. No driver, no library's workspace and no gap of an allocator is in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from card import CARD, MEMORY
from toy import toy_model, write_toy

import quantkit.codecs.sharing
import quantkit.evaluate
import quantkit.plan
import quantkit.sensitivity
import quantkit.solvers.ladder
from quantkit import Recipe, calibration_batch, convert, load_text, make_plan, network, open_model, sized

PARTS = 16
SHAPE = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 64, "num_key_value_heads": 8}
AT_A_TIME = (  # amounts that go with the square of the widths, or with the tokens
    (quantkit.codecs.sharing, "SLAB_ELSEWHERE", PARTS**2),
    (quantkit.solvers.ladder, "SLAB_ELSEWHERE", PARTS**2),
    (quantkit.evaluate, "HEAD_LOGITS", PARTS**2),
    (quantkit.sensitivity, "HEAD_LOGITS", PARTS**2),
    (quantkit.plan, "BATCH_TOKENS", PARTS),
)
WORK: dict[str, dict[str, Any]] = {  # groups of 16 for groups of 128
    "gptq": {"to": ("gptq-4bit-16g",)},
    "gptq, --inputs source": {"to": ("gptq-4bit-16g",), "inputs": "source"},
    "gptq, -desc": {"to": ("gptq-4bit-16g-desc",)},
    "gptq, --solver learned": {"to": ("gptq-4bit-16g",), "solver": "learned"},
    "awq": {"to": ("awq-4bit-32g",)},
    "Q4_K_M": {"to": ("Q4_K_M",)},
    "Q4_K_M, --solver gptq": {"to": ("Q4_K_M",), "solver": "gptq"},
    "Q4_K_M, --solver learned": {"to": ("Q4_K_M",), "solver": "learned"},
    "gptq, awq and Q4_K_M": {"to": ("gptq-4bit-16g", "awq-4bit-32g", "Q4_K_M")},
    "ct, --solver awq+gptq": {"to": ("ct-4bit-16g",), "solver": "awq+gptq"},
}


def counted(work: Callable[[], object]) -> str:
    """The most bytes that live on the card meanwhile, at full size."""
    before = MEMORY.peak = MEMORY.now
    work()
    return gib(MEMORY.peak - before)


def gib(nbytes: int) -> str:
    return f"{nbytes * PARTS**2 / 2**30:.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=WORK)
    only = parser.parse_args().only
    for module, name, parts in AT_A_TIME:
        setattr(module, name, getattr(module, name) // parts)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"num_hidden_layers": 1, "head_dim": SHAPE["hidden_size"] // SHAPE["num_attention_heads"], **SHAPE}
        model = open_model(write_toy(Path(folder) / "block.gguf", toy_model(**shape)))
        rows = calibration_batch(load_text("default"), model.tokenizer(), 128, 2048 // PARTS)
        print("| work | counted | planned |\n|---|---|---|", flush=True)
        for name, options in WORK.items() if only is None else [(only, WORK[only])]:
            recipe = Recipe(samples=len(rows), seqlen=rows.shape[1], eval_text=None, **options)
            plan, out = make_plan(model, recipe, CARD), Path(folder) / name
            most = counted(lambda plan=plan, out=out: list(convert(model, plan, out, CARD, rows, None, None)))
            print(f"| {name} | {most} | {gib(plan.peak_vram)} |", flush=True)
        if only is None:
            recipe = Recipe(to=("gguf",), target_bpw=4.5, calibration="default")
            net = network(model, CARD, batch_tokens=quantkit.plan.BATCH_TOKENS)
            print(f"| --target-bpw 4.5, the choice | {counted(lambda: list(sized(model, recipe, net, rows)))} | |")


if __name__ == "__main__":
    main()
