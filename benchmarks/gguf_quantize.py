"""GGUF -> GGUF against `llama-quantize`: the same file, threads and importance matrix, runs taking turns.

    python benchmarks/synthetic.py 300m bench/Synthetic-300m.Q8_0.gguf
    python benchmarks/gguf_quantize.py bench/Synthetic-300m.Q8_0.gguf --peer build/bin/llama-quantize --runs 3

The peer is built once, from the source distribution of llama-cpp-python, for its own processor:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-quantize llama-imatrix

Both pay for starting, reading and writing. Ours also verifies what it wrote, brings it to the disk, hashes the source
and states every tensor's error. Without an importance matrix the data of the two files must be the same to the byte.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from measured import Cost, run, spread

from quantkit.files.gguf import GGUF, read_gguf
from quantkit.files.imatrix import Imatrix, write_imatrix


def random_imatrix(source: Path, path: Path) -> Path:
    """An importance matrix for every matrix of the blocks, of random numbers: the work is the same."""
    rng = np.random.default_rng(0)
    tensors = {n: t for n, t in read_gguf(source).tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    sums = {n: rng.random((1, t.shape[1]), dtype=np.float32) * 1000 for n, t in tensors.items()}
    write_imatrix(path, Imatrix(sums, {n: np.array([512]) for n in sums}, ("random",), 1, 512))
    return path


def differing(a: GGUF, b: GGUF) -> int:
    """How many tensors of two files are not the same in type and bytes."""
    same = (a.tensors[n].type == t.type and np.array_equal(a.stored(n), b.stored(n)) for n, t in b.tensors.items())
    return sum(not s for s in same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q6_K", "IQ4_XS"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--imatrix", choices=["both", "with", "without"], default="both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.source.parent) as scratch:
        folder = Path(scratch)
        given = random_imatrix(options.source, folder / "random.gguf")
        print("| type | imatrix | wall ratio | CPU ratio | wall s | theirs | peak | theirs | tensors that differ |")
        print("|---|---|---|---|---|---|---|---|---|")
        for kind in options.types:
            for imatrix in {"both": (None, given), "with": (given,), "without": (None,)}[options.imatrix]:
                ours, theirs, differ = compare(options, folder, kind, imatrix)
                wall = [o.wall / t.wall for o, t in zip(ours, theirs, strict=True)]
                cpu = [o.cpu / t.cpu for o, t in zip(ours, theirs, strict=True)]
                peaks = [f"{max(c.peak for c in costs) / 2**20:.0f} MiB" for costs in (ours, theirs)]
                walls = [spread([c.wall for c in costs]) for costs in (ours, theirs)]
                cells = [kind, "yes" if imatrix else "no", spread(wall), spread(cpu), *walls, *peaks, str(differ)]
                print("| " + " | ".join(cells) + " |", flush=True)


def compare(
    options: argparse.Namespace, folder: Path, kind: str, imatrix: Path | None
) -> tuple[list[Cost], list[Cost], int]:
    """The costs of alternating runs, ours and theirs, and how many tensors differ in the end."""
    out, peer = folder / "ours", folder / "theirs.gguf"
    ours, theirs = [], []
    for _ in range(options.runs):
        shutil.rmtree(out, ignore_errors=True)
        how = ["--imatrix", imatrix] if imatrix else ["--no-calibration"]
        convert = [sys.executable, "-m", "quantkit", "convert", options.source, "-o", out, "--to", kind, "--no-eval"]
        ours.append(run([*convert, *how, "--device", "cpu"], options.threads))
        how = ["--imatrix", imatrix] if imatrix else []
        theirs.append(run([options.peer, "--allow-requantize", *how, options.source, peer, kind, options.threads]))
    return ours, theirs, differing(read_gguf(next(out.glob("*.gguf"))), read_gguf(peer))


if __name__ == "__main__":
    main()
