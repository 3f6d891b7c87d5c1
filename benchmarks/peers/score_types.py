"""Every block type that quantkit writes, of one trained model: llama.cpp's perplexity beside quantkit's.

    python benchmarks/peers/score_types.py wide-F16.gguf --imatrix wide.imatrix.gguf --text wiki.test.txt

The model must have rows that all divide by 256: `tests/widened.py` makes one of SmolLM2. All matrices of its blocks
become the type in question, embedding and output matrix Q8_0. Both programs then score the same file on the same
tokens. llama.cpp on a CPU rounds activations to 8 bits where weights are quantized; so the file is also converted on to
F16, the same weights, which it runs without that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from score_gguf import llama_cpp, quantkit

from quantkit.codecs import CODECS
from quantkit.corpus import evaluation_chunks
from quantkit.model import open_model
from quantkit.texts import load_text

TYPES = [name for name in CODECS if name not in ("F32", "Q1_0", "NVFP4")]  # llama.cpp writes neither of the last two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--text", required=True, help="demo, wikitext2 or a file")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=256)
    options = parser.parse_args()
    tokenizer = open_model(options.source).tokenizer()
    ids = tokenizer.encode(load_text(options.text).plain())
    rows = evaluation_chunks(ids, options.ctx, tokenizer, options.chunks)
    print("| type | quantkit | llama.cpp | ratio | llama.cpp, the same weights as F16 | ratio |")
    print("|---|---|---|---|---|---|")
    for kind in options.types:
        with tempfile.TemporaryDirectory(dir=options.source.parent) as scratch:
            made = convert(
                options.source, Path(scratch, "q"), f"--tensor-type=^blk={kind}", "--imatrix", options.imatrix
            )
            plain = convert(made, Path(scratch, "f"), target="F16")
            ours, theirs, without = quantkit(made, rows)[0], llama_cpp(made, rows)[0], llama_cpp(plain, rows)[0]
        cells = [f"{ours:.4f}", f"{theirs:.4f}", f"{theirs / ours:.5f}", f"{without:.4f}", f"{without / ours:.5f}"]
        print("| " + " | ".join([kind, *cells]) + " |", flush=True)


def convert(source: Path, out: Path, *options: object, target: str = "Q8_0") -> Path:
    """The file that `quantkit convert` makes."""
    command = [sys.executable, "-m", "quantkit", "convert", source, "-o", out, "--to", target, "--no-eval", *options]
    if not options:
        command.append("--no-calibration")
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return next(out.glob("*.gguf"))


if __name__ == "__main__":
    main()
