"""What may be asked of GGUF targets: types, split sets, a given importance matrix; against llama.cpp and gguf-py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from test_convert import quantkit
from toy import toy_model, write_toy

from quantkit.codecs import decode, encode
from quantkit.files.gguf import read_gguf
from quantkit.files.imatrix import Imatrix, read_imatrix, write_imatrix
from quantkit.model import in_rows
from quantkit.targets.gguf_tensors import encode_rows
from quantkit.targets.target import Choices


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("source") / "Toy.F16.gguf", toy_model(), T.F16)


@pytest.fixture(scope="module")
def imatrix(source, tmp_path_factory) -> Path:
    """Made of random numbers: each matrix of the blocks has columns of very unlike importance."""
    generator = torch.Generator().manual_seed(7)
    widths = {n: t.shape[-1] for n, t in read_gguf(source).tensors.items() if n.startswith("blk.") and len(t.shape) > 1}
    sums = {n: (torch.rand(1, w, generator=generator) ** 8 * 1000).numpy() for n, w in widths.items()}
    path = tmp_path_factory.mktemp("imatrix") / "given.gguf"
    write_imatrix(path, Imatrix(sums, {n: np.array([640]) for n in sums}, ("words.txt",), 5, 128))
    return path


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def made(source: Path, out: Path, *options: object) -> dict:
    code, stdout, stderr = quantkit("convert", source, "-o", out, "--no-eval", "--json", *options)
    assert code == 0, stderr
    return json.loads(stdout)


def planned(source: Path, tmp_path: Path, *options: object) -> dict[str, str]:
    code, stdout, stderr = quantkit("convert", source, "-o", tmp_path / "x", "--dry-run", "--json", *options)
    assert code == 0, stderr
    return {t["name"]: t["type"] for t in json.loads(stdout)["outputs"][0]["tensors"]}


def test_a_split_set_is_one_product(source, tmp_path):
    """gguf-py reads every shard, llama.cpp opens the set, and our scorer does; all tensors are those of one file."""
    options = ["--to", "Q8_0", "--no-calibration"]
    record = made(source, tmp_path / "one", *options)
    whole = tmp_path / "one" / record["variants"][0]["path"]
    split = made(source, tmp_path / "set", *options, "--split-max-size", "1M")
    (variant,) = split["variants"]
    first = tmp_path / "set" / variant["path"]
    count = int(re.fullmatch(r"Toy-Q8_0/Toy-Q8_0-00001-of-(\d{5})\.gguf", variant["path"])[1])
    shards = sorted(first.parent.iterdir())
    assert len(shards) == count > 2 and sum(p.stat().st_size for p in shards) == variant["bytes"]
    assert all(p.stat().st_size <= 1_000_000 for p in shards)
    tensors = {t.name: bytes(t.data) for p in shards for t in gguf.GGUFReader(p).tensors}
    assert tensors == {t.name: bytes(t.data) for t in gguf.GGUFReader(whole).tensors}
    ids = list(range(2, 40))
    assert (Oracle(first).logits(ids) == Oracle(whole).logits(ids)).all()


def test_a_set_that_needs_no_splitting_is_one_file(source, tmp_path):
    record = made(source, tmp_path / "out", "--to", "Q8_0", "--no-calibration", "--split-max-size", "2G")
    assert record["variants"][0]["path"] == "Toy-Q8_0.gguf"


def test_a_given_importance_matrix_weighs_the_columns(source, imatrix, tmp_path):
    """The bytes are gguf-free libggml's under exactly these weights; nothing is calibrated."""
    from test_convert import ggml_bytes

    record = made(source, tmp_path / "out", "--to", "IQ3_XXS", "--imatrix", imatrix)
    assert record["calibration"] is None and not (tmp_path / "out" / "imatrix.gguf").exists()
    reader = gguf.GGUFReader(tmp_path / "out" / "Toy-IQ3_XXS.gguf")
    weights = {t.name: t.data.reshape(-1, t.data.shape[-1]).astype("f4") for t in gguf.GGUFReader(source).tensors}
    given, compared = read_imatrix(imatrix), 0
    for t in reader.tensors:
        if t.tensor_type not in (T.F32, T.F16):
            columns = given.importance(t.name) if t.name in given.sums else None
            assert bytes(t.data) == ggml_bytes(t.tensor_type, weights[t.name], columns), t.name
            compared += 1
    assert compared == 23
    keys = {k: f.contents() for k, f in reader.fields.items() if k.startswith("quantize.imatrix.")}
    assert keys == {
        "quantize.imatrix.file": "given.gguf",
        "quantize.imatrix.dataset": "words.txt",
        "quantize.imatrix.entries_count": 21,
        "quantize.imatrix.chunks_count": 5,
    }


def test_without_calibration_columns_count_alike(source, tmp_path):
    from test_convert import ggml_bytes

    made(source, tmp_path / "out", "--to", "Q4_K_M", "--no-calibration")
    reader = gguf.GGUFReader(tmp_path / "out" / "Toy-Q4_K_M.gguf")
    weights = {t.name: t.data.reshape(-1, t.data.shape[-1]).astype("f4") for t in gguf.GGUFReader(source).tensors}
    for t in reader.tensors:
        if t.tensor_type is not T.F32:
            assert bytes(t.data) == ggml_bytes(t.tensor_type, weights[t.name], None), t.name
    assert not any(k.startswith("quantize.imatrix.") for k in reader.fields)


def test_experts_are_weighed_each_by_its_own_matrix():
    generator = torch.Generator().manual_seed(1)
    stack, importance = torch.randn(3, 4, 256, generator=generator), torch.rand(3, 256, generator=generator) ** 8
    rows, cpu = in_rows(stack), torch.device("cpu")
    whole, loss = encode_rows("Q4_K", rows, 12, 256, importance, cpu)
    assert torch.equal(whole, torch.cat([encode("Q4_K", stack[i], importance[i]) for i in range(3)]))
    assert not torch.equal(whole, encode_rows("Q4_K", rows, 12, 256, None, cpu)[0])
    error = (decode("Q4_K", whole, tuple(stack.shape)) - stack).square().sum() / stack.square().sum()
    assert loss == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "Q4_K_M", "--output-type", "Q9_K"], "--output-type: no tensor type 'Q9_K'; known: "),
        (["--to", "Q4_K_M", "--tensor-type", "attn_v"], "--tensor-type: 'attn_v' is not REGEX=TYPE"),
        (["--to", "Q4_K_M", "--tensor-type", "attn_(=Q8_0"], "'attn_(' is no regular expression"),
        (["--to", "Q4_K_M", "--split-max-size", "2T"], "--split-max-size: '2T' is no size such as 2G"),
        (["--to", "Q4_K_M", "--split-max-size", "0G"], "--split-max-size: '0G' is no size"),
        (["--to", "IQ2_XS", "--no-calibration"], "IQ2_XS in IQ2_XS needs an importance matrix"),
        (["--to", "Q2_K_S", "--no-calibration"], "Q2_K in Q2_K_S needs an importance matrix"),
        (["--to", "IQ2_XS", "--imatrix", "{partly}"], "partly.gguf has no entry for it"),
        (["--to", "IQ2_XS", "--imatrix", "{imatrix}", "--pure"], "choose --output-type or --token-embedding-type"),
        (["--to", "gptq", "--no-calibration"], "gptq: needs a calibration text"),
    ],
)
def test_bad_choices_are_one_line_and_exit_2(options, says, source, imatrix, tmp_path):
    given = read_imatrix(imatrix)
    partly = tmp_path / "partly.gguf"
    few = {n: s for n, s in given.sums.items() if "blk.2" not in n}
    write_imatrix(partly, Imatrix(few, {n: given.counts[n] for n in few}, given.datasets, 5, 128))
    places = {"imatrix": imatrix, "partly": partly}
    out = tmp_path / "out"
    code, _, stderr = quantkit("convert", source, "-o", out, "--no-eval", *(o.format(**places) for o in options))
    assert code == 2 and says in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not out.exists()


def test_another_models_importance_matrix_is_refused(source, imatrix, tmp_path):
    given = read_imatrix(imatrix)
    halves = {n: s[:, : s.shape[1] // 2] for n, s in given.sums.items()}
    strangers = {f"blk.9{n}": s for n, s in given.sums.items()}
    for sums, says in ((halves, "values where the tensor has"), (strangers, "no entry for any tensor")):
        path = tmp_path / "other.gguf"
        write_imatrix(path, Imatrix(sums, {n: np.array([9]) for n in sums}, (), 1, 128))
        code, _, stderr = quantkit("convert", source, "-o", tmp_path / "x", "--to", "Q4_K_M", "--imatrix", path)
        assert code == 65 and says in stderr and not (tmp_path / "x").exists()


def test_a_recipe_says_the_same_as_the_options(source, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "to: Q4_K_M\ncalibration: null\noutput_type: Q8_0\ntoken_embedding_type: q5_k\npure: true\n"
        "tensor_type: [attn_v=Q6_K, 'blk\\.1\\.=q5_0']\n"
    )
    flags = ["--to", "Q4_K_M", "--no-calibration", "--output-type", "Q8_0", "--token-embedding-type", "Q5_K", "--pure"]
    flags += ["--tensor-type", "attn_v=Q6_K", "--tensor-type", r"blk\.1\.=Q5_0"]
    from_file = planned(source, tmp_path, "--recipe", recipe)
    assert from_file == planned(source, tmp_path, *flags)
    assert from_file["output.weight"] == "Q8_0" and from_file["token_embd.weight"] == "Q5_K"
    assert from_file["blk.1.attn_v.weight"] == "Q6_K" and from_file["blk.1.ffn_down.weight"] == "Q5_0"
    assert from_file["blk.2.ffn_down.weight"] == "Q4_K"  # pure: Q6_K by the mixture


def test_an_upcast_is_warned_about_with_its_measured_cost(source, tmp_path):
    """Q3_K up to Q4_K: gguf-py's floats of both files say the same error, and the sizes are ggml's."""
    made(source, tmp_path / "low", "--to", "Q3_K_S", "--no-calibration", "--pure")
    low = tmp_path / "low" / "Toy-Q3_K_S.gguf"
    code, stdout, stderr = quantkit(
        *("convert", low, "-o", tmp_path / "out", "--to", "Q4_K_M", "--to", "Q3_K_S", "--to", "F16", "--pure"),
        *("--no-calibration", "--no-eval", "--json", "--output-type", "Q3_K", "--leave-output"),
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    warning, exact = report["warnings"]  # what stays Q3_K is copied, plain floats lose nothing
    assert exact == (
        "Q4_K_M: Q4_0 to Q5_0 in 3 of the source's tensors ends no better than the source; costs +22% size for nothing"
    )
    assert f"warning: {warning}" in " ".join(stderr.split())
    assert warning.startswith("Q4_K_M: Q3_K to Q4_K in 19 of the source's tensors ends worse than the source")
    assert warning.endswith("costs +31% size for nothing")  # 144 bytes a block for 110
    before, after = (
        {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(p).tensors}
        for p in (low, tmp_path / "out" / "Toy-Q4_K_M.gguf")
    )
    tensors = next(v for v in report["variants"] if v["target"] == "Q4_K_M")["tensors"]
    for t in tensors:
        made_of, full = before[t["name"]], before[t["name"]].square().sum()
        assert t["loss"] == pytest.approx(((after[t["name"]] - made_of).square().sum() / full).item(), abs=1e-6)
    worst = max(tensors, key=lambda t: t["loss"])
    assert worst["loss"] > 1e-4 and f"{worst['loss']:.2g} in {worst['name']}" in warning


def test_the_lineage_says_what_is_lost(source, tmp_path):
    first = made(source, tmp_path / "low", "--to", "Q4_K_M", "--no-calibration")
    lineage = first["lineage"]
    assert (lineage["lowest_type"], lineage["bits_per_weight"], lineage["tensors"]) == ("F16", 16, 23)
    assert first["warnings"] == [] and "cannot be seen" in lineage["note"]
    second = made(tmp_path / "low" / "Toy-Q4_K_M.gguf", tmp_path / "again", "--to", "fp16")
    lineage = second["lineage"]
    assert (lineage["lowest_type"], lineage["bits_per_weight"]) == ("Q4_K", 4.5)
    assert "cannot be recovered" in lineage["note"]
    assert "of its 23 matrices as Q4_K (4.5 bits a weight)" in lineage["note"]


def test_choices_ask_for_nothing_by_default():
    assert Choices() == Choices(None, None, (), False, False, None, None)


def test_a_gguf_that_does_not_read_back_gets_no_name(monkeypatch, source, tmp_path):
    """A byte that turns on its way to the disk is found, in a file and in a folder of floats alike."""
    from quantkit.files import gguf_writer, safetensors

    def turned(write):
        def broken(self, name, raw):
            raw = raw.copy()
            raw[-1] ^= 1
            write(self, name, raw)

        return broken

    monkeypatch.setattr(gguf_writer.GGUFWriter, "write", turned(gguf_writer.GGUFWriter.write))
    monkeypatch.setattr(safetensors.FolderWriter, "write", turned(safetensors.FolderWriter.write))
    options = ["--to", "Q4_0", "--to", "fp16", "--no-calibration", "--no-eval"]
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "out", *options)
    assert code == 70, stderr
    assert "2 of 2 outputs failed: Toy-Q4_0.gguf: the tensor" in stderr
    assert "does not read back as it was written" in stderr
    assert not (tmp_path / "out").exists()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # to import it is an error from here on
from quantkit.cli import main
main()
"""


def test_a_gguf_becomes_another_and_plain_floats_without_torch(source, imatrix, tmp_path):
    """What comes of it is what comes of a process that has torch."""
    targets = ["--to", "Q4_K_M", "--to", "fp16", "--imatrix", imatrix, "--no-eval", "--device", "cpu"]
    command = [sys.executable, "-c", WITHOUT_TORCH, "convert", source, "-o", tmp_path / "alone", *targets]
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "beside", *targets)
    assert code == 0, stderr
    for name in ("Toy-Q4_K_M.gguf", "fp16/model.safetensors", "fp16/config.json", "fp16/tokenizer.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes(), name
