"""Every family against transformers and llama.cpp: one toy each, saved by the one and converted by the other.

The road goes transformers -> llama.cpp's own converter -> GGUF -> quantkit -> HF, and what comes out is held against
what went in: configuration, tensors, logits. Nothing of quantkit's has a part in making the files it reads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_oracle import Oracle
from toy import FAMILIES, family_model

from quantkit.codecs.grid import Grid
from quantkit.evaluate import predict
from quantkit.forward import States, embed, last, network, readers, run, watching
from quantkit.model import open_model
from quantkit.targets.awq import fold
from quantkit.targets.target import Piece

CPU = torch.device("cpu")
EXPERTS = ("mixtral", "qwen3-experts")
CTX = 128  # more than a sliding window, a llama3 length and a Gemma window of 16
IDS = torch.randint(2, 320, (1, CTX), generator=torch.Generator().manual_seed(7))


def ours(path: Path) -> torch.Tensor:
    """Log-probabilities at the scored positions."""
    return last(predict(network(open_model(path), CPU), IDS)).logprobs(slice(None))


def theirs(path: Path) -> torch.Tensor:
    """llama.cpp's log-probabilities at the same positions."""
    oracle = Oracle(path)
    try:
        return torch.log_softmax(torch.from_numpy(oracle.logits(IDS[0].tolist())), -1)[CTX // 2 : CTX - 1]
    finally:
        oracle.close()


def agree(p: torch.Tensor, q: torch.Tensor) -> None:
    """Same-top of at least 99.9% and a mean KL divergence of at most 1e-4."""
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert kl <= 1e-4 and same >= 0.999, f"KL {kl:.2e}, same top {same:.4f}"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_llama_cpps(families, name):
    agree(theirs(families / f"{name}.gguf"), ours(families / f"{name}.gguf"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_gives_transformers_logits(families, name):
    """The block-wise pass over the folder against the whole model's own."""
    with torch.no_grad():
        logits = family_model(name)(IDS).logits[0, CTX // 2 : CTX - 1]
    assert torch.allclose(torch.log_softmax(logits, -1), ours(families / name), atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_configuration_come_back(families, name):
    source, model = open_model(families / name), open_model(families / f"{name}.gguf")
    assert model.tensors.keys() == source.tensors.keys()
    for tensor, ref in model.tensors.items():
        assert torch.allclose(ref.read(), source.tensors[tensor].read(), rtol=0, atol=3e-7), tensor
    # the converter drops Mistral's window, and without it a Mistral is a Llama
    dropped = {"model_type", "architectures", "attention_bias", "mlp_bias"} if name == "mistral" else set()
    for key in model.config.keys() - dropped:
        assert model.config[key] == source.config[key], key


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in EXPERTS])
def test_awqs_folds_leave_every_block_as_it_was(families, name):
    """Scales in norms (Gemma's multiply by 1 + w) and matrices cancel: if nothing is rounded, nothing changes."""
    model = open_model(families / name)
    net = network(model, CPU)
    states = embed(net, IDS)
    for layer in range(model.layers):
        refs = {ref.placed.hf: ref for ref in model.block(layer).values()}
        weights = {tensor: ref.read() for tensor, ref in refs.items()}
        before, prefix = states.hidden.clone(), f"model.layers.{layer}."
        with net.block(layer) as block, watching(block, readers(model), CPU) as stats:
            run(states, layer, block, CPU)
        folded, scales = fold(Piece(model, refs, weights, stats), Grid(4, 32, symmetric=False))
        assert len(scales) >= 2 and any((s != 1).any() for s in scales.values())
        again = States(before, states.kwargs)
        with net.block(layer, {n.removeprefix(prefix): w for n, w in folded.items()}) as block:
            run(again, layer, block, CPU)
        assert torch.allclose(again.hidden, states.hidden, rtol=1e-4, atol=1e-4)
