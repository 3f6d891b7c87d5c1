"""Quantizes a folder of floats with GPTQModel, in its own environment and with its defaults; see `solvers.py`."""

from __future__ import annotations

import argparse
import json

from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--rows", help="JSON: token ids, a list for each calibration row")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--method", default="gptq")
    args = parser.parse_args()
    with open(args.rows) as f:
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(f)]
    how = {"method": "awq", "format": "gemm"} if args.method == "awq" else {}
    config = QuantizeConfig(bits=args.bits, group_size=args.group, sym=not args.asym, **how)
    model = GPTQModel.load(args.folder, config)
    model.quantize(rows, batch_size=1)
    model.save(args.out)


if __name__ == "__main__":
    main()
