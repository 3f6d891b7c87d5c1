"""Statistics behind a quantized prefix, against the whole network with the same weights run by transformers."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from toy import family_model, tokenizer

from quantkit.activations import readers
from quantkit.codecs.sharing import all_at_once
from quantkit.forward import embed, network, run
from quantkit.model import open_model
from quantkit.prefix import Inputs, Kept, prefix
from quantkit.stats import Stats
from quantkit.walk import walk

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


def stream_behind(model: torch.nn.Module, layer: int, ids: torch.Tensor, norm: str | None) -> torch.Tensor:
    """The residual stream that a norm of a block reads, or the one behind the block, as rows."""
    if norm is not None:
        return caught(model, layer, ids, {"": norm})[""]
    with torch.no_grad():
        return model.model(ids, output_hidden_states=True).hidden_states[layer + 1].flatten(0, 1)


def stream_before(model: torch.nn.Module, layer: int, ids: torch.Tensor, stream: dict, path: str) -> torch.Tensor:
    """The residual stream that the outcome of the matrix at `path` is added to, as rows."""
    if path == next(iter(stream)):
        return caught(model, layer, ids, {"": "input_layernorm"})[""]
    return stream_behind(model, layer, ids, next(iter(stream.values())))


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
    inside, stream = dict(changed.named_parameters()), model.arch.residual()
    assert bool(stream) == (family != "gemma2")  # whose halves end in norms
    for layer in range(2):
        refs = model.block(layer)
        weights = {ref.placed.hf: ref.read() for ref in refs.values()}
        before, kept = prefix(states), Kept()
        with net.block(layer) as block, kept.watching(block, model):
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
            if path in stream:  # what it gives is to bring the stream to where the source's is behind it
                wanted = stream_behind(reference, layer, ids, stream[path]) - stream_before(
                    changed, layer, ids, stream, path
                )
                assert torch.allclose(stats.wanted, wanted.T @ x, rtol=1e-3, atol=2e-2)
            else:
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_no_part_of_a_block_is_run_twice(tmp_path, family):
    family_model(family).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    net = network(model, CPU, batch_tokens=100)  # three batches of two rows
    ids = torch.randint(2, 300, (6, 48), generator=torch.Generator().manual_seed(3))
    step = next(walk(model, net, embed(net, ids), CPU, kind=None, behind=True))
    inputs = Inputs(net, step.layer, step.before, prefix(step.before), step.weights, step.kept)
    calls: Counter[str] = Counter()
    for name, module in net.base.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    for activation in inputs:
        assert inputs[activation].rows == 6 * 48
        for name, ref in step.refs.items():
            if ref.placed.reads == activation:
                inputs.take(name, step.weights[name])
    inputs.advance()
    assert len(calls) >= 4 and set(calls.values()) == {3}, calls


def test_sums_and_states_are_the_same_to_the_bit_by_one_thread_and_by_two(tmp_path):
    family_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    net = network(model, CPU, batch_tokens=100)
    ids = torch.randint(2, 300, (6, 48), generator=torch.Generator().manual_seed(5))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            step = next(walk(model, net, embed(net, ids), CPU, kind=None, behind=True))
            inputs = Inputs(net, step.layer, step.before, prefix(step.before), step.weights, step.kept)
            stats = [inputs[activation] for activation in inputs]
            inputs.advance()
            found.append([inputs.behind.hidden, *(t for s in stats for t in (s.gram, s.absum, s.drift, s.wanted))])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_batches_that_are_shared_out_leave_what_they_leave_one_after_another(tmp_path, monkeypatch):
    def in_threads(work, count):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(work, [slice(0, 2), slice(2, count)]))

    family_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    net = network(model, CPU, batch_tokens=100)
    ids = torch.randint(2, 300, (6, 48), generator=torch.Generator().manual_seed(4))
    made = []
    for share in (all_at_once, in_threads):
        monkeypatch.setattr("quantkit.walk.in_two", lambda last, share=share: share)
        states = embed(net, ids)
        steps = walk(model, net, states, CPU, kind=None, behind=True)
        made.append((states, [(step.kept.ends, deepcopy(dict(step.kept.by_path))) for step in steps]))
    (states, alone), (states_shared, together) = made
    assert torch.equal(states.hidden, states_shared.hidden)
    for (ends, one), (other_ends, other) in zip(alone, together, strict=True):
        assert ends == other_ends and len(ends) == 2
        assert one.keys() == other.keys() == set(readers(model).values())
        for path, batches in one.items():
            assert sorted(batches) == sorted(other[path]) == [0, 1, 2]
            assert all(torch.equal(x, other[path][i]) for i, x in batches.items()), path


def test_what_is_kept_of_a_block_lies_where_the_last_but_ones_lay(tmp_path):
    family_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    net = network(model, CPU, batch_tokens=100)
    states = embed(net, torch.randint(2, 300, (5, 48), generator=torch.Generator().manual_seed(4)))
    kept = [step.kept.by_path for step in walk(model, net, states, CPU, kind=None, behind=True)]
    places = [{(path, i): x.data_ptr() for path, xs in by_path.items() for i, x in xs.items()} for by_path in kept]
    assert len(places) == 3 and len(places[0]) == 12
    assert places[2] == places[0] and not set(places[1].values()) & set(places[0].values())


def test_bf16_products_serve_all_but_importance(tmp_path):
    family_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_model(tmp_path)
    plain = network(model, CPU, batch_tokens=48)
    ids = torch.randint(2, 300, (8, 48), generator=torch.Generator().manual_seed(2))
    found = []
    mixed = replace(plain, mixed=True)
    for net, exact in ((plain, True), (mixed, True), (mixed, False)):
        step = next(walk(model, net, embed(net, ids), CPU, kind=Stats, behind=True, exact=exact))
        inputs = Inputs(net, step.layer, step.before, prefix(step.before), step.weights, step.kept)
        found.append((step.stats, {name: inputs[name].gram for name in readers(model)}))
    (source, behind), (source_mixed, behind_mixed), (fast, _) = found
    moved = [(fast[name].importance / source[name].importance - 1).abs().max() for name in readers(model)]
    assert 0 < max(moved) < 0.1, moved
    for name in readers(model):
        assert torch.equal(source[name].importance, source_mixed[name].importance)
        of_source = (source[name].gram - source_mixed[name].gram).norm() / source[name].gram.norm()
        assert 0 < of_source < 2**-9, name  # what bf16 rounds a number by
        assert 0 < (behind[name] - behind_mixed[name]).norm() / behind[name].norm() < 0.01, name
