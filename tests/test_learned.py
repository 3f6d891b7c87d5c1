"""`--solver learned`: ranges alone move, blocks come nearer to the source's, every format reads back as it was made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file
from test_convert import quantkit
from toy import toy_model, write_toy

from quantkit import plan
from quantkit.codecs import encode, lookup
from quantkit.codecs.grid import Grid
from quantkit.codecs.sharing import all_at_once, in_two
from quantkit.errors import Resumable
from quantkit.journal import Journal
from quantkit.model import open_model
from quantkit.prefix import Inputs
from quantkit.solvers.ladder import Encoded
from quantkit.solvers.learned import Ranged, learn
from quantkit.solvers.rtn import rtn
from quantkit.targets import Solved

CALIBRATION = ("--samples", 4, "--seqlen", 64, "--no-eval", "--device", "cpu")


@pytest.fixture(scope="module")
def q8_0(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("q8_0") / "Toy.Q8_0.gguf", toy_model(), T.Q8_0)


def made(source: Path, out: Path, *options: object) -> dict:
    code, stdout, stderr = quantkit("convert", source, "-o", out, *options, *CALIBRATION, "--json")
    assert code == 0, stderr
    return json.loads(stdout)


@pytest.mark.parametrize("share", [all_at_once, in_two()])
def test_factors_of_a_closed_form_are_found(share):
    """With y = f w x for one range, the factor that the data were made with is the one of least error."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 8, generator=g), torch.randn(16, 8, generator=g)
    factors = 1 + 0.2 * torch.rand(3, 2, generator=g)
    ranged = {"w": Ranged((w,), torch.arange(8) // 4, lambda f: f)}
    y = x @ ranged["w"].weight((factors,)).T
    seen = []

    def loss(weights, rows):
        seen.append(len(rows))
        return (x[rows] @ weights["w"].T - y[rows]).square().mean()

    found = learn(ranged, loss, len(x), seed=0, share=share)["w"]
    assert set(seen) == {4 if share is all_at_once else 2}
    before, after = ((f - factors).abs().mean() for f in (1.0, found[0]))
    assert after < before / 2


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"])
def test_the_terms_of_a_ladder_are_its_weight_and_take_factors(kind):
    weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    codec = lookup(kind)
    encoded = Encoded(codec, encode(kind, weight))
    terms = encoded.terms()
    assert torch.allclose(sum(terms), encoded.dequantize(), atol=1e-6)
    blocks = 512 // codec.block
    same = encoded.times(tuple(torch.ones(5, blocks) for _ in terms))
    assert torch.equal(same.dequantize(), encoded.dequantize())
    factors = tuple(torch.linspace(0.9 + i / 20, 1.1, 5 * blocks).view(5, blocks) for i, _ in enumerate(terms))
    wanted = Ranged(terms, torch.arange(512) // codec.block, lambda f: f).weight(factors)
    assert torch.allclose(encoded.times(factors).dequantize(), wanted, rtol=2e-3, atol=2e-3)  # scales are fp16


def test_scales_of_an_integer_grid_take_factors():
    q = rtn(torch.randn(4, 64, generator=torch.Generator().manual_seed(2)), Grid(4, 16))
    factors = torch.linspace(0.8, 1.2, 16).view(4, 4)
    ranged = Ranged((q.dequantize(),), q.groups.long(), q.times)
    assert torch.allclose(q.times(factors).dequantize(), ranged.weight((factors,)), rtol=1e-3)
    assert torch.equal(q.times(factors).codes, q.codes)
    tiny = replace(q, scales=torch.full_like(q.scales, 2.0**-24))  # the smallest of fp16: half of it would be 0
    assert torch.equal(tiny.times(torch.full((4, 4), 0.5)).scales, tiny.scales)


@pytest.fixture
def none_held_out(monkeypatch):
    """A toy's rows teach nothing about one another: learned from all, and judged by all, they move its ranges."""
    monkeypatch.setattr("quantkit.prefix.HELD_OUT", 1)


def test_what_holds_for_no_other_rows_is_not_learned(q8_0, tmp_path):
    made(q8_0, tmp_path / "plain", "--to", "gptq-2bit-64g")
    report = made(q8_0, tmp_path / "learned", "--to", "gptq-2bit-64g", "--solver", "learned")
    a, b = (load_file(tmp_path / how / "gptq-2bit-64g" / "model.safetensors") for how in ("plain", "learned"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert {t["block_left"] for t in report["variants"][0]["tensors"] if "block_left" in t} == {1.0}


@pytest.mark.usefixtures("none_held_out")
def test_gptq_folders_keep_their_codes_and_lose_less_of_each_block(q8_0, tmp_path):
    plain = made(q8_0, tmp_path / "plain", "--to", "gptq-2bit-64g")
    report = made(q8_0, tmp_path / "learned", "--to", "gptq-2bit-64g", "--solver", "learned")
    a, b = (load_file(tmp_path / how / "gptq-2bit-64g" / "model.safetensors") for how in ("plain", "learned"))
    first = [n for n in a if n.startswith("model.layers.0.") and n.endswith("qweight")]
    assert first and all(torch.equal(a[n], b[n]) for n in first)  # later blocks are solved behind other weights
    assert any(not torch.equal(a[n], b[n]) for n in a if n.startswith("model.layers.0.") and n.endswith("scales"))
    left = [t["block_left"] for t in report["variants"][0]["tensors"] if "block_left" in t]
    assert len(left) == 3 * 7 and all(0 < share <= 1 for share in left) and min(left) < 0.99
    assert "block_left" not in plain["variants"][0]["tensors"][0]
    table = (tmp_path / "learned" / "layers.csv").read_text().splitlines()
    assert "block_left" in table[0].split(",") and len(table) == 1 + 3 * 7


@pytest.mark.usefixtures("none_held_out")
@pytest.mark.parametrize("target", ["awq-4bit-64g", "ct-4bit-64g-asym", "gptq-4bit-64g-desc", "Q4_K_M", "Q3_K_M"])
def test_every_target_that_is_solved_can_be_learned(q8_0, tmp_path, target):
    report = made(q8_0, tmp_path / "out", "--to", target, "--solver", "learned")
    (variant,) = report["variants"]
    assert variant["verified"] and any("block_left" in t for t in variant["tensors"])
    assert open_model(tmp_path / "out" / variant["path"]).parameters


@pytest.mark.usefixtures("none_held_out")
def test_the_same_seed_makes_the_same_bytes(q8_0, tmp_path):
    for name in ("a", "b"):
        made(q8_0, tmp_path / name, "--to", "gptq-3bit-64g", "--solver", "learned")
    a, b = ((tmp_path / n / "gptq-3bit-64g" / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert a == b


def test_what_cannot_be_learned_is_refused_before_anything_is_read(q8_0, tmp_path):
    for target in ("gptq-4bit-64g", "Q4_K_M"):
        code, _, stderr = quantkit(
            "convert", q8_0, "-o", tmp_path / "out", "--to", target, "--solver", "learned", "--inputs", "source"
        )
        assert code == 2 and "--inputs source" in stderr and not (tmp_path / "out").exists()


@pytest.fixture
def three_threads():
    """More than one, and a number that cuts matrices in the middle of a row: sums must not depend on who is first."""
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("three_threads", "none_held_out")
@pytest.mark.parametrize(("target", "ending"), [("gptq-2bit-64g", "safetensors"), ("Q4_0", "gguf")])
def test_a_run_that_was_ended_goes_on_and_makes_the_same_bytes(q8_0, tmp_path, monkeypatch, target, ending):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unfinished = tmp_path / "cache" / "quantkit" / "unfinished"
    made(q8_0, tmp_path / "whole", "--to", target, "--solver", "learned")
    assert not list(unfinished.iterdir())
    blocks = []

    def ended(inputs: Inputs, ranged: object) -> object:
        blocks.append(inputs.layer)
        if inputs.layer == 1 and len(blocks) == 2:
            raise KeyboardInterrupt
        return learned_block(inputs, ranged)

    learned_block = Inputs.learn
    monkeypatch.setattr(Inputs, "learn", ended)
    how = (target, "--solver", "learned")
    code, _, stderr = quantkit("convert", q8_0, "-o", tmp_path / "again", "--to", *how, *CALIBRATION)
    assert code == 130, stderr
    (kept,) = unfinished.iterdir()
    assert Journal(kept).resume()[0] == 0
    report = made(q8_0, tmp_path / "again", "--to", *how)
    assert blocks == [0, 1, *range(1, open_model(q8_0).layers)]  # block 0 is not learned again
    assert f"{target}: blocks 0 to 0 are those of a run that had not ended" in report["warnings"]
    assert not kept.exists()
    (a,), (b,) = (list((tmp_path / run).rglob(f"*.{ending}")) for run in ("whole", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_a_journal_that_is_not_whole_is_of_no_use(tmp_path):
    solved = [Solved("w", {"w.qweight": torch.arange(4)}, None, 0.5, {"damp": 0.1, "fallback": None})]
    journal = Journal(tmp_path / "j")
    for layer in range(3):
        journal.keep(layer, solved, {"w": "hash"}, torch.full((1, 2), float(layer)))
    layer, hidden = journal.resume()
    assert layer == 2 and hidden.tolist() == [[2.0, 2.0]]
    (entry,) = journal.block(1)
    assert entry.parts["w.qweight"].tolist() == [0, 1, 2, 3] and (entry.loss, entry.digest) == (0.5, "hash")
    (tmp_path / "j" / "1.pt").write_bytes(b"cut off")
    assert journal.resume() is None  # block 2 is whole, but what reaches block 1 is not known
    with pytest.raises(Resumable, match="run the same command again"):
        journal.block(1)


def test_a_dry_run_counts_what_learning_takes(q8_0, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_flops_per_second", lambda _: 1e9)  # what it measures is another number each time
    how = ("--to", "gptq-2bit-64g", "--dry-run")
    plain, more = (made(q8_0, tmp_path / "none", *how, *solver) for solver in ((), ("--solver", "learned")))
    assert more["peak_ram_bytes"] > plain["peak_ram_bytes"]
    assert more["seconds_estimate"] > 2 * plain["seconds_estimate"]
