"""The importance matrices of the two expert toys, each expert's own, against llama-imatrix on the same tokens.

python benchmarks/peers/expert_imatrix.py --llama-imatrix PATH
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from models import fetch_converter
from toy import write_family

from quantkit import device_of, network, open_model
from quantkit.files.imatrix import Imatrix, read_imatrix
from quantkit.forward import last
from quantkit.importance import measure

CTX, CHUNKS = 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-imatrix", type=Path, required=True)
    program = parser.parse_args().llama_imatrix
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(1500)]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text.txt")
        text.write_text(" ".join(words))
        folders = [write_family(Path(scratch, name), name) for name in ("mixtral", "qwen3-experts")]
        script = Path(__file__).resolve().parents[2] / "tests" / "convert_families.py"
        subprocess.run([sys.executable, script, fetch_converter(), *folders], check=True, capture_output=True)
        for folder in folders:
            compare(folder.name, *matrices(Path(f"{folder}.gguf"), text, program))


def matrices(path: Path, text: Path, program: Path) -> tuple[Imatrix, Imatrix]:
    """Ours and llama-imatrix's of the same chunks."""
    out = path.with_suffix(".imatrix.gguf")
    command = [program, "-m", path, "-f", text, "-o", out, "-c", CTX, "-b", CTX, "--chunks", CHUNKS, "--no-ppl"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    model = open_model(path)
    ids = torch.tensor(model.tokenizer().encode(text.read_text())[: CHUNKS * CTX]).view(CHUNKS, CTX)
    return last(measure(network(model, device_of("cpu")), ids, text.name)), read_imatrix(out)


def compare(name: str, ours: Imatrix, theirs: Imatrix) -> None:
    assert ours.sums.keys() == theirs.sums.keys() and ours.chunks == theirs.chunks
    off = max(int(np.abs(ours.counts[n] - theirs.counts[n]).max()) for n in ours.counts)
    far = max(
        float(np.linalg.norm(o - t) / np.linalg.norm(t))
        for n in ours.sums
        for o, t in zip(ours.importance(n), theirs.importance(n), strict=True)
    )
    print(f"{name}: {len(ours.sums)} entries, counts off by at most {off}, values by at most {far:.2%} of their norm")


if __name__ == "__main__":
    main()
