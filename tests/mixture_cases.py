"""Cases that hold our planner against `llama-quantize --dry-run`, and the script that asks it.

    python tests/mixture_cases.py build/bin/llama-quantize > tests/mixtures-llama-quantize.txt

builds two toys, asks llama.cpp for every mixture under every set of options, and prints a hash of the types it says for
each. `tests/test_mixtures.py` compares; `benchmarks/gguf_quantize.py` says how the program is built.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType as T
from toy import toy_model, write_toy

# Recipe fields, which are llama.cpp's options under its names for them.
CHOICES: tuple[dict[str, object], ...] = (
    {},
    {"pure": True},
    {"leave_output": True},
    {"output_type": "Q8_0"},
    {"token_embedding_type": "Q5_K"},
    {"output_type": "Q5_K", "pure": True},
    {"tensor_type": ["attn_v=Q8_0", "blk.[12].ffn_down=Q5_1"]},
    {"tensor_type": [r"blk\.0\.(attn_v|ffn_down)=Q6_K", "token_embd=IQ4_XS"], "output_type": "Q8_0"},
    {"tensor_type": ["weight=Q4_K"], "token_embedding_type": "Q8_0", "leave_output": True},
)
FLAGS = {
    "pure": "--pure",
    "leave_output": "--leave-output-tensor",
    "output_type": "--output-tensor-type",
    "token_embedding_type": "--token-embedding-type",
    "tensor_type": "--tensor-type",
}
LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- .*?type = +(\w+),.*?(?:\((\w+)\))?$")


def toys(folder: Path) -> dict[str, Path]:
    """Nine layers, so that an eighth of them is one; attention 384 wide, which no block of 256 divides."""
    return {
        name: write_toy(folder / f"{name}.gguf", toy_model(num_hidden_layers=9, tie_word_embeddings=tied), T.F16)
        for name, tied in (("untied", False), ("tied", True))
    }


def hashed(types: Mapping[str, str]) -> str:
    """Twelve hex digits for the types of all tensors."""
    return hashlib.sha256("".join(f"{n} {types[n]}\n" for n in sorted(types)).encode()).hexdigest()[:12]


def asked(program: str, path: Path, mixture: str, choices: Mapping[str, object]) -> dict[str, str]:
    """The type of every tensor as llama-quantize prints them."""
    flags = []
    for field, value in choices.items():
        for one in value if isinstance(value, list) else [value]:
            flags += [FLAGS[field]] if one is True else [FLAGS[field], str(one)]
    done = subprocess.run([program, "--dry-run", *flags, path, mixture], capture_output=True, text=True, check=True)
    found = (LINE.match(line.strip()) for line in (done.stdout + done.stderr).splitlines())
    return {m[1]: (m[3] or m[2]).upper() for m in found if m}


if __name__ == "__main__":
    from quantkit.targets.mixtures import MIXTURES

    with tempfile.TemporaryDirectory() as scratch:
        for name, path in toys(Path(scratch)).items():
            for mixture in MIXTURES:
                hashes = [hashed(asked(sys.argv[1], path, mixture, choices)) for choices in CHOICES]
                print(name, mixture, *hashes, flush=True)
