"""Statistics behind a quantized prefix, against the whole network with the same weights run by transformers."""

from __future__ import annotations

import pytest
import torch
from toy import family_model, tokenizer

from quantkit.forward import embed, network, readers, run
from quantkit.model import open_model
from quantkit.prefix import Inputs, Kept, prefix

CPU = torch.device("cpu")


def caught(model: torch.nn.Module, layer: int, ids: torch.Tensor, paths: dict[str, str]) -> dict[str, torch.Tensor]:
    """What reaches each reader of a block in a plain forward pass, as rows."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.model.layers[layer]
        .get_submodule(path)
        .register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
        for name, path in paths.items()
    ]
    with torch.no_grad():
        model(ids)
    for h in hooks:
        h.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("room", [0, 200_000, 2 << 30])
def test_each_activation_is_seen_behind_what_is_solved_before_it(tmp_path, monkeypatch, family, room):
    """Two blocks are solved one matrix after another; the third activation's statistics know of the first two's.

    Whatever is kept: nothing, all, or what there is room for.
    """
    monkeypatch.setattr("quantkit.prefix.KEPT_BYTES", room)
    reference, changed = family_model(family), family_model(family)
    reference.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    net = network(model, CPU, batch_tokens=100)  # three batches of two rows
    ids = torch.randint(2, 300, (6, 48), generator=torch.Generator().manual_seed(1))
    states = embed(net, ids)
    behind, paths = prefix(states), readers(model)
    inside = dict(changed.named_parameters())
    for layer in range(2):
        refs = model.block(layer)
        weights = {ref.placed.hf: ref.read() for ref in refs.values()}
        before, kept = prefix(states), Kept()
        with net.block(layer) as block, kept.watching(block, paths.values()):
            run(states, layer, block, CPU)
        inputs = Inputs(net, layer, before, behind, weights, kept)
        for activation, path in paths.items():
            ours, theirs = (
                caught(changed, layer, ids, {activation: path}),
                caught(reference, layer, ids, {activation: path}),
            )
            x, x_source = ours[activation], theirs[activation]
            stats = inputs[activation]
            assert stats.rows == 6 * 48
            assert torch.allclose(stats.gram, x.T @ x, rtol=1e-3, atol=1e-2)
            assert torch.allclose(stats.drift, (x_source - x).T @ x, rtol=1e-3, atol=2e-2)
            for ref in refs.values():
                if ref.placed.reads == activation:
                    name = ref.placed.hf
                    solved = (weights[name] * 8).round() / 8
                    inputs.take(name, solved)
                    if family != "phi":
                        inside[name].data.copy_(solved)
            if family == "phi":
                fused = model.arch.parameters({n.split(".", 3)[3]: w for n, w in (weights | inputs.solved).items()})
                for name, value in fused.items():
                    inside[f"model.layers.{layer}.{name}"].data.copy_(value)
        inputs.advance()
