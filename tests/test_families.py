"""Every family against transformers and llama.cpp: one toy each, saved by the one and converted by the other.

The road goes transformers -> llama.cpp's own converter -> GGUF -> quantkit -> HF, and what comes out is held against
what went in: configuration, tensors, logits. Nothing of quantkit's has a part in making the files it reads.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_oracle import Oracle
from safetensors.torch import load_file, save_file
from test_convert import quantkit
from toy import FAMILIES, family_model
from transformers import AutoModelForCausalLM

from quantkit.activations import readers, watching
from quantkit.arch.rope import llama3_freqs, llama3_of
from quantkit.codecs.grid import Grid
from quantkit.errors import BadInput, Unsupported
from quantkit.evaluate import predict
from quantkit.forward import States, embed, last, network, run
from quantkit.model import open_model
from quantkit.solvers.awq import awq_scale
from quantkit.targets.folding import fold
from quantkit.targets.target import Piece

CPU = torch.device("cpu")
EXPERTS = ("mixtral", "qwen3-experts")
CTX = 128  # more than a sliding window, a llama3 length and a Gemma window of 16
IDS = torch.randint(2, 320, (1, CTX), generator=torch.Generator().manual_seed(7))


def ours(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Log-probabilities at the scored positions."""
    return last(predict(network(open_model(path), CPU), ids)).logprobs(slice(None))


def theirs(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """llama.cpp's log-probabilities at the same positions."""
    oracle = Oracle(path, exact=True)
    try:
        return torch.log_softmax(torch.from_numpy(oracle.logits(ids[0].tolist())), -1)[CTX // 2 : CTX - 1]
    finally:
        oracle.close()


def agree(p: torch.Tensor, q: torch.Tensor, within: float = 1e-4) -> None:
    """Log-probabilities that differ by what sums in another order do, or by `within` where llama.cpp rounds to f16."""
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    most = (p - q).abs().max().item()
    assert kl <= 1e-6 and most <= within, f"KL {kl:.2e}, largest difference {most:.2e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_llama_cpps(families, name):
    within = 0.01 if name.startswith("gemma") else 1e-4  # ggml looks GELU up in a table of f16
    agree(theirs(families / f"{name}.gguf"), ours(families / f"{name}.gguf"), within)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_gives_transformers_logits(families, name):
    """The block-wise pass over the folder against the whole model's own."""
    with torch.no_grad():
        logits = family_model(name)(IDS).logits[0, CTX // 2 : CTX - 1]
    assert torch.allclose(torch.log_softmax(logits, -1), ours(families / name), atol=2e-4)


@pytest.mark.parametrize("name", ["mistral", "phi"])
def test_a_window_shorter_than_the_text_is_transformers(families, name, tmp_path):
    """llama.cpp reads no window of Mistral's and has Phi's switched off (`phi3.cpp`): transformers has both."""
    folder = Path(shutil.copytree(families / name, tmp_path / name))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": CTX // 3}))
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = whole(IDS).logits[0, CTX // 2 : CTX - 1]
    windowed = ours(folder)
    assert torch.allclose(torch.log_softmax(logits, -1), windowed, atol=2e-4)
    assert not torch.allclose(ours(families / name), windowed, atol=1e-2)


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


@pytest.mark.parametrize("name", FAMILIES)
def test_awqs_folds_leave_every_block_as_it_was(families, name):
    """Scales in norms (Gemma's multiply by 1 + w) and matrices cancel: if nothing is rounded, nothing changes."""
    model = open_model(families / name)
    net = network(model, CPU)
    states = embed(net, IDS)
    for layer in range(model.layers):
        refs = {ref.placed.hf: ref for ref in model.block(layer).values()}
        weights = {tensor: ref.read() for tensor, ref in refs.items()}
        before, prefix = states.hidden.clone(), f"model.layers.{layer}."
        with net.block(layer) as block, watching(block, readers(model), net.statistics) as stats:
            run(states, layer, block, CPU)
        folded = fold(Piece(model, refs, weights, stats), partial(awq_scale, grid=Grid(4, 32, symmetric=False)))
        assert len(folded.columns) >= 2 and any((s != 1).any() for s in folded.columns.values())
        again = States(before, states.kwargs)
        with net.block(layer, {n.removeprefix(prefix): w for n, w in folded.weights.items()}) as block:
            run(again, layer, block, CPU)
        assert torch.allclose(again.hidden, states.hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("head_dim", "factor", "high", "length", "theta"),
    [
        *[(128, 8.0, 4.0, 8192, 500000.0), (64, 32.0, 4.0, 8192, 500000.0), (128, 16.0, 1.5, 4096, 10000.0)],
        (32, 8.0, 4.0, 64, 500000.0),  # one divisor between the ends
    ],
)
def test_llama3s_numbers_are_read_off_its_divisors(head_dim, factor, high, length, theta):
    """Llama 3.1 and 3.2 as published, and two that nobody published."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
    scaling["original_max_position_embeddings"] = length
    config = {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling}
    assert llama3_of(llama3_freqs(config), config) == scaling


def test_divisors_that_all_lie_at_the_ends_are_found_again():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.5}
    config = {"head_dim": 8, "rope_theta": 1e4, "rope_scaling": scaling | {"original_max_position_embeddings": 50}}
    freqs = llama3_freqs(config)
    assert set(freqs.tolist()) == {1.0, 8.0}
    assert np.array_equal(llama3_freqs(config | {"rope_scaling": llama3_of(freqs, config)}), freqs)


def test_other_divisors_are_refused():
    config = {"head_dim": 64, "rope_theta": 10000.0}
    assert llama3_of(np.ones(32), config) is None
    for freqs in (
        np.linspace(1, 8, 32),
        np.linspace(1, 2, 32) ** 2,
        np.full(32, 4.0),
        np.ones(5) * 2,
    ):
        with pytest.raises(BadInput, match=r"rope_freqs\.weight"):
            llama3_of(freqs, config)


def test_gemma_3_270m_is_llama_cpps(gemma3, tmp_path):
    """A real model: quantized by llama.cpp, made F16 by quantkit, run by both."""
    code, stdout, stderr = quantkit("convert", gemma3, "-o", tmp_path / "out", "--to", "F16", "--no-eval", "--json")
    assert code == 0, stderr
    path = tmp_path / "out" / json.loads(stdout)["variants"][0]["path"]
    words = "The sun had set when they came to the bridge, and nobody said a word. "
    ids = torch.tensor([open_model(path).tokenizer().encode("\u2581" + words * 8)[:CTX]])
    ids[0, 0] = 2
    agree(theirs(path, ids), ours(path, ids), within=0.1)  # beside F16 weights activations are F16 as well


def test_tensors_that_a_family_has_not_are_refused(families, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(families / "llama", folder)
    weights = load_file(folder / "model.safetensors")
    zeros, name = torch.zeros(192), "model.layers.1.self_attn.q_proj.bias"
    save_file(
        weights | {name: zeros, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)},
        folder / "model.safetensors",
    )
    open_model(folder)
    for odd in ({name: zeros + 1}, {"model.layers.0.mlp.extra.weight": zeros}):
        save_file(weights | odd, folder / "model.safetensors")
        with pytest.raises(Unsupported, match=next(iter(odd))):
            open_model(folder)
