"""Text that a model writes for itself: seeded, cached, and a calibration like any other."""

from __future__ import annotations

import json

import pytest
import torch
from test_convert import quantkit
from toy import CONFIG, toy_model, write_toy

from quantkit import selfcal
from quantkit.model import open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("source") / "Toy.F32.gguf", toy_model())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_seeded_and_written_once(source, monkeypatch):
    model = open_model(source)
    text, ids = selfcal.self_calibration(model, 3, 24, 7, CPU)
    assert ids.shape == (3, 24) and ids.max() < CONFIG["vocab_size"] and len(text.documents) == 3
    again = selfcal._write(model, 3, 24, 7, CPU)
    assert torch.equal(ids, again) and not torch.equal(ids, selfcal._write(model, 3, 24, 8, CPU))
    monkeypatch.setattr(selfcal, "_write", None)  # a second call must not need it
    assert torch.equal(selfcal.self_calibration(model, 3, 24, 7, CPU)[1], ids)


def test_its_words_are_likely_to_the_model(source):
    """Sampled from the model, tokens have a lower loss under it than tokens drawn at random."""
    ids = selfcal._write(open_model(source), 8, 48, 0, CPU)
    drawn = torch.randint(2, CONFIG["vocab_size"], ids.shape, generator=torch.Generator().manual_seed(0))
    model = toy_model()
    with torch.no_grad():
        own, other = (model(x, labels=x).loss for x in (ids, drawn))
    assert own < other - 1


def test_a_conversion_names_it(source, tmp_path):
    options = ("--calibration", "self", "--samples", 4, "--seqlen", 32, "--no-eval", "--device", "cpu", "--json")
    code, stdout, stderr = quantkit("convert", source, "-o", tmp_path / "out", "--to", "gptq", *options)
    assert code == 0, stderr
    record = json.loads(stdout)["calibration"]
    assert record["name"] == "self" and record["source"] == "written by the model, seed 0" and record["sha256"]
    assert (record["rows"], record["seqlen"]) == (4, 32)
