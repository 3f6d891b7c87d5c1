"""K-quants of trained weights: SmolLM2 widened to rows of 768 (see `widened.py`), its first blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from test_convert import ggml_bytes, quantkit
from widened import first_layers, save, widened

from quantkit.codecs import decode
from quantkit.evaluate import predict
from quantkit.files.gguf import read_gguf
from quantkit.forward import last, network
from quantkit.model import open_model

LAYERS = 2


@pytest.fixture(scope="module")
def wide(smollm2, tmp_path_factory) -> Path:
    """The folder; that it is the same function is asserted here, where both are at hand."""
    model = open_model(smollm2)
    narrow = first_layers(model, LAYERS)
    made = widened(narrow)
    ids = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        a, b = (m(ids).logits.log_softmax(-1) for m in (narrow, made))
    assert torch.allclose(a, b, atol=2e-3)
    return save(made, model.files, tmp_path_factory.mktemp("wide") / "Wide")


@pytest.fixture(scope="module")
def quantized(wide, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    code, _, err = quantkit("convert", wide, "-o", out, "--to", "Q4_K_M", "--no-calibration", "--no-eval")
    assert code == 0, err
    return out / "Wide-Q4_K_M.gguf"


def test_every_matrix_is_a_k_quant_as_ggml_writes_it(wide, quantized):
    source, types = open_model(wide), set()
    refs = {ref.placed.gguf: ref for ref in source.tensors.values()}
    for t in gguf.GGUFReader(quantized).tensors:
        if not t.name.startswith("blk.") or t.tensor_type is T.F32:
            continue
        ref = refs[t.name]
        weight, layout = ref.read(), ref.placed.weight.layout
        floats = (layout.to_gguf(weight, source.config) if layout else weight).numpy()
        assert bytes(t.data) == ggml_bytes(t.tensor_type, np.ascontiguousarray(floats), None), t.name
        types.add(t.tensor_type)
    assert types == {T.Q4_K, T.Q6_K}


def test_rows_of_zeros_stay_zeros(quantized):
    file = read_gguf(quantized)
    for layer in range(LAYERS):
        info = file.tensors[f"blk.{layer}.attn_v.weight"]
        rows = decode(info.type, file.raw(info.name), info.shape)
        assert rows[:192].abs().amax(1).min() > 0 and not rows[192:].any()


def test_llama_cpp_scores_it_as_we_do(quantized):
    ids = torch.randint(0, 49152, (64,), generator=torch.Generator().manual_seed(6))
    predictions = last(predict(network(open_model(quantized), torch.device("cpu")), ids[None]))
    ours = (predictions.hidden @ predictions.head.T).log_softmax(-1).double()
    theirs = torch.from_numpy(Oracle(str(quantized)).logits(ids.tolist())).log_softmax(-1).double()[32:63]
    assert (ours.exp() * (ours - theirs)).sum(-1).mean().exp() < 1.01
