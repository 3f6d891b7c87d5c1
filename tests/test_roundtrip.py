"""HF folder -> GGUF: what quantkit writes against what llama.cpp's own converter writes, and the whole way round.

Tensors must be the same bytes. Metadata may differ only where a table here says so, with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from models import VOCABS, fetch_source
from test_convert import quantkit, text  # noqa: F401  text is a fixture
from test_families import CTX, EXPERTS, IDS, agree, ours, theirs
from toy import FAMILIES, toy_model, write_toy
from transformers import AutoModelForCausalLM

from quantkit.errors import BadInput
from quantkit.files.gguf import read_gguf
from quantkit.model import open_model

CONVERTER = {  # keys that quantkit writes otherwise than llama.cpp's converter does
    "general.name": "the converter sets a folder's name in capitals",
    "tokenizer.ggml.pre": "two names of one cut: the first of the row in pretokenizers.py",
    "tokenizer.ggml.add_bos_token": "false is written; the converter leaves it out for a plain tokenizer",
    "tokenizer.ggml.add_eos_token": "the same",
    "llama.attention.sliding_window": "Mistral's window, which the converter drops and llama.cpp does not read",
    "phi3.attention.key_length": "hidden size over heads, as a reader would compute it",
    "phi3.attention.value_length": "the same",
    "gemma2.rope.freq_base": "10000, what a reader takes without it",
}
ROUND = {  # keys that are not the same after GGUF -> HF folder -> GGUF
    "general.name": "an HF folder has no name but its own",
    "general.organization": "of the model card, which an HF folder's config does not hold",
    "general.finetune": "the same",
    "general.basename": "the same",
    "general.license": "the same",
    "general.languages": "the same",
    "general.quantization_version": "2 in both; plain floats need none",
    "llama.attention.key_length": "hidden size over heads, as a reader would compute it",
    "llama.attention.value_length": "the same",
    "tokenizer.ggml.add_space_prefix": "no meaning for a byte-level vocabulary",
    "tokenizer.ggml.add_eos_token": "false is written; the source leaves it out",
    "tokenizer.ggml.pre": "two names of one cut",
}


def keys(path: Path) -> dict[str, object]:
    values = {k: v.data for k, v in read_gguf(path).metadata.items()}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def changed(a: Path, b: Path) -> set[str]:
    x, y = keys(a), keys(b)
    return {k for k in x.keys() | y.keys() if x.get(k) != y.get(k)}


def same_tensors(a: Path, b: Path) -> None:
    x, y = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (a, b))
    assert x.keys() == y.keys()
    for name, t in x.items():
        assert (t.tensor_type, bytes(t.data)) == (y[name].tensor_type, bytes(y[name].data)), name


def converted(source: Path, out: Path, target: str, *options: object) -> Path:
    code, stdout, stderr = quantkit("convert", source, "-o", out, "--to", target, "--no-eval", "--json", *options)
    assert code == 0, stderr
    return out / json.loads(stdout)["variants"][0]["path"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_becomes_the_converters_file(families, name, tmp_path):
    made, expected = converted(families / name, tmp_path / "out", "F32"), families / f"{name}.gguf"
    same_tensors(made, expected)
    assert changed(made, expected) <= CONVERTER.keys()


def test_mistrals_window_is_kept(families, tmp_path):
    made = converted(families / "mistral", tmp_path / "out", "F32")
    config = open_model(made).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 256)
    agree(theirs(made), ours(made))


def test_smollm2_goes_to_a_folder_and_back(smollm2, tmp_path):
    back = converted(converted(smollm2, tmp_path / "folder", "fp16"), tmp_path / "back", "F16")
    source, made = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (smollm2, back))
    assert source.keys() == made.keys()
    for name, t in source.items():
        values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float16)
        assert np.array_equal(made[name].data.astype(np.float16), values), name
    assert changed(smollm2, back) <= ROUND.keys() | {"general.file_type"}
    probe = "  12 días,\tthe  <|im_start|>user\nrest 中文 🙂"
    a, b = (Oracle(p, context=False) for p in (smollm2, back))
    assert a.tokenize(probe, special=True) == b.tokenize(probe, special=True)
    a.close(), b.close()


@pytest.mark.parametrize("target", ["gptq-8bit-32g", "awq"])
def test_a_packed_folder_is_a_source_of_ggufs(text, target, tmp_path):  # noqa: F811
    source = write_toy(tmp_path / "toy.gguf", toy_model(), T.F32)
    options = ("--calibration", text / "calibration.txt", "--samples", 4, "--seqlen", 64, "--no-eval")
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "made", "--to", target, *options)
    assert code == 0, stderr
    packed = tmp_path / "made" / target
    plain = converted(packed, tmp_path / "plain", "F32")
    agree(theirs(plain), ours(packed))
    code, _, stderr = quantkit("convert", packed, "-o", tmp_path / "again", "--to", "Q4_K_M", *options)
    assert code == 0, stderr
    oracle = Oracle(tmp_path / "again" / f"{target}-Q4_K_M.gguf")
    assert np.isfinite(oracle.logits([2, 3, 4])).all()
    oracle.close()


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_go_round(families, name, tmp_path):
    """Through blocks of 32, each expert by itself."""
    source = converted(families / f"{name}.gguf", tmp_path / "source", "Q8_0", "--no-calibration")
    folder = converted(source, tmp_path / "folder", "fp16")
    back = converted(folder, tmp_path / "back", "F32")
    agree(theirs(back), ours(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(IDS).logits[0, CTX // 2 : CTX - 1]
    assert torch.allclose(torch.log_softmax(logits, -1), ours(folder), atol=2e-4)


@pytest.fixture(scope="module")
def unstacked(families, tmp_path_factory) -> Path:
    """The Mixtral toy as files of 2023 hold it: a tensor for every expert, `blk.0.ffn_gate.3.weight`."""
    path = tmp_path_factory.mktemp("old") / "mixtral.gguf"
    source, w = gguf.GGUFReader(families / "mixtral.gguf"), gguf.GGUFWriter(path, "llama")
    for f in source.fields.values():
        if not f.name.startswith("GGUF.") and f.name != "general.architecture":
            w.add_key_value(f.name, f.contents(), f.types[0], f.types[-1])
    for t in source.tensors:
        stack = t.name.endswith("_exps.weight")
        parts = enumerate(t.data) if stack else [(None, t.data)]
        for e, data in parts:
            w.add_tensor(t.name if e is None else t.name.replace("_exps", f".{e}"), np.ascontiguousarray(data))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


def test_experts_of_old_files_are_read_as_stacks(families, unstacked, tmp_path):
    """llama.cpp no longer opens such a file: the stacked toy, which it opens, is the oracle."""
    with pytest.raises(ValueError, match="does not open"):
        Oracle(unstacked)
    old, new = open_model(unstacked), open_model(families / "mixtral.gguf")
    assert (old.config, old.tensors.keys()) == (new.config, new.tensors.keys())
    assert all(torch.equal(ref.read(), new.tensors[name].read()) for name, ref in old.tensors.items())
    agree(theirs(families / "mixtral.gguf"), ours(unstacked))
    same_tensors(converted(unstacked, tmp_path / "copied", "F32"), families / "mixtral.gguf")
    made = [converted(p, tmp_path / n, "Q8_0", "--no-calibration") for p, n in ((unstacked, "a"), (new.path, "b"))]
    same_tensors(*made)


def test_old_files_that_lack_an_expert_are_refused(unstacked, tmp_path):
    lacking = tmp_path / "lacking.gguf"
    lacking.write_bytes(unstacked.read_bytes().replace(b"blk.1.ffn_up.2.weight", b"blk.9.ffn_up.2.weight"))
    with pytest.raises(BadInput, match=r"blk\.1\.ffn_up\.2\.weight is missing"):
        open_model(lacking)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic scaling"),
        (
            {
                "rope_parameters": {
                    **{"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 0.7},
                    "original_max_position_embeddings": 320,
                }
            },
            "yarn scaling with attention_factor",
        ),
        (
            {
                "rope_parameters": {
                    **{"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16.0},
                    "original_max_position_embeddings": 320,
                }
            },
            "yarn scaling with beta_fast",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_type": [], "rope_theta": 1e4}}, "rope_type"),
        ({"num_attention_heads": 0}, "refuses this configuration"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"quantization_config": -1}, "quantization_config"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused(families, change, says, tmp_path):
    source = tmp_path / "odd"
    source.mkdir()
    for path in (families / "llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "out", "--to", "F32", "--no-eval")
    assert code == 65 and says in stderr, stderr


MIQU = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 32764,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@pytest.mark.parametrize("quantized", ["Q2_K", "Q4_K_M", "Q5_K_M"])
def test_a_miqu_comes_back_with_every_value(quantized, miqu, text, tmp_path):  # noqa: F811
    """The published model's shape, scaled down: each stop of the way has the same configuration and tokenizer."""
    source = converted(miqu, tmp_path / "source", quantized, "--no-calibration")
    fp16 = converted(source, tmp_path / "folder", "fp16")
    options = ("--calibration", text / "calibration.txt", "--samples", 2, "--seqlen", 64)
    gptq = converted(fp16, tmp_path / "packed", "gptq", *options)
    back = converted(gptq, tmp_path / "back", "F32")  # llama.cpp would round activations to F16 beside F16 weights
    for path in (miqu, source, back):
        assert open_model(path).config == MIQU
    for folder in (fp16, gptq):
        config = json.loads((folder / "config.json").read_text())
        assert config.pop("quantization_config", {}).get("quant_method") == ("gptq" if folder == gptq else None)
        assert config == MIQU | {"torch_dtype": "float16"}
    written = {"general.type", "general.size_label"}  # by every converter, but not into this toy
    assert changed(miqu, back) <= {*ROUND, *written, "general.file_type", "tokenizer.ggml.scores"}
    probe = " <s> [INST] Wer bist\tdu?  [/INST] Ich 🙂"
    a, b = (Oracle(p, context=False) for p in (miqu, back))
    assert a.tokenize(probe, True, True) == b.tokenize(probe, True, True)
    assert open_model(back).tokenizer().encode_special(probe) == a.tokenize(probe, special=True)
    a.close(), b.close()
    agree(theirs(back), ours(gptq))


@pytest.fixture(scope="module")
def miqu(tmp_path_factory) -> Path:
    """Eight query heads to a key head, Llama's sentencepiece vocabulary, rope theta 1e6, 32764 positions, untied."""
    shape = {k: v for k, v in MIQU.items() if k not in ("architectures", "model_type", "rope_theta")}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": MIQU["rope_theta"]}}
    vocab = next(p for p in fetch_source(VOCABS) if p.stem == "ggml-vocab-llama-spm")
    return write_toy(tmp_path_factory.mktemp("miqu") / "miqu.gguf", toy_model(**shape, **rope), vocab=vocab)
