"""Our importance matrix against `llama-imatrix`, same tokens: `gguf_imatrix.py MODEL.gguf TEXT --peer llama-imatrix`.

The model should be F32: on quantized weights llama.cpp's CPU runtime rounds activations to 8 bits, which is its own
error and no difference of method. Tokens are cut as llama-imatrix cuts them. How the peer is built: gguf_quantize.py.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from quantkit.corpus import evaluation_chunks
from quantkit.files.imatrix import read_imatrix
from quantkit.forward import last, network
from quantkit.importance import measure
from quantkit.model import open_model
from quantkit.texts import load_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=512)
    options = parser.parse_args()
    model, tokenizer = open_model(options.model), open_model(options.model).tokenizer()
    ids = tokenizer.encode(load_text(options.text).plain())
    rows = evaluation_chunks(ids, options.ctx, tokenizer, options.chunks)
    ours = last(measure(network(model, torch.device("cpu")), rows, options.text.name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.gguf"
        sizes = ["-c", options.ctx, "-b", options.ctx, "--chunks", options.chunks]
        command = [options.peer, "-m", options.model, "-f", options.text, "-o", path, "--no-ppl", *sizes]
        subprocess.run([str(c) for c in command], check=True, capture_output=True)
        theirs = read_imatrix(path)
    assert ours.sums.keys() == theirs.sums.keys()
    assert all(np.array_equal(ours.counts[n], theirs.counts[n]) for n in theirs.sums)
    differences = []
    for name in theirs.sums:
        a, b = ours.importance(name).astype(np.float64), theirs.importance(name).astype(np.float64)
        differences.append((np.abs(a - b) / np.maximum(b, 1e-12)).ravel())
    columns = np.concatenate(differences)
    middle, most = np.median(columns), columns.max()
    print(f"{len(columns):,} columns of {len(theirs.sums)} entries: difference {middle:.2g} median, {most:.2g} at most")


if __name__ == "__main__":
    main()
