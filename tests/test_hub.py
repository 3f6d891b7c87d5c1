"""Hub names, against a Hub on this machine: it is huggingface_hub that asks, with its own cache and switches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from gguf import GGMLQuantizationType as T
from hub_server import COMMIT, GATED, OPENED, TOKEN, hub
from test_convert import quantkit
from toy import toy_model, write_family, write_toy

from quantkit.errors import BadInput, Resumable
from quantkit.model import hub as names
from quantkit.model import open_model

# One process a moment of the Hub's life: opens every name it is given, and says what came of it.
SCRIPT = """
import json, sys
from quantkit import QuantkitError, open_model
found = {}
for name in json.loads(sys.argv[1]):
    try:
        m = open_model(name)
        found[name] = [m.name, m.format, m.hub.repo, m.hub.commit, str(m.tensors["model.norm.weight"].type), m.layers]
    except QuantkitError as e:
        found[name] = [e.exit_code, str(e)]
print(json.dumps(found))
"""


def opened(cache: Path, sources: list[str], **env: str) -> dict[str, list]:
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    command = [sys.executable, "-c", SCRIPT, json.dumps(sources)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repos")
    quants, one, gated = root / "quants", root / "one", root / "gated"
    for folder in (quants, one, gated):
        folder.mkdir()
    toy = toy_model(num_hidden_layers=2)
    write_toy(one / "Only.F16.gguf", toy, T.F16)
    write_toy(gated / "Gated.Q8_0.gguf", toy, T.Q8_0)
    write_toy(quants / "Toy-Q8_0.gguf", toy, T.Q8_0)
    (quants / "mmproj-Q8_0.gguf").write_bytes(b"no language model")
    (quants / "README.md").write_text("read me")
    code, _, stderr = quantkit(
        *("convert", quants / "Toy-Q8_0.gguf", "-o", quants / "F16", "--to", "F16", "--no-eval", "--no-calibration"),
        *("--split-max-size", "1M"),
    )
    assert code == 0, stderr
    write_family(root / "folder", "llama")
    return {
        "someone/quants": quants,
        "someone/one": one,
        GATED: gated,
        OPENED: gated,
        "someone/Folder-7B": root / "folder",
    }


@pytest.fixture(scope="module")
def online(repos, tmp_path_factory) -> tuple[Path, dict[str, list], list[str]]:
    """Every kind of name opened once: the cache, what came of each, and what was asked for."""
    sources = [
        *("someone/one", "someone/quants:q8_0", "someone/quants:F16", "hf://someone/quants@v1/Toy-Q8_0.gguf"),
        *("someone/Folder-7B", "someone/quants", "someone/quants:Q4_K_M", "hf://someone/quants/No.gguf"),
        *("someone/nobody", "someone/one@v9", GATED, OPENED),
    ]
    cache = tmp_path_factory.mktemp("cache")
    with hub(repos) as (address, log):
        return cache, opened(cache, sources, HF_ENDPOINT=address, HF_TOKEN=TOKEN), log


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("someone/one", ["Only", "gguf", "someone/one"]),
        ("someone/quants:q8_0", ["Toy", "gguf", "someone/quants"]),
        ("someone/quants:F16", ["Toy", "gguf", "someone/quants"]),
        ("hf://someone/quants@v1/Toy-Q8_0.gguf", ["Toy", "gguf", "someone/quants"]),
        ("someone/Folder-7B", ["Folder-7B", "dense", "someone/Folder-7B"]),
        (OPENED, ["Gated", "gguf", OPENED]),
    ],
)
def test_a_name_is_a_model(online, source, expected):
    found = online[1][source]
    assert found[:4] == [*expected, COMMIT] and found[5] == (3 if "Folder" in source else 2)


def test_only_what_is_read_is_fetched(online):
    fetched = {line.partition("/resolve/")[2].partition("/")[2] for line in online[2] if line.startswith("GET someone")}
    assert "config.json" in fetched and len([f for f in fetched if f.startswith("F16/")]) > 1
    assert not fetched & {"README.md", "mmproj-Q8_0.gguf"}


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("someone/quants", 65, "2 files of the repository fit; name one of: F16"),
        ("someone/quants:Q4_K_M", 65, "the repository has no Q4_K_M; name one of:"),
        ("hf://someone/quants/No.gguf", 65, "the repository has no GGUF No.gguf; name one of:"),
        ("someone/nobody", 65, "no such file here, and no such repository on the Hub"),
        ("someone/one@v9", 65, "the repository has no such revision"),
        (GATED, 65, "the repository is gated; accept its terms on the Hub, then set HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(online, source, code, says):
    status, text = online[1][source]
    assert status == code and says in text and text.startswith(f"{source}: ") and "\n" not in text


def test_the_cache_serves_without_the_hub(online, monkeypatch):
    """Offline by the switch, then with a Hub that is gone; both open what was fetched and nothing else."""
    cache, before, _ = online
    known = ["someone/one", "someone/quants:q8_0", "someone/Folder-7B"]
    offline = opened(cache, [*known, GATED], HF_HUB_OFFLINE="1")
    assert {n: offline[n] for n in known} == {n: before[n] for n in known}
    assert offline[GATED][0] == 65 and "HF_HUB_OFFLINE is set" in offline[GATED][1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", mock.Mock(side_effect=ConnectionError))
    for source in known[:2]:
        assert open_model(source).hub.commit == COMMIT
    with pytest.raises(Resumable, match=r"someone/nobody: the Hub cannot be reached \(ConnectionError\)"):
        open_model("someone/nobody")


def test_the_report_names_the_commit(repos, tmp_path, monkeypatch):
    """From a Hub name to the report; a path that exists goes before the Hub."""
    found = repos["someone/quants"] / "Toy-Q8_0.gguf"
    monkeypatch.setattr("quantkit.model.pull", lambda name: names.Pulled(found, "someone/quants", COMMIT))
    options = ("--to", "fp16", "--no-eval", "--json")
    code, stdout, stderr = quantkit("convert", "someone/quants:Q8_0", "-o", tmp_path / "out", *options)
    assert code == 0, stderr
    source = json.loads(stdout)["source"]
    assert (source["repo"], source["revision"]) == ("someone/quants", COMMIT)
    monkeypatch.chdir(repos["someone/one"].parent)
    assert open_model("one").hub is None


FILES = [
    *("a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a.Q4_0.gguf", "UD-Q2_K_XL/a-UD-Q2_K_XL-00001-of-00002.gguf"),
    *("UD-Q2_K_XL/a-UD-Q2_K_XL-00002-of-00002.gguf", "BF16/b.gguf", "a-Q4_K_M.imatrix.gguf", "mmproj-F16.gguf"),
]


@pytest.mark.parametrize(
    ("quant", "file", "found"),
    [
        ("Q4_K_M", None, ["a-Q4_K_M.gguf"]),
        ("q4_0", None, ["a.Q4_0.gguf"]),
        ("Q2_K_XL", None, FILES[3:5]),
        ("bf16", None, ["BF16/b.gguf"]),
        (None, FILES[4], FILES[3:5]),
        (None, "mmproj-F16.gguf", ["mmproj-F16.gguf"]),
    ],
)
def test_files_are_picked_by_quant(quant, file, found):
    assert names.chosen(FILES, quant, file, "user/repo") == found


@pytest.mark.parametrize(
    ("files", "quant", "says"),
    [
        (FILES, "Q4_K", "no Q4_K; name one of:.* Q4_K_S.* as user/repo:"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "2 files .* a-Q8_0.gguf, b-Q8_0.gguf, as hf://"),
        (["pytorch_model.bin", "config.json"], None, "no GGUF and no safetensors"),
        (["model.safetensors", "config.json"], "Q8_0", "no GGUF and no safetensors"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_there(files, quant, says):
    with pytest.raises(BadInput, match=says):
        names.chosen(files, quant, None, "user/repo")


@pytest.mark.parametrize("path", ["/a/b", "a/b/c", "missing.gguf", "models/missing.gguf", "./a/b", "a//b", "-x/y"])
def test_a_path_is_no_hub_name(path):
    assert names.pull(path) is None
