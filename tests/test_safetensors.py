"""Streamed folders against the safetensors library and transformers' conventions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import BadInput, FormatError
from quantkit.files.safetensors import INDEX, FolderWriter, layout_folder, open_folder

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float16).view(2, 3),
    "a.scales": torch.randn(5).bfloat16(),
    "a.words": torch.arange(-4, 3, dtype=torch.int32),
    "a.empty": torch.zeros(0, 4),
}


def write(path: Path, shard_bytes: int = 10**9) -> int:
    layout = layout_folder([(n, t.dtype, tuple(t.shape)) for n, t in TENSORS.items()], shard_bytes)
    with FolderWriter(path, layout) as out:
        for name in reversed(TENSORS):
            out.write(name, TENSORS[name])
    return layout.nbytes


def test_the_library_reads_what_is_streamed(tmp_path):
    nbytes = write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_size == nbytes
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in TENSORS.items())


def test_shards_have_an_index_and_their_planned_size(tmp_path):
    nbytes = write(tmp_path, shard_bytes=24)
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(TENSORS) and len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == nbytes
    folder = open_folder(tmp_path)
    assert all(torch.equal(folder.read(n), t) for n, t in TENSORS.items())


def test_a_forgotten_tensor_is_an_error(tmp_path):
    layout = layout_folder([("a", torch.float16, (2,)), ("b", torch.float16, (2,))])
    with pytest.raises(RuntimeError, match="never written: b"), FolderWriter(tmp_path, layout) as out:
        out.write("a", torch.zeros(2, dtype=torch.float16))


@pytest.mark.parametrize(
    ("break_it", "error", "says"),
    [
        (lambda p: (p / "model.safetensors").unlink(), BadInput, "no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 40), FormatError, "no readable safetensors"),
        (lambda p: (p / INDEX).write_text("{"), FormatError, "index is not readable"),
        (lambda p: (p / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'), FormatError, "is missing"),
        (lambda p: (p / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}'), FormatError, "gone"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, break_it, error, says):
    save_file(TENSORS, tmp_path / "model.safetensors")
    break_it(tmp_path)
    with pytest.raises(error, match=says):
        open_folder(tmp_path)
