"""`quantkit compare`: order, ties, the Pareto front, broken files; by closed form, and on toys."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as T
from rich.console import Console
from test_convert import quantkit
from test_scoring import CTX, place  # noqa: F401  (a fixture)
from toy import permuted, toy_model, write_toy

from quantkit.cli.compare import show
from quantkit.compare import Candidate, as_csv, as_markdown, broken, cells, compare
from quantkit.evaluate import Positions, summary

N = 400


def made(name: str, kl: torch.Tensor, nbytes: int, bits: float = 4.5, top: float = 0.9) -> Candidate:
    """A candidate with these divergences; its losses are the reference's and what KL adds."""
    base = torch.full((N,), 2.0, dtype=torch.float64)
    same = torch.arange(N) < top * N
    score = summary(Positions(base + kl, base, kl.double(), same), 4, 512)
    return Candidate(name, Path(name), "gguf", nbytes, bits, bits, score)


def noise(seed: int) -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_stand_by_kl_and_the_front_holds_what_no_smaller_file_matches():
    shared = noise(0)
    rows = compare(
        [
            made("big-worse", 0.3 + 0.1 * shared, 900),
            made("small", 0.2 + 0.1 * shared, 500),
            made("best", 0.01 * shared, 1000),
            made("tiny", 0.9 + 0.1 * shared, 100),
        ]
    )
    assert [(r.candidate.name, r.rank, r.front) for r in rows] == [
        ("best", 1, True),
        ("small", 2, True),
        ("big-worse", 3, False),
        ("tiny", 4, True),
    ]
    assert not any(r.ties for r in rows)


def test_differences_inside_the_paired_error_are_ties():
    """Unpaired, both pairs would overlap: the spread of a variant's KL is far wider than what sets two apart."""
    wide = noise(1) * 0.5
    a, copy = made("a", wide, 700), made("copy", wide.clone(), 700)
    jitter = made("jitter", wide + 0.05 * (noise(2) - noise(3)), 800)
    worse = made("worse", wide + 0.004, 600)
    rows = {r.candidate.name: r for r in compare([worse, jitter, copy, a])}
    assert set(rows["a"].ties) == {"copy", "jitter"} and rows["worse"].ties == ()
    assert rows["a"].rank == rows["copy"].rank == rows["jitter"].rank == 1 and rows["worse"].rank == 4
    assert rows["a"].front and rows["copy"].front and rows["worse"].front
    assert not rows["jitter"].front, "a smaller file is as good"


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (made("nan", torch.full((N,), math.nan, dtype=torch.float64), 1), "not finite"),
        (made("ppl", torch.full((N,), 2.4, dtype=torch.float64), 1), "times the reference"),
        (made("top", torch.full((N,), 0.5, dtype=torch.float64), 1, top=0.2), "top tokens"),
        (made("bits", torch.full((N,), 0.05, dtype=torch.float64), 1, bits=8.5), "bits cost"),
        (made("fine", torch.full((N,), 0.05, dtype=torch.float64), 1), None),
    ],
)
def test_what_no_rounding_does_is_broken(candidate, said):
    reason = broken(candidate)
    assert (reason is None) if said is None else said in reason
    row = compare([candidate, made("other", noise(4) * 0.1, 5)])[-1]
    assert (row.rank is None and not row.front) or said is None


def run(*args: object) -> dict:
    code, stdout, stderr = quantkit("compare", *args, "--ctx", CTX, "--chunks", 6, "--device", "cpu", "--json")
    assert code == 0, stderr
    return json.loads(stdout)


def test_two_copies_tie_and_broken_files_are_flagged(place, tmp_path):  # noqa: F811
    source = place / "source.gguf"
    for name in ("copy-1.gguf", "copy-2.gguf"):
        write_toy(tmp_path / name, toy_model(), T.F16)
    write_toy(tmp_path / "rope.gguf", toy_model(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    lost = toy_model()
    with torch.no_grad():  # the rows of one projection as if the converter had not put them in order
        for layer in lost.model.layers:
            w = layer.self_attn.q_proj.weight
            w.copy_(torch.from_numpy(permuted(w.numpy(), 8)))
    write_toy(tmp_path / "permutation.gguf", lost)
    files = [tmp_path / f"{n}.gguf" for n in ("rope", "copy-1", "permutation", "copy-2")]
    record = run(*files, place / "changed.gguf", "--reference", source, "--text", place / "a.txt")
    rows = {r["name"]: r for r in record["rows"]}
    assert rows["copy-1.gguf"]["ties"] == ["copy-2.gguf"] and not rows["copy-1.gguf"]["broken"]
    assert rows["copy-1.gguf"]["rank"] == rows["copy-2.gguf"]["rank"]
    for name in ("rope.gguf", "permutation.gguf"):
        assert rows[name]["broken"] and rows[name]["rank"] is None and not rows[name]["pareto"]
    assert [r["name"] for r in record["rows"]][-2:] == ["permutation.gguf", "rope.gguf"]


def test_the_reference_is_the_largest_where_none_is_named(place):  # noqa: F811
    record = run(place / "changed-q8.gguf", place / "source.gguf", "--text", place / "a.txt")
    assert record["reference"]["path"].endswith("source.gguf") and len(record["rows"]) == 1
    status, _, stderr = quantkit("compare", place / "source.gguf", "--text", place / "a.txt")
    assert status == 2 and "--reference" in stderr


def test_a_folder_is_compared_with_its_source(place, tmp_path):  # noqa: F811
    shutil.copy(place / "source.gguf", tmp_path / "source.gguf")
    options = ("--no-calibration", "--eval-text", place / "a.txt", "--eval-chunks", 1, "--device", "cpu")
    code, _, stderr = quantkit(
        "convert", tmp_path / "source.gguf", "-o", tmp_path / "out", "--to", "Q8_0", "--to", "F16", *options
    )
    assert code == 0, stderr
    record = run(tmp_path / "out", place / "changed.gguf", "--engine", "llama.cpp")
    assert {r["name"] for r in record["rows"]} == {"Q8_0", "F16", "changed.gguf"}
    assert record["texts"][0]["name"] == "a" and record["reference"]["path"] == str(tmp_path / "source.gguf")
    q8 = next(r for r in record["rows"] if r["name"] == "Q8_0")
    assert (
        q8["tokenizer"]["equal"] and 0 < q8["runtime"]["kl_divergence"]["mean"] < q8["as_run"]["kl_divergence"]["max"]
    )


def test_a_long_name_is_folded_and_no_figure_beside_it(monkeypatch):
    name = "A-Model-Of-Many-Words-And-A-Number-70B-Instruct-v0.3-Q4_K_M.gguf"
    rows = compare([made(name, 0.1 * noise(5), 10**9), made("copy", 0.1 * noise(5), 10**9)])
    monkeypatch.setattr("quantkit.cli.compare.out", Console(width=120, file=(text := io.StringIO()), highlight=False))
    show(rows, "a title")
    table = text.getvalue().partition("a tie with")[0]
    assert "…" not in table and all(part in table for row in rows for part in cells(row)[2:-1])


def test_csv_and_markdown_hold_every_row(place):  # noqa: F811
    rows = compare([made("a", 0.1 * noise(5), 10), made("b", 0.3 + 0.1 * noise(6), 20)])
    parsed = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [r["name"] for r in parsed] == ["a", "b"] and float(parsed[0]["kl"]) == rows[0].record()["kl_divergence"][
        "mean"
    ]
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    options = ("--text", place / "a.txt", "--ctx", CTX, "--chunks", 2, "--device", "cpu")
    for how, head in (("--csv", "rank,name"), ("--markdown", "|  | variant")):
        code, stdout, _ = quantkit(
            "compare", place / "changed.gguf", "--reference", place / "source.gguf", *options, how
        )
        assert code == 0 and stdout.startswith(head), stdout
    code, stdout, _ = quantkit("compare", place / "changed.gguf", "--reference", place / "source.gguf", *options)
    assert code == 0 and "Against source.gguf on a: 2 chunks" in stdout
    status, _, stderr = quantkit("compare", place / "changed.gguf", "--csv", "--json")
    assert status == 2 and "choose one" in stderr
