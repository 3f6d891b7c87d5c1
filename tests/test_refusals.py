"""What cannot be done is one line and a status of its own, and what was there stands."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from unittest import mock

import numpy as np
import pytest
from test_convert import made, options, quantkit, source, text  # noqa: F401 (fixtures)
from toy import toy_model, write_toy

from quantkit.cli import main
from quantkit.files.imatrix import Imatrix, write_imatrix


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["convert", "{missing}", "-o", "{out}", "--to", "fp16"], 65, "no such file or folder"),
        (["convert", "{empty}", "-o", "{out}", "--to", "fp16"], 65, "no model in this folder"),
        (["convert", "{truncated}", "-o", "{out}", "--to", "fp16"], 65, "truncated"),
        (["convert", "{mamba}", "-o", "{out}", "--to", "fp16"], 65, "architecture 'mamba' is not supported"),
        (["convert", "{imatrix}", "-o", "{out}", "--to", "fp16"], 65, "holds an importance matrix, and no model"),
        (["convert", "{source}", "-o", "{out}", "--to", "int5"], 2, "unknown target 'int5'"),
        (["convert", "{source}", "-o", "{out}"], 2, "--to: field required"),
        (["convert", "{source}", "-o", "{out}", "--to", "fp16", "--to", "FP16"], 2, "named twice"),
        (["convert", "{source}", "-o", "{out}", "--to", "gptq-4bit-512g"], 2, "no multiple of 512; use group size 128"),
        (["convert", "{source}", "-o", "{out}", "--to", "awq-3bit-64g"], 2, "AWQ GEMM is 4-bit"),
        (["convert", "{source}", "-o", "{out}", "--to", "gptq-4bit-0g"], 2, "no reader takes this"),
        (["convert", "{source}", "-o", "{out}", "--target-bpw", "inf"], 2, "--target-bpw"),
        (["convert", "{source}", "-o", "{out}", "--target-bpw", "0"], 2, "--target-bpw: input should be greater"),
        (["convert", "{source}", "-o", "{full}", "--to", "fp16"], 2, "not empty: it holds mine.txt"),
        (["convert", "{source}", "-o", "{full}/mine.txt/x", "--to", "fp16"], 2, "mine.txt"),
        (["inspect", "{pipe}"], 65, "not a regular file"),
        (["inspect", "{pickled}"], 65, "pickled weights (.bin) are not read"),
        (["imatrix", "{source}", "-o", "{full}/none/x.gguf"], 2, "there is no such folder to write in"),
        (["imatrix", "{source}", "-o", "{full}/mine.txt"], 2, "it exists already"),
        (["convert", "{source}", "-o", "{out}", "--to", "gptq", "--calibration", "{text}"], 2, "the same text"),
        (["convert", "{source}", "-o", "{out}", "--to", "gptq", "--device", "cuda:9"], 2, "has no cuda:9"),
        (["convert", "{source}", "-o", "{out}", "--to", "fp16", "--pure"], 2, "--pure: is for GGUF targets"),
        (["convert", "{source}", "-o", "{out}", "--to", "Q8_0", "--solver", "gptq"], 2, "is solved by gptq"),
        (["convert", "{source}", "-o", "{out}", "--to", "Q8_0", "--tensor-type", "ffn_dwn=F16"], 2, "it: ffn_down"),
        (["imatrix", "{imatrix}", "--show", "--merge"], 2, "--show: shows what there is"),
        (["perplexity", "{source}", "--limit", "3"], 2, "--limit: has no part in what is scored"),
        (["perplexity", "{source}", "--tasks", "arc_easy", "--text", "{text}"], 2, "--text: has no part"),
        (["perplexity", "{source}", "--text", "{missing}"], 65, "no such text file"),
        (["perplexity", "{source}", "--text", "{short}"], 65, "tokens"),
        (["inspect", "{truncated}"], 65, "truncated"),
        (["--bogus"], 2, "No such option"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(args, code, says, source, text, tmp_path):  # noqa: F811
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes()[:-1000])
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").touch()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (pickled / "config.json").write_text(json.dumps(config))
    (tmp_path / "short.txt").write_text("the rest")
    sums = {"blk.0.attn_q.weight": np.ones((1, 384), np.float32)}
    imatrix = Imatrix(sums, dict.fromkeys(sums, np.array([1])), ("text",), 1, 512)
    write_imatrix(tmp_path / "imatrix.gguf", imatrix)
    places = {
        "missing": tmp_path / "nothing.gguf",
        "empty": tmp_path / "empty",
        "truncated": cut,
        "mamba": write_toy(tmp_path / "mamba.gguf", toy_model(), arch="mamba"),
        "source": source,
        "out": tmp_path / "out",
        "full": full,
        "pipe": tmp_path / "pipe",
        "pickled": pickled,
        "imatrix": tmp_path / "imatrix.gguf",
        "text": text / "evaluation.txt",
        "short": tmp_path / "short.txt",
    }
    status, stdout, stderr = quantkit(
        *(a.format(**places) for a in args), *(["--eval-text", places["text"]] if args[0] == "convert" else [])
    )
    assert (status, stdout) == (code, "")
    assert says in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not (tmp_path / "out").exists() and [p.name for p in full.iterdir()] == ["mine.txt"]


def test_capitals_tell_two_targets_apart(source, tmp_path):  # noqa: F811
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "out", "--to", "BF16", "--to", "bf16", "--no-eval")
    assert code == 0 and (tmp_path / "out" / "bf16" / "config.json").is_file(), stderr


def test_a_source_is_not_replaced_by_what_is_made_of_it(made):  # noqa: F811
    folder = made[0] / "fp16"
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    code, _, stderr = quantkit("convert", folder, "-o", made[0], "--to", "fp16", "--no-eval", "--force")
    assert code == 2 and "is the source itself" in stderr
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_cache_folder_that_cannot_be_made_costs_nothing_but_time(source, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "out", "--to", "fp16", "--no-eval")
    assert code == 0 and (tmp_path / "out" / "report.json").is_file(), stderr


def test_a_terminal_that_cannot_spell_a_sign_gets_a_question_mark(source, text):  # noqa: F811
    told = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # Windows where output is redirected: ± it has, Δ not
    command = ["perplexity", source, "--text", text / "evaluation.txt", "--chunks", 1, "--reference", source]
    with redirect_stdout(told), mock.patch("sys.argv", ["quantkit", *map(str, command)]):
        with pytest.raises(SystemExit) as end:
            main()
        told.flush()
    said = told.buffer.getvalue().decode("cp1252")
    assert not end.value.code and "±" in said and "?p mean" in said


def test_what_has_no_output_to_tell_on_is_done_all_the_same(source):  # noqa: F811
    closed = [sys.executable, "-m", "quantkit", "inspect", str(source)]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *closed], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
