"""Every mixture and every block type that can be written: llama.cpp loads it and scores it as we do.

On text drawn from our probabilities, its perplexity over ours is the exponential of the mean KL divergence, so no text
has to be drawn. llama.cpp's CPU runtime rounds activations to 8 bits where weights are quantized: that is what differs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from test_convert import quantkit
from test_forward import logits
from toy import toy_model, write_toy

from quantkit.codecs import CODECS
from quantkit.files.gguf import read_gguf
from quantkit.files.imatrix import Imatrix, write_imatrix
from quantkit.targets.mixture_rules import MIXTURES

RARE = ("TQ1_0", "TQ2_0", "MXFP4", "IQ2_XXS", "IQ1_M", "IQ2_S")  # in no mixture, or in few tensors of one


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The toy in all mixtures, and as Q8_0 with a rare type in each of six matrices."""
    folder = tmp_path_factory.mktemp("loads")
    source = write_toy(folder / "Toy.F16.gguf", toy_model(), T.F16)
    generator, tensors = torch.Generator().manual_seed(7), read_gguf(source).tensors
    widths = {n: t.shape[1] for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    sums = {n: torch.rand(1, width, generator=generator).numpy() for n, width in widths.items()}
    write_imatrix(folder / "imatrix.gguf", Imatrix(sums, {n: np.array([64]) for n in sums}, ("random",), 1, 64))
    common = ["--imatrix", folder / "imatrix.gguf", "--no-eval", "--device", "cpu"]
    places = [f"blk.{layer}.ffn_{name}" for layer in range(3) for name in ("up", "gate")]
    rare = [f"--tensor-type={place}={kind}" for place, kind in zip(places, RARE, strict=True)]
    runs = [("mixtures", [f"--to={m}" for m in MIXTURES]), ("rare", ["--to=Q8_0", *rare])]
    for name, targets in runs:
        code, _, err = quantkit("convert", source, "-o", folder / name, *targets, *common)
        assert code == 0, err
    return folder


def test_every_block_type_is_among_them(made):
    types = {t.type for path in made.glob("*/*.gguf") for t in read_gguf(path).tensors.values()}
    assert types == CODECS.keys() - {"Q1_0", "NVFP4"}  # which llama.cpp's own command does not write either


@pytest.mark.parametrize("name", [*(f"mixtures/Toy-{m}" for m in MIXTURES), "rare/Toy-Q8_0"])
def test_llama_cpp_scores_it_as_we_do(made, name):
    path = made / f"{name}.gguf"
    ids = torch.randint(2, 320, (64,), generator=torch.Generator().manual_seed(3))
    oracle = Oracle(str(path))
    theirs, ours = torch.from_numpy(oracle.logits(ids.tolist()))[32:63], logits(path, ids[None])[0]
    oracle.close()
    p, q = (torch.log_softmax(x.double(), -1) for x in (ours, theirs))
    assert 1 <= (p.exp() * (p - q)).sum(-1).mean().exp() < 1.01
