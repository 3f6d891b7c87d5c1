"""The main job on a real model: SmolLM2-135M-Instruct from Q4_1 to every kind of target, scored on held-out text."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from test_convert import ggml_bytes, quantkit
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.codecs.grid import Grid
from quantkit.corpus import evaluation_chunks
from quantkit.evaluate import mean_perplexity, predict, score
from quantkit.files.imatrix import read_imatrix
from quantkit.forward import Network, last, network
from quantkit.model import Model, open_model
from quantkit.solvers.rtn import rtn
from quantkit.targets.folder import linear
from quantkit.texts import load_text

CPU, CHUNKS = torch.device("cpu"), 4


@pytest.fixture(scope="module")
def out(smollm2, tmp_path_factory):
    """Seven targets from one calibration pass of 4 rows, not scored."""
    folder = tmp_path_factory.mktemp("smollm2") / "out"
    targets = [f"--to={t}" for t in ("fp16", "fp32", "gptq", "awq", "Q8_0", "Q4_K_M", "F32")]
    code, _, err = quantkit("convert", smollm2, "-o", folder, *targets, "--samples", 4, "--no-eval", "--device", "cpu")
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def chunks(smollm2) -> torch.Tensor:
    tokenizer = open_model(smollm2).tokenizer()
    return evaluation_chunks(tokenizer.encode(load_text("demo").plain()), 512, tokenizer, CHUNKS)


@pytest.fixture(scope="module")
def source(smollm2) -> Network:
    return network(open_model(smollm2), CPU)


@pytest.fixture(scope="module")
def reference(source, chunks):
    return last(predict(source, chunks))


def perplexity(path, *options: object) -> dict:
    code, stdout, err = quantkit("perplexity", path, "--chunks", CHUNKS, "--json", *options)
    assert code == 0, err
    return json.loads(stdout)


def test_gguf_folder_and_llama_cpp_agree(smollm2, out, chunks):
    """Equal ids: our perplexity of the GGUF and of the fp16 folder, and the logits of the fp32 folder in llama.cpp."""
    ours, folder = (perplexity(p)["perplexity"] for p in (smollm2, out / "fp16"))
    assert folder == pytest.approx(ours, rel=1e-3)
    oracle = Oracle(str(out / "SmolLM2-135M-Instruct-F32.gguf"))
    logits = torch.cat([torch.from_numpy(oracle.logits(row.tolist())[256:511]) for row in chunks]).double()
    theirs, targets = logits.log_softmax(-1), chunks[:, 257:].flatten()
    assert mean_perplexity(-theirs.gather(1, targets[:, None])[:, 0])[0] == pytest.approx(ours, rel=1e-3)
    predictions = last(predict(network(open_model(out / "fp32"), CPU), chunks))
    mine = (predictions.hidden @ predictions.head.T).view_as(logits).double().log_softmax(-1)
    assert (theirs.exp() * (theirs - mine)).sum(-1).mean() < 1e-5
    assert (theirs.argmax(-1) == mine.argmax(-1)).double().mean() >= 0.999


def test_the_ids_are_llama_cpps(smollm2, chunks):
    ids = Oracle(str(smollm2), context=False).tokenize(load_text("demo").plain())
    assert ids[: chunks.numel()] == chunks.flatten().tolist()


def test_transformers_writes_sense_from_the_fp16_folder(out):
    folder = out / "fp16"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0][ids["input_ids"].shape[1] :])
    assert "Paris" in text, text


def rounded_to_nearest(model: Model, grid: Grid) -> Model:
    """The model as plain round-to-nearest would leave it."""

    def read(ref):
        return lambda: rtn(ref.read(), grid).dequantize()

    return replace(model, tensors=model.tensors | {n: replace(r, read=read(r)) for n, r in linear(model).items()})


@pytest.mark.parametrize(("target", "grid"), [("gptq", Grid(4, 64)), ("awq", Grid(4, 64, symmetric=False))])
def test_calibrated_formats_beat_rounding_on_held_out_text(out, source, chunks, reference, target, grid):
    """At the same bits and group: perplexity, and KL by more than its error bars."""
    made = score(last(predict(network(open_model(out / target), CPU), chunks)), chunks, reference)
    nearest = Network(rounded_to_nearest(source.model, grid), source.empty, CPU)
    plain = score(last(predict(nearest, chunks)), chunks, reference)
    assert made.perplexity < plain.perplexity
    gap = plain.kl_divergence.mean - made.kl_divergence.mean
    assert gap > 3 * (plain.kl_divergence.stderr + made.kl_divergence.stderr)


@pytest.mark.parametrize(
    ("name", "types"), [("Q4_K_M", {T.Q4_K, T.Q5_0, T.Q6_K, T.Q8_0, T.F32}), ("Q8_0", {T.Q8_0, T.F32})]
)
def test_gguf_targets_are_what_ggml_writes(smollm2, out, name, types):
    """Three blocks and all outside them, byte for byte, from gguf-py's floats and the imatrix on disk."""
    source = {t.name: t for t in gguf.GGUFReader(smollm2).tensors}
    imatrix, seen = read_imatrix(out / "imatrix.gguf"), set()
    for t in gguf.GGUFReader(out / f"SmolLM2-135M-Instruct-{name}.gguf").tensors:
        if t.name.startswith("blk.") and t.name.split(".")[1] not in ("0", "15", "29"):
            continue
        before = source[t.name]
        if t.tensor_type == before.tensor_type:
            assert bytes(t.data) == bytes(before.data), t.name
        else:
            floats = np.ascontiguousarray(gguf.quants.dequantize(before.data, before.tensor_type))
            weights = imatrix.importance(t.name) if t.name in imatrix.sums else None
            assert bytes(t.data) == ggml_bytes(t.tensor_type, floats, weights), t.name
        seen.add(t.tensor_type)
    assert seen == types
