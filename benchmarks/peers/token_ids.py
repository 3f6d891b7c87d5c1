"""The token ids of a whole text, ours and llama.cpp's, for five vocabularies; the script fails where they differ.

python benchmarks/peers/token_ids.py --text wiki.test.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from llama_oracle import Oracle
from models import GEMMA3, SMOLLM2, VOCABS, fetch, fetch_source

from quantkit.arch.tokenizer import load_tokenizer, tokenizer_files
from quantkit.files.gguf import read_gguf

NAMES = {"Llama-2": "llama-spm", "Llama-3": "llama-bpe", "Qwen2": "qwen2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    text = parser.parse_args().text.read_text(encoding="utf-8")
    vocabularies = {p.stem.removeprefix("ggml-vocab-"): p for p in fetch_source(VOCABS)}
    paths = {"SmolLM2": fetch(SMOLLM2), "Gemma-3": fetch(GEMMA3)} | {n: vocabularies[v] for n, v in NAMES.items()}
    for name, path in paths.items():
        metadata = {key: value.data for key, value in read_gguf(path).metadata.items()}
        ours, oracle = load_tokenizer(tokenizer_files(metadata)).encode(text), Oracle(path, context=False)
        theirs = oracle.tokenize(text)
        oracle.close()
        print(f"{name}: {len(ours):,} ids, {'equal' if ours == theirs else 'NOT EQUAL'}")
        if ours != theirs:
            sys.exit(1)


if __name__ == "__main__":
    main()
