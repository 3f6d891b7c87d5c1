"""The forward pass against llama.cpp and transformers, on a toy whose every width is different."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from toy import CONFIG, tokenizer, toy_model, write_toy

from quantkit.activations import readers, watching
from quantkit.errors import BadInput, FormatError, Unsupported, UsageError
from quantkit.evaluate import predict
from quantkit.forward import device_of, embed, last, network, run
from quantkit.model import open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def toy_gguf(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "toy-F32.gguf", toy_model())


def ids(n: int = 3, ctx: int = 64) -> torch.Tensor:
    return torch.randint(2, CONFIG["vocab_size"], (n, ctx), generator=torch.Generator().manual_seed(5))


def logits(path: Path, chunks: torch.Tensor) -> torch.Tensor:
    """Our logits at the scored positions, (n, p, vocab)."""
    predictions = last(predict(network(open_model(path), CPU), chunks))
    return (predictions.hidden @ predictions.head.T).view(len(chunks), -1, CONFIG["vocab_size"])


def test_names_permutation_and_config_give_the_logits_of_transformers(toy_gguf):
    chunks = ids()
    with torch.no_grad():
        expected = toy_model()(chunks).logits[:, 32:63]
    assert torch.allclose(logits(toy_gguf, chunks), expected, atol=2e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_chunks_that_two_threads_share_are_all_scored_in_batches_of_half_the_size(toy_gguf, count):
    chunks, sizes = ids(count), []
    net = network(open_model(toy_gguf), CPU, batch_tokens=4 * 64)
    net.base.layers[0].mlp.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    predictions = last(predict(net, chunks))
    with torch.no_grad():
        expected = toy_model()(chunks).logits[:, 32:63]
    found = (predictions.hidden @ predictions.head.T).view(count, -1, CONFIG["vocab_size"])
    assert torch.allclose(found, expected, atol=2e-4)
    assert sorted(sizes) == {1: [1], 2: [1, 1], 3: [1, 2], 5: [1, 2, 2]}[count]


def test_logits_are_those_of_llama_cpp(toy_gguf):
    chunks = ids(2)
    oracle = Oracle(str(toy_gguf))
    theirs = torch.stack([torch.from_numpy(oracle.logits(row.tolist())) for row in chunks])[:, 32:63]
    ours = logits(toy_gguf, chunks)
    p, q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-5  # llama.cpp keeps its cache in fp16
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.99


def test_a_wrong_permutation_would_show(toy_gguf):
    """The toy can tell: without un-permuting, its logits are far off."""
    model = toy_model()
    wrong = toy_model()
    with torch.no_grad():
        for layer in wrong.model.layers:
            w = layer.self_attn.q_proj.weight
            w.copy_(w.view(8, 2, 24, -1).transpose(1, 2).reshape(w.shape))
        gap = (model(ids()).logits - wrong(ids()).logits).abs().max()
    assert gap > 0.1


def test_biases_and_tied_embeddings_are_read(tmp_path):
    model = toy_model(attention_bias=True, tie_word_embeddings=True)
    path = write_toy(tmp_path / "biased.gguf", model)
    opened = open_model(path)
    assert opened.config["attention_bias"] and opened.config["tie_word_embeddings"]
    with torch.no_grad():
        expected = model(ids()).logits[:, 32:63]
    assert torch.allclose(logits(path, ids()), expected, atol=2e-4)


def test_statistics_are_those_of_the_activations(toy_gguf):
    model = open_model(toy_gguf)
    net, chunks = network(model, CPU), ids()
    states = embed(net, chunks)
    x = states.hidden.clone()
    with net.block(0) as block, watching(block, readers(model), net.statistics) as stats:
        normed = block.input_layernorm(x).flatten(0, 1)
        run(states, 0, block, CPU)
    assert set(stats) == {"attn_in", "heads", "mlp_in", "mlp_mid"}
    assert stats["attn_in"].rows == chunks.numel()
    assert torch.allclose(stats["attn_in"].gram, normed.T @ normed, rtol=1e-4, atol=1e-2)
    assert torch.allclose(stats["attn_in"].absum, normed.abs().sum(0), rtol=1e-4)
    assert stats["heads"].gram.shape == (384, 384) and stats["mlp_mid"].gram.shape == (512, 512)


def test_a_block_is_empty_again_after_use(toy_gguf):
    net = network(open_model(toy_gguf), CPU)
    with net.block(1) as block:
        assert next(block.parameters()).device == CPU
    assert next(block.parameters()).is_meta


def test_devices_are_named_or_refused():
    assert device_of("cpu") == CPU
    for name in ("gpu", "cuda:x", "cuda:7"):
        with pytest.raises(UsageError):
            device_of(name)


def test_an_unknown_architecture_is_named(tmp_path):
    path = write_toy(tmp_path / "odd.gguf", toy_model(), arch="mamba")
    with pytest.raises(Unsupported, match=r"architecture 'mamba' is not supported; known: .*llama"):
        open_model(path)


def test_missing_and_unknown_tensors_are_errors(tmp_path, monkeypatch):
    import toy

    real = toy.gguf_name
    monkeypatch.setattr(toy, "gguf_name", lambda n: real(n).replace("blk.1.ffn_up", "blk.1.ffn_odd"))
    path = write_toy(tmp_path / "odd.gguf", toy_model())
    with pytest.raises(BadInput, match=r"blk\.1\.ffn_up\.weight is missing"):
        open_model(path)


def test_a_shape_against_the_keys_is_an_error(tmp_path):
    model = toy_model()
    model.config.intermediate_size = 576
    with pytest.raises(FormatError, match=r"ffn_\w+\.weight has shape"):
        open_model(write_toy(tmp_path / "odd.gguf", model))


def test_quantized_tensors_read_as_their_dequantized_selves(tmp_path):
    from gguf import quants

    model = toy_model()
    path = write_toy(tmp_path / "q.gguf", model, T.Q8_0)
    w = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    expected = quants.dequantize(quants.quantize(w, T.Q8_0), T.Q8_0)
    assert torch.equal(open_model(path).tensors["model.layers.0.mlp.up_proj.weight"].read(), torch.from_numpy(expected))


def test_a_token_without_a_row_is_named(tmp_path):
    toy_model(vocab_size=270).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    net = network(open_model(tmp_path), CPU)
    with pytest.raises(BadInput, match="token 271 of the tokenizer has no row in an embedding of 270"):
        embed(net, torch.tensor([[1, 271, 3]]))


def test_a_configuration_that_transformers_cannot_build_is_refused(tmp_path):
    toy_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"refuses this configuration \(it knows no 'spiral'\)"):
        network(open_model(tmp_path), CPU)
