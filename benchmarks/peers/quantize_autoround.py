"""Quantizes a folder of floats with AutoRound, in its own environment, its defaults; see `learned.py`, `solvers.py`."""

from __future__ import annotations

import argparse
import json

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--rows", help="JSON: token ids, a list for each calibration row")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--iters", type=int)
    parser.add_argument("--algorithm", default="signround")
    parser.add_argument("--format", default="auto_gptq")
    args = parser.parse_args()
    with open(args.rows) as f:
        ids = torch.tensor(json.load(f))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    shape = {"nsamples": len(ids), "seqlen": ids.shape[1]}
    grid = {"bits": args.bits, "group_size": args.group, "sym": args.format != "auto_awq"}
    loader = DataLoader(rows, batch_size=8)
    how = {"dataset": loader, "iters": args.iters, "device_map": "cpu"}
    how["alg_configs"] = args.algorithm
    rounding = AutoRound(model, AutoTokenizer.from_pretrained(args.folder), **grid, **shape, **how)
    rounding.quantize_and_save(args.out, format=args.format)


if __name__ == "__main__":
    main()
