"""The whole conversion of a toy: every output against a reader or an encoder that is not ours."""

from __future__ import annotations

import ctypes
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from toy import toy_model, write_toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import files
from quantkit.cli import main
from quantkit.codecs import ggml
from quantkit.files.imatrix import read_imatrix
from quantkit.model import open_model

TARGETS = ("fp16", "gptq", "gptq-8bit-32g", "gptq-3bit-64g", "awq", "Q8_0", "Q4_K_M", "IQ4_XS", "F16")
VARIANT_KEYS = {
    "target",
    "format",
    "path",
    "bytes",
    "bits_per_weight",
    "perplexity",
    "stderr",
    "delta_ln_ppl",
    "kl_divergence",
    "same_top",
    "verified",
    "seconds",
}


def quantkit(*args: object) -> tuple[int, str, str]:
    """Run the command line: status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.argv", ["quantkit", *map(str, args)]):
        try:
            main()
        except SystemExit as e:
            return int(e.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("the command line ends with a status")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Words the toy's vocabulary spells byte by byte: enough for calibration and, from another seed, for scoring."""
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("calibration", 1), ("evaluation", 2)):
        rng = np.random.default_rng(seed)
        words = ["".join(rng.choice(list("etaoinshrdlu"), size=rng.integers(2, 9))) for _ in range(2500)]
        (folder / f"{name}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("source") / "Toy.Q8_0.gguf", toy_model(), T.Q8_0)


@pytest.fixture(scope="module")
def options(source, text) -> list[object]:
    shared = ["--calibration", text / "calibration.txt", "--eval-text", text / "evaluation.txt"]
    return [source, *shared, "--samples", 16, "--seqlen", 128, "--eval-chunks", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def made(options, tmp_path_factory) -> tuple[Path, dict]:
    """The output folder and the report of one conversion to every kind of target."""
    out = tmp_path_factory.mktemp("made") / "out"
    code, stdout, stderr = quantkit("convert", *options, "-o", out, *(f"--to={t}" for t in TARGETS), "--json")
    assert code == 0, stderr
    return out, json.loads(stdout)


def test_the_report_keeps_its_contract(made):
    out, report = made
    assert json.loads((out / "report.json").read_text()) == report
    assert [v["target"] for v in report["variants"]] == list(TARGETS)
    for v in report["variants"]:
        assert v.keys() >= VARIANT_KEYS and v["verified"] is True
        assert v["kl_divergence"].keys() >= {"mean", "stderr", "median", "p99", "max"}
        path = out / v["path"]
        size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.iterdir())
        assert size == v["bytes"]
    assert report["source"]["perplexity"] > 1 and report["source"]["sha256"]
    assert report["calibration"]["rows"] == 16 and report["evaluation"]["sha256"]


def test_outputs_rank_as_their_bits_do(made):
    kl = {v["target"]: v["kl_divergence"]["mean"] for v in made[1]["variants"]}
    assert kl["fp16"] < 1e-5 and kl["Q8_0"] == pytest.approx(0, abs=1e-6)  # the source is Q8_0: copied
    assert kl["gptq-8bit-32g"] < 1e-5  # a grid that holds Q8_0 exactly
    assert kl["fp16"] < kl["gptq"] < kl["gptq-3bit-64g"]


def test_the_dry_run_says_what_then_happens(made, options, tmp_path):
    code, stdout, _ = quantkit(
        "convert", *options, "-o", tmp_path / "x", *(f"--to={t}" for t in TARGETS), "--dry-run", "--json"
    )
    plan = json.loads(stdout)
    assert code == 0 and not (tmp_path / "x").exists()
    assert {o["target"]: o["bytes"] for o in plan["outputs"]} == {v["target"]: v["bytes"] for v in made[1]["variants"]}
    assert plan["disk_bytes"] == sum(o["bytes"] for o in plan["outputs"])
    assert plan["peak_ram_bytes"] > 0 and plan["peak_vram_bytes"] == 0
    types = {t["name"]: t["type"] for o in plan["outputs"] if o["target"] == "Q4_K_M" for t in o["tensors"]}
    reader = gguf.GGUFReader(made[0] / "Toy-Q4_K_M.gguf")
    assert types == {t.name: t.tensor_type.name for t in reader.tensors}


def test_transformers_opens_the_fp16_folder(made, source):
    folder = made[0] / "fp16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = open_model(source)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, reference.tensors[name].read().half().float()), name
    ids = AutoTokenizer.from_pretrained(folder)("the rest", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)


def ggml_bytes(kind: T, rows: np.ndarray, importance: np.ndarray | None) -> bytes:
    """What libggml's own `ggml_quantize_chunk` makes of float rows, in one call."""
    lib, rows = ctypes.CDLL(str(ggml.find())), np.ascontiguousarray(rows, dtype=np.float32)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    out = ctypes.create_string_buffer(rows.size // block * nbytes)
    pointer = [a if a is None else np.ascontiguousarray(a).ctypes.data_as(ctypes.c_void_p) for a in (rows, importance)]
    lib.ggml_quantize_chunk(int(kind), pointer[0], out, ctypes.c_int64(0), *map(ctypes.c_int64, rows.shape), pointer[1])
    return out.raw


def test_ggml_writes_the_same_bytes_from_the_same_floats(made, source):
    """Q4_K_M and IQ4_XS, tensor by tensor: gguf-py decodes the source, libggml's own function encodes it."""
    out, _ = made
    floats = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source).tensors}
    present = {t.name: (t.tensor_type, bytes(t.data)) for t in gguf.GGUFReader(source).tensors}
    imatrix = read_imatrix(out / "imatrix.gguf")
    compared = 0
    for name in ("Toy-Q4_K_M.gguf", "Toy-IQ4_XS.gguf"):
        for t in gguf.GGUFReader(out / name).tensors:
            kind, raw = t.tensor_type, bytes(t.data)
            if (kind, raw) == present[t.name]:
                continue
            weights = imatrix.importance(t.name) if t.name in imatrix.sums else None
            assert raw == ggml_bytes(kind, floats[t.name], weights), (name, t.name)
            compared += 1
    assert compared > 30


def test_what_fits_is_copied_byte_for_byte(made, source):
    before = {t.name: bytes(t.data) for t in gguf.GGUFReader(source).tensors}
    after = {t.name: bytes(t.data) for t in gguf.GGUFReader(made[0] / "Toy-Q8_0.gguf").tensors}
    assert before == after


@pytest.mark.parametrize("name", ["Toy-Q8_0.gguf", "Toy-Q4_K_M.gguf", "Toy-IQ4_XS.gguf", "Toy-F16.gguf"])
def test_llama_cpp_opens_the_files_and_agrees(made, name):
    path = made[0] / name
    ids = torch.randint(2, 320, (64,), generator=torch.Generator().manual_seed(3))
    theirs = torch.from_numpy(Oracle(str(path)).logits(ids.tolist()))
    from test_forward import logits

    ours = logits(path, ids[None])[0]
    p, q = torch.log_softmax(theirs[32:63], -1), torch.log_softmax(ours, -1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.01  # its CPU kernels run on 8-bit activations


def test_perplexity_reads_every_format_alike(made, text):
    out, report = made
    for v in report["variants"]:
        code, stdout, stderr = quantkit(
            "perplexity", out / v["path"], "--text", text / "evaluation.txt", "--chunks", 4, "--json"
        )
        assert code == 0, stderr
        assert json.loads(stdout)["perplexity"] == pytest.approx(v["perplexity"], rel=1e-5), v["target"]


def test_perplexity_against_a_reference(made, text, source):
    out, report = made
    variant = next(v for v in report["variants"] if v["target"] == "awq")
    _, stdout, _ = quantkit(
        *("perplexity", out / "awq", "--reference", source, "--text", text / "evaluation.txt", "--chunks", 4, "--json")
    )
    score = json.loads(stdout)
    assert score.keys() >= {"perplexity", "stderr", "tokens", "chunks", "ctx", "same_top", "delta_ln_ppl"}
    assert (score["chunks"], score["ctx"], score["tokens"]) == (4, 512, 2048)
    assert score["kl_divergence"]["mean"] == pytest.approx(variant["kl_divergence"]["mean"], rel=1e-3)


def test_a_folder_is_a_source_too(made, text, tmp_path):
    code, stdout, stderr = quantkit(
        *("convert", made[0] / "fp16", "-o", tmp_path / "again", "--to", "gptq", "--samples", 4, "--seqlen", 64),
        *("--calibration", text / "calibration.txt", "--no-eval", "--json"),
    )
    assert code == 0, stderr
    assert json.loads(stdout)["variants"][0]["perplexity"] is None
    assert (tmp_path / "again" / "gptq" / "quantize_config.json").is_file()


def test_force_replaces_and_leaves_the_rest(made, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "fp16").mkdir()
    (out / "fp16" / "stale.bin").write_text("stale")
    code, _, stderr = quantkit("convert", source, "-o", out, "--to", "fp16", "--no-eval", "--force")
    assert code == 0, stderr
    assert (out / "mine.txt").exists() and not (out / "fp16" / "stale.bin").exists()
    assert sorted(p.name for p in out.iterdir()) == ["fp16", "mine.txt", "report.json"]


def test_an_output_that_does_not_read_back_gets_no_name(monkeypatch, options, tmp_path):
    from quantkit.codecs.packed import pack_gptq
    from quantkit.targets import gptq

    def broken(q, bits, v2):
        parts = pack_gptq(q, bits, v2)
        parts["qweight"][0, 0] ^= 1
        return parts

    monkeypatch.setattr(gptq, "pack_gptq", broken)
    out = tmp_path / "out"
    code, _, stderr = quantkit("convert", *options, "-o", out, "--to", "gptq", "--to", "Q8_0")
    assert code == 70 and "does not read back" in stderr
    assert {p.name for p in out.iterdir() if p.suffix in (".gguf", ".csv") or p.is_dir()} == {"Toy-Q8_0.gguf"}
    assert [v["target"] for v in json.loads((out / "report.json").read_text())["variants"]] == ["Q8_0"]


def test_a_full_disk_leaves_nothing(source, tmp_path):
    """The system's limit on a file's size stands in for a full disk: writes fail in the same way."""
    out = tmp_path / "out"
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "sys.argv[0] = 'quantkit'; from quantkit.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "convert", source, "-o", out, "--to", "fp16", "--no-eval"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert "no more room" in done.stderr and "run the same command again" in done.stderr
    assert not out.exists()


def test_too_little_room_is_said_before_anything_is_done(monkeypatch, source, tmp_path):
    monkeypatch.setattr(files.atomic, "free_bytes", lambda path: 1000)
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "out", "--to", "fp16", "--no-eval")
    assert code == 75 and "1,000 are free" in stderr and not (tmp_path / "out").exists()


def test_a_terminated_run_leaves_nothing(options, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "quantkit", "convert", *options, "-o", out, "--to", "gptq"]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "solving" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and (not out.exists() or not os.listdir(out))


def test_the_version_is_told():
    assert quantkit("--version") == (0, f"quantkit {version('gguf-quantkit')}\n", "")


def test_the_installed_command_shows_its_exit_codes():
    done = subprocess.run([sys.executable, "-m", "quantkit"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "65 bad input" in " ".join(done.stdout.split())
