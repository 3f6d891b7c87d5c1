"""Score a GGUF by llama.cpp's own logits and by quantkit's forward pass, on the same tokens.

    pip install -e ".[test]"                 # brings xllamacpp: llama.cpp as a wheel, reached by tests/llama_oracle.py
    python benchmarks/peers/score_gguf.py out/model-F16.gguf --text wikitext2 --chunks 20

Prints one JSON object. llama.cpp reads, tokenizes and runs the file by itself; its token ids are asserted to be
quantkit's, so that what is left between the two perplexities is arithmetic: llama.cpp on a CPU rounds activations to
half precision for F16 and to 8 bits for Q8_0 and the K-quants, and keeps its cache in half precision. quantkit
dequantizes the same weights and runs them in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from llama_oracle import Oracle

from quantkit.corpus import evaluation_chunks
from quantkit.evaluate import mean_perplexity, predict, score
from quantkit.forward import last, network
from quantkit.model import open_model
from quantkit.texts import load_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--text", default="wikitext2", help="demo, wikitext2 or a file")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--ctx", type=int, default=512)
    options = parser.parse_args()

    model = open_model(options.gguf)
    tokenizer, text = model.tokenizer(), load_text(options.text).plain()
    ids = tokenizer.encode(text)
    rows = evaluation_chunks(ids, options.ctx, tokenizer, options.chunks)

    oracle = Oracle(options.gguf)
    if oracle.tokenize(text) != ids:
        raise SystemExit("llama.cpp cuts this text into other tokens")
    oracle.close()
    (theirs, stderr), (ours, own) = llama_cpp(options.gguf, rows), quantkit(options.gguf, rows)
    record = {
        "file": options.gguf.name,
        "tokens": len(ids),
        "chunks": len(rows),
        "llama_cpp": {"perplexity": theirs, "stderr": stderr, "version": f"xllamacpp {version('xllamacpp')}"},
        "quantkit": {"perplexity": ours, "stderr": own},
        "ratio": theirs / ours,
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


def llama_cpp(gguf: Path, rows: torch.Tensor) -> tuple[float, float]:
    """llama.cpp's perplexity of a file on chunks (n, ctx) of at most 512 tokens, and its standard error."""
    oracle, losses, half = Oracle(gguf), [], rows.shape[1] // 2
    for row in rows:
        logits = torch.from_numpy(oracle.logits(row.tolist()).astype(np.float64))[half:-1]
        losses.append(-torch.log_softmax(logits, -1).gather(1, row[half + 1 :, None])[:, 0])
    oracle.close()
    return mean_perplexity(torch.cat(losses))


def quantkit(gguf: Path, rows: torch.Tensor) -> tuple[float, float]:
    """quantkit's."""
    found = score(last(predict(network(open_model(gguf), torch.device("cpu")), rows)), rows)
    return found.perplexity, found.stderr


if __name__ == "__main__":
    main()
