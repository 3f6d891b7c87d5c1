"""GPTQ and compressed-tensors folders under every option, in readers that are not ours; exact ways between grids."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file
from test_convert import quantkit
from test_forward import logits
from toy import toy_model, write_toy
from transformers import AutoModelForCausalLM

from quantkit.codecs.grid import Grid
from quantkit.errors import FormatError
from quantkit.model import open_model
from quantkit.solvers.exact import exact

CALIBRATION = ("--samples", 4, "--seqlen", 64, "--no-eval", "--device", "cpu")
SOLVED = ("gptq-4bit-64g-asym", "gptq-4bit-64g-desc", "gptq-4bit-pc", "gptq-2bit-128g", "ct-4bit-64g")
SOLVED += ("ct-4bit-64g-asym", "ct-8bit-pc", "awq-4bit-64g")


@pytest.fixture(scope="module")
def q4_1(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("q4_1") / "Toy.Q4_1.gguf", toy_model(), T.Q4_1)


@pytest.fixture(scope="module")
def made(q4_1, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("made") / "out"
    code, stdout, stderr = quantkit("convert", q4_1, "-o", out, *(f"--to={t}" for t in SOLVED), *CALIBRATION, "--json")
    assert code == 0, stderr
    return out, json.loads(stdout)


def matrices(folder: Path, part: str) -> list[str]:
    return [n.removesuffix(f".{part}") for n in load_file(folder / "model.safetensors") if n.endswith(part)]


@pytest.mark.parametrize("target", [t for t in SOLVED if t.startswith("ct")])
def test_compressed_tensors_reads_the_same_weights(made, target):
    folder = made[0] / target
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors, ours = load_file(folder / "model.safetensors"), open_model(folder)
    stems = matrices(folder, "weight_packed")
    assert len(stems) == 3 * 7
    for stem in stems:
        parts = {n.removeprefix(f"{stem}."): t for n, t in tensors.items() if n.startswith(f"{stem}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(theirs, ours.tensors[f"{stem}.weight"].read()), stem


def retyped(folder: Path, there: Path, end: str, dtype: torch.dtype) -> Path:
    """A copy of `folder` in which tensors of names that end so are of another type."""
    shutil.copytree(folder, there)
    tensors = load_file(folder / "model.safetensors")
    others = {n: t.to(dtype) if n.endswith(end) else t for n, t in tensors.items()}
    save_file(others, there / "model.safetensors", {"format": "pt"})
    return there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["gptq-4bit-pc", "awq-4bit-64g", "ct-4bit-64g"])
def test_scales_may_be_of_any_float_type(made, target, dtype, tmp_path):
    """GPTQModel writes those of AWQ in the model's own type."""
    ours = open_model(made[0] / target).tensors
    theirs = open_model(retyped(made[0] / target, tmp_path / "copy", "scale" if "ct" in target else "scales", dtype))
    for name, ref in theirs.tensors.items():
        assert torch.allclose(ref.read(), ours[name].read(), rtol=0 if dtype == torch.float32 else 2**-8, atol=0), name


@pytest.mark.parametrize(("target", "end"), [("gptq-4bit-pc", "g_idx"), ("awq-4bit-64g", "qweight")])
def test_codes_that_are_no_integers_are_refused(made, target, end, tmp_path):
    folder = retyped(made[0] / target, tmp_path / "copy", end, torch.bfloat16)
    with pytest.raises(FormatError, match=rf"\.{end} has the type BF16"):
        open_model(folder)


@pytest.mark.parametrize("target", ["ct-4bit-64g", "ct-8bit-pc"])
def test_transformers_runs_compressed_tensors_folders(made, target):
    folder, ids = made[0] / target, torch.arange(2, 42)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert torch.allclose(logits(folder, ids), theirs[:, 20:39], atol=2e-4)


@pytest.mark.parametrize("target", [t for t in SOLVED if t.startswith("gptq")])
def test_gptq_folders_say_what_they_hold(made, target):
    """Weights by the formula of the format, from config.json and the tensors alone."""
    folder = made[0] / target
    config, tensors = json.loads((folder / "quantize_config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["checkpoint_format"] == ("gptq_v2" if target.endswith("asym") else "gptq")
    bits, group_size = config["bits"], {"pc": -1, "128g": 128}.get(target.split("-")[2], 64)
    assert (bits, config["group_size"]) == (int(target[5]), group_size)
    stored = set(range(16)) if target.endswith("asym") else {2 ** (bits - 1) - 1}
    ours, shuffled = open_model(folder), 0
    for stem in matrices(folder, "qweight"):
        part = {p: tensors[f"{stem}.{p}"].numpy() for p in ("qweight", "qzeros", "scales", "g_idx")}
        shifts, top = np.arange(0, 32, bits, dtype=np.uint32), np.uint32(2**bits - 1)
        codes = part["qweight"].view(np.uint32)[:, None] >> shifts[:, None] & top
        codes = codes.reshape(-1, part["qweight"].shape[1])
        zeros = (part["qzeros"].view(np.uint32)[..., None] >> shifts & top).reshape(len(part["qzeros"]), -1)
        assert set(zeros.flatten().tolist()) <= stored
        zero, group = zeros.astype(np.int32) + (config["checkpoint_format"] == "gptq"), part["g_idx"]
        weight = (codes.astype(np.int32) - zero[group]) * part["scales"].astype(np.float32)[group]
        assert np.array_equal(weight.T, ours.tensors[f"{stem}.weight"].read().numpy()), stem
        shuffled += bool((np.diff(group) < 0).any())
        assert len(set(np.bincount(group).tolist())) == 1
    assert shuffled == (21 if target.endswith("desc") else 0)


@pytest.fixture(scope="module")
def mixed(q4_1, tmp_path_factory) -> Path:
    """Two folders of 4 bits, in which some matrices have 8, and those of one layer 3."""
    home = tmp_path_factory.mktemp("mixed")
    layers = "{'*.2.*.down_proj': {bits: 3}, '*.down_proj': {bits: 8}, '*.v_proj.weight': {bits: 8}}"
    (home / "recipe.yaml").write_text(f"to: [gptq-4bit-64g, ct-4bit-64g]\nlayers: {layers}\n")
    code, _, stderr = quantkit("convert", q4_1, "-o", home / "out", "--recipe", home / "recipe.yaml", *CALIBRATION)
    assert code == 0, stderr
    assert "7 matrices" not in stderr and "1 matrices with 3 bits, 5 matrices with 8 bits" in stderr
    return home / "out"


def bits_asked(module: str) -> int:
    if module.endswith("down_proj"):
        return 3 if ".2." in module else 8
    return 8 if module.endswith("v_proj") else 4


def test_each_matrix_has_the_bits_that_a_recipe_gives_it(mixed):
    tensors = load_file(mixed / "gptq-4bit-64g" / "model.safetensors")
    for stem in matrices(mixed / "gptq-4bit-64g", "qweight"):
        codes, groups = tensors[f"{stem}.qweight"], tensors[f"{stem}.g_idx"]
        assert 32 * len(codes) == bits_asked(stem) * len(groups), stem
    dynamic = json.loads((mixed / "gptq-4bit-64g" / "quantize_config.json").read_text())["dynamic"]
    assert [(re.fullmatch(r"\+:\^(.*)\$", regex)[1], own) for regex, own in dynamic.items()] == [
        (r"model\.layers\.(?:2)\.mlp\.down_proj", {"bits": 3}),
        (r"model\.layers\.(?:0|1|2)\.self_attn\.v_proj", {"bits": 8}),
        (r"model\.layers\.(?:0|1)\.mlp\.down_proj", {"bits": 8}),
    ]
    weights = open_model(mixed / "gptq-4bit-64g").tensors
    assert {r.type for n, r in weights.items() if "down_proj" in n} == {"GPTQ-3bit", "GPTQ-8bit"}


def test_transformers_runs_a_folder_of_mixed_bits(mixed):
    folder, ids = mixed / "ct-4bit-64g", torch.arange(2, 42)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert torch.allclose(logits(folder, ids), theirs[:, 20:39], atol=2e-4)


def test_rules_of_bits_are_held_against_the_matrices(q4_1, tmp_path):
    for rule, says in (("*.down_prj: {bits: 8}", "matches no tensor"), ("x: {bits: 5}", "bits"), ("x: {}", "give a")):
        (tmp_path / "r.yaml").write_text(
            f"to: gptq\nlayers: {{'{rule.partition(':')[0]}': {rule.partition(':')[2]}}}\n"
        )
        code, _, stderr = quantkit("convert", q4_1, "-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml")
        assert code == 2 and says in stderr, stderr
    (tmp_path / "r.yaml").write_text("to: Q4_K_M\nlayers: {'*': {bits: 8}}\n")
    code, _, stderr = quantkit("convert", q4_1, "-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml")
    assert code == 2 and "no target has bits" in stderr


def test_every_solved_layer_is_in_the_log(made):
    out, report = made
    rows = [line.split(",") for line in (out / "layers.csv").read_text().splitlines()]
    found_how = ["loss_rounded", "loss", "damp", "order", "fallback", "block_left"]
    assert rows[0] == ["target", "tensor", "solver", *found_how, "seconds"]
    assert len(rows) == 1 + len(SOLVED) * 21
    for variant in report["variants"]:
        solved = [t for t in variant["tensors"] if t["solver"] in ("gptq", "awq")]
        assert len(solved) == 21 and all(t["loss"] < t["loss_rounded"] and t["fallback"] is None for t in solved)


def test_the_layer_whose_statistics_overflow_is_named(tmp_path):
    """Weights that fp16 holds, and an MLP whose activations are finite in float32 while their squares are not."""
    model = toy_model()
    with torch.no_grad():
        block = model.model.layers[1]
        block.post_attention_layernorm.weight.mul_(4e4)
        block.mlp.gate_proj.weight.mul_(2e5)
        block.mlp.up_proj.weight.mul_(2e5)
    source = write_toy(tmp_path / "Toy.Q4_1.gguf", model, T.Q4_1)
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "out", "--to", "gptq", *CALIBRATION)
    assert code == 65 and "model.layers.1.mlp.down_proj.weight: the calibration statistics are not finite" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "bits"), [(T.Q4_0, 4), (T.Q8_0, 8)])
def test_blocks_go_over_exactly_and_back(tmp_path, kind, bits):
    """Q4_0 and Q8_0 to 4 and 8 bits and back, uncalibrated: gguf-py reads the same floats at both ends."""
    source = write_toy(tmp_path / f"Toy.{kind.name}.gguf", toy_model(), kind)
    targets = [f"gptq-{bits}bit-32g", f"ct-{bits}bit-32g", f"ct-{bits}bit-32g-asym", "gptq-8bit-16g"]
    options = ("--no-calibration", "--no-eval", "--json")
    everything = (*(f"--to={t}" for t in targets), *options)
    code, stdout, stderr = quantkit("convert", source, "-o", tmp_path / "out", *everything)
    assert code == 0, stderr
    before = open_model(source)
    assert all("21 of 21 matrices taken over exactly" in v["note"] for v in json.loads(stdout)["variants"])
    for target in targets:
        after = open_model(tmp_path / "out" / target)
        for name, ref in before.tensors.items():
            if "_proj" in name:
                assert torch.equal(after.tensors[name].read(), ref.read()), (target, name)
    floats = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source).tensors}
    for target in targets[:2]:
        out = tmp_path / f"back-{target}"
        code, _, stderr = quantkit("convert", tmp_path / "out" / target, "-o", out, "--to", kind.name, *options)
        assert code == 0, stderr
        for t in gguf.GGUFReader(out / f"{target}-{kind.name}.gguf").tensors:
            if t.tensor_type == kind and t.name.startswith("blk"):
                assert np.array_equal(gguf.quants.dequantize(t.data, t.tensor_type), floats[t.name]), t.name


def test_the_plan_offers_the_exact_way(tmp_path, q4_1):
    q4_0 = write_toy(tmp_path / "Toy.Q4_0.gguf", toy_model(), T.Q4_0)
    offer = "gptq-4bit-32g would hold the source's Q4_0 exactly"
    for source, says in ((q4_0, offer), (q4_1, "Q4_1 blocks have a real minimum")):
        code, stdout, _ = quantkit("convert", source, "-o", tmp_path / "x", "--to", "gptq", "--dry-run")
        assert code == 0 and says in stdout


def test_exact_finds_any_scale_and_refuses_the_rest():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 7, (50, 64), generator=g).float()  # never at the grid's end
    scales = (torch.randn(50, 2, generator=g) * 0.01).half().float()
    weight = (codes.view(50, 2, 32) * scales[..., None]).flatten(1)
    weight[3] = 0
    found = exact(weight, Grid(4, 32))
    assert found is not None and torch.equal(found.dequantize(), weight)
    assert exact(weight + 1e-4, Grid(4, 32)) is None


TRAPPED = {  # targets by the solver that is asked for
    "": "fp16 gptq-4bit-64g gptq-3bit-64g-asym gptq-4bit-64g-desc gptq-4bit-pc awq-4bit-64g ct-4bit-64g Q4_K_M Q6_K"
    " Q8_0 IQ4_XS Q4_0 Q5_1",
    "gptq": "awq-4bit-64g ct-4bit-64g-asym Q3_K_M Q4_K_M Q4_0 Q5_1 IQ4_XS",
    "awq+gptq": "gptq-4bit-64g gptq-4bit-64g-asym-desc awq-4bit-64g ct-4bit-64g",
}


@pytest.mark.parametrize("solver", TRAPPED)
def test_the_traps_of_an_old_file(tmp_path, solver):
    """All-zero groups, dead channels and outliers near fp16's end: finite weights and sane scores everywhere."""
    model = toy_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, 32:64] = 0
            layer.mlp.down_proj.weight[5] = 0
            layer.self_attn.v_proj.weight[:, :128] = 0
            layer.input_layernorm.weight[7] = 0  # a channel that no matrix ever sees
            layer.mlp.gate_proj.weight[3, 11] = 40000.0
            layer.post_attention_layernorm.weight[11] = 1e-4
    source = write_toy(tmp_path / "Trap.Q2_K.gguf", model, T.Q8_0)
    targets = TRAPPED[solver].split()
    options = ("--samples", 8, "--seqlen", 64, "--eval-chunks", 2, "--device", "cpu", "--json")
    everything = (*(f"--to={t}" for t in targets), *options, *(("--solver", solver) if solver else ()))
    code, stdout, stderr = quantkit("convert", source, "-o", tmp_path / "out", *everything)
    assert code == 0, stderr
    report = json.loads(stdout)
    assert [v["target"] for v in report["variants"]] == targets
    for v in report["variants"]:
        assert v["perplexity"] < 1.5 * report["source"]["perplexity"], v["target"]
        weights = open_model(tmp_path / "out" / v["path"]).tensors
        assert all(bool(torch.isfinite(ref.read()).all()) for ref in weights.values())
        solved = {t["solver"] for t in v["tensors"]}
        assert not solver or solver in solved, v["target"]
