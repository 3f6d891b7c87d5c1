"""Column scales: a block computes the same with them folded in, and each weight can be had back."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from toy import family_model, tokenizer

from quantkit.forward import embed, network, run
from quantkit.model import open_model
from quantkit.stats import Stats
from quantkit.targets.folding import fold
from quantkit.targets.target import Piece

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi", "mixtral", "qwen3-experts"])
def test_a_folded_block_computes_the_same(tmp_path, family):
    family_model(family).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    net, g = network(model, CPU), torch.Generator().manual_seed(0)
    states = [embed(net, torch.arange(2, 42)[None]) for _ in range(2)]
    refs = {ref.placed.hf: ref for ref in model.block(0).values()}
    weights = {name: ref.read() for name, ref in refs.items()}
    stats = defaultdict(lambda: Stats.zeros(1))
    folded = fold(Piece(model, refs, weights, stats), lambda w, _: 0.5 + torch.rand(w.shape[1], generator=g))
    assert set(folded.rows) >= {n for n in refs if n.endswith("layernorm.weight") and "input" in n}
    assert any("up_proj" in n or "w3" in n for n in folded.rows) or family == "phi"  # gate and up are one matrix there
    for own, states_of in zip((weights, folded.weights), states, strict=True):
        with net.block(0, {n.removeprefix("model.layers.0."): w for n, w in own.items()}) as block:
            run(states_of, 0, block, CPU)
    assert torch.allclose(states[0].hidden, states[1].hidden, rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        if weight.dim() == 2:
            assert torch.allclose(folded.undone(name, folded.weights[name]), weight, atol=1e-6), name
            assert (folded.weights[name] != weight).any() == (name in folded.columns or name in folded.rows)
