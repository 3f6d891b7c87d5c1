"""Writing GGUF: layouts exact to the byte, read back by gguf-py and llama.cpp."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_oracle import Oracle, parses

from quantkit.errors import Resumable
from quantkit.files import gguf_writer
from quantkit.files.gguf import GGUF, Value, read_gguf
from quantkit.files.gguf_values import NUMBERS
from quantkit.files.gguf_writer import GGUFWriter, Layout, Planned, layout_gguf, split_layout

PLAN: list[Planned] = [("a.weight", (5, 256), "Q4_K"), ("b.bias", (7,), "F32"), ("c.weight", (2, 3, 32), "Q8_0")]


def planned(source: GGUF) -> list[Planned]:
    return [(info.name, info.shape, info.type) for info in source.tensors.values()]


def copy(source: GGUF, path: Path, layout: Layout) -> None:
    """The tensors of `layout` from `source`, last first."""
    with GGUFWriter(path, layout) as out:
        for name in reversed(layout.sizes):
            out.write(name, source.raw(name))


def test_a_real_file_is_written_back_byte_for_byte(smollm2, tmp_path):
    source = read_gguf(smollm2)
    layout = layout_gguf(source.metadata, planned(source))
    copy(source, tmp_path / "m.gguf", layout)
    written = (tmp_path / "m.gguf").read_bytes()
    assert len(written) == layout.nbytes
    assert written == smollm2.read_bytes()


def test_llama_cpp_computes_the_same_from_a_split_copy(smollm2, tmp_path):
    source = read_gguf(smollm2)
    limit = 45_000_000
    shards = split_layout(source.metadata, planned(source), limit)
    assert [suffix for suffix, _ in shards] == [f"-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for suffix, layout in shards:
        copy(source, tmp_path / f"m{suffix}", layout)
        assert (tmp_path / f"m{suffix}").stat().st_size == layout.nbytes <= limit
    first = tmp_path / f"m{shards[0][0]}"
    read = read_gguf(first)
    assert read.metadata == source.metadata and planned(read) == planned(source)
    logits = []
    for path in (smollm2, first):
        oracle = Oracle(path)
        logits.append(oracle.logits(oracle.tokenize("The capital of France is")))
        oracle.close()
    assert np.array_equal(*logits)


def number(kind: T) -> st.SearchStrategy:
    code = np.dtype(NUMBERS[kind][1])
    if code.kind == "f":
        return st.floats(width=8 * code.itemsize, allow_nan=False)
    return st.integers(int(np.iinfo(code).min), int(np.iinfo(code).max))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(
    *(st.builds(Value, st.just(kind), st.none(), number(kind)) for kind in NUMBERS),
    st.builds(Value, st.just(T.BOOL), st.none(), st.booleans()),
    st.builds(Value, st.just(T.STRING), st.none(), TEXTS),
)
ARRAYS = st.one_of(
    *(
        st.lists(number(kind), max_size=4).map(lambda x, kind=kind: Value(T.ARRAY, kind, np.array(x, NUMBERS[kind][1])))
        for kind in NUMBERS
    ),
    st.lists(st.booleans(), max_size=4).map(lambda x: Value(T.ARRAY, T.BOOL, np.array(x, bool))),
    st.lists(TEXTS, max_size=4).map(lambda x: Value(T.ARRAY, T.STRING, x)),
)
KEYS = st.from_regex(r"[a-z][a-z0-9_.\-]{0,20}", fullmatch=True).filter(lambda key: key != "general.alignment")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, SCALARS | ARRAYS, max_size=6), st.sampled_from([8, 32, 4096]))
def test_every_metadata_value_comes_back(tmp_path, metadata, alignment):
    layout = layout_gguf(metadata, PLAN, alignment)
    path = tmp_path / "m.gguf"
    with GGUFWriter(path, layout) as out:
        for name, size in layout.sizes.items():
            out.write(name, bytes(size))
    read = read_gguf(path)
    assert {key: value for key, value in read.metadata.items() if key != "general.alignment"} == metadata
    assert read.alignment == alignment and planned(read) == PLAN
    assert {name: info.offset for name, info in read.tensors.items()} == layout.offsets
    assert parses(path.read_bytes())


def test_gguf_py_reads_what_was_written(tmp_path):
    metadata = {
        "general.architecture": Value(T.STRING, None, "llama"),
        "general.alignment": Value(T.UINT32, None, 64),
        "x.unknown": Value(T.ARRAY, T.INT16, np.array([-3, 4], np.int16)),
    }
    layout = layout_gguf(metadata, PLAN)
    raws = {name: torch.randint(256, (size,), dtype=torch.uint8) for name, size in layout.sizes.items()}
    with GGUFWriter(tmp_path / "m.gguf", layout) as out:
        for name, raw in raws.items():
            out.write(name, raw.reshape(1, -1))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.alignment == 32 and "general.alignment" not in reader.fields, "a fact of the file, not of the model"
    assert reader.fields["x.unknown"].contents() == [-3, 4]
    for tensor, (name, shape, kind) in zip(reader.tensors, PLAN, strict=True):
        assert (tensor.name, tuple(map(int, tensor.shape)), tensor.tensor_type.name) == (name, shape[::-1], kind)
        assert tensor.data.tobytes() == raws[name].numpy().tobytes()


@pytest.mark.parametrize("limit", [1, 1_000, 1_500, 2_000, 100_000])
def test_shards_keep_to_the_limit_and_hold_all(limit):
    metadata = {"general.name": Value(T.STRING, None, "n" * 200), "split.count": Value(T.UINT16, None, 9)}
    plan = [(f"t{i}", (1 + i % 3, 64), "Q8_0") for i in range(20)]
    shards = split_layout(metadata, plan, limit)
    assert [name for _, layout in shards for name in layout.sizes] == [name for name, _, _ in plan]
    for _, layout in shards:
        assert layout.nbytes <= limit or len(layout.sizes) == 1
    if limit == 100_000:
        assert [suffix for suffix, _ in shards] == [".gguf"] and b"split." not in shards[0][1].header
    elif limit == 1:
        assert shards[-1][0] == "-00020-of-00020.gguf"


@pytest.mark.parametrize(
    ("metadata", "tensors", "alignment", "words"),
    [
        ({}, [PLAN[0], PLAN[0]], 32, "twice"),
        ({}, [("a" * 64, (3,), "F32")], 32, "no tensor name"),
        ({}, [("../a", (3,), "F32")], 32, "no tensor name"),
        ({}, [("a", (), "F32")], 32, "1 to 4 dims"),
        ({}, [("a", (1, 2, 3, 4, 5), "F32")], 32, "1 to 4 dims"),
        ({}, [("a", (2, 0), "F32")], 32, "at least 1"),
        ({}, [("a", (2, 48), "Q8_0")], 32, "blocks of 32"),
        ({}, [], 48, "power of two"),
        ({"a b": Value(T.BOOL, None, True)}, [], 32, "no metadata key"),
        ({"a": Value(T.UINT8, None, 256)}, [], 32, "key a: 256 is no UINT8"),
        ({"a": Value(T.UINT8, None, "x")}, [], 32, "'x' is no UINT8"),
        ({"a": Value(T.BOOL, None, 1)}, [], 32, "is no BOOL"),
        ({"a": Value(T.STRING, None, 1)}, [], 32, "is no STRING"),
        ({"a": Value(T.ARRAY, None, [1])}, [], 32, "needs the type of its items"),
        ({"a": Value(T.ARRAY, T.ARRAY, [[1]])}, [], 32, "is no ARRAY"),
        ({"a": Value(T.ARRAY, T.INT8, np.array([1.5]))}, [], 32, "float64 does not fit items of INT8"),
        ({"a": Value(T.STRING, None, "\ud800")}, [], 32, "surrogates"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(metadata, tensors, alignment, words):
    with pytest.raises(ValueError, match=words):
        layout_gguf(metadata, tensors, alignment)


def test_a_plain_list_of_numbers_is_taken_for_an_array():
    lists = {"a": Value(T.ARRAY, T.INT32, [1, -2]), "b": Value(T.ARRAY, T.BOOL, [True])}
    arrays = {"a": Value(T.ARRAY, T.INT32, np.array([1, -2], np.int32)), "b": Value(T.ARRAY, T.BOOL, np.array([True]))}
    assert layout_gguf(lists, []).header == layout_gguf(arrays, []).header


def test_each_tensor_is_written_once_whole_and_not_forgotten(tmp_path):
    layout = layout_gguf({}, PLAN)
    size = layout.sizes["b.bias"]
    with (
        pytest.raises(ValueError, match=r"2 tensors were not written: a\.weight, c\.weight"),
        GGUFWriter(tmp_path / "m.gguf", layout) as out,
    ):
        with pytest.raises(ValueError, match="takes 28 bytes, not 27"):
            out.write("b.bias", bytes(size - 1))
        with pytest.raises(TypeError, match="float32"):
            out.write("b.bias", torch.zeros(7))
        out.write("b.bias", bytes(size))
        with pytest.raises(ValueError, match="was written already"):
            out.write("b.bias", bytes(size))
        with pytest.raises(ValueError, match="not in the layout"):
            out.write("d", b"")
    with pytest.raises(KeyError), GGUFWriter(tmp_path / "m.gguf", layout):
        raise KeyError("an error of the caller's passes through")


def test_large_writes_go_on_where_the_system_stopped(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:100], offset))
    layout = layout_gguf({}, PLAN)
    raws = {name: os.urandom(size) for name, size in layout.sizes.items()}
    with GGUFWriter(tmp_path / "m.gguf", layout) as out:
        for name, raw in raws.items():
            out.write(name, raw)
    read = read_gguf(tmp_path / "m.gguf")
    assert {name: read.raw(name).numpy().tobytes() for name in read.tensors} == raws


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    layout = layout_gguf({}, [("a", (1 << 30, 1 << 30), "F32")])
    with pytest.raises(Resumable, match=r"4,611,686,018,427,388,000 bytes are needed and [\d,]+ are free"):
        GGUFWriter(tmp_path / "m.gguf", layout).__enter__()
    assert not (tmp_path / "m.gguf").exists()
    small = layout_gguf({}, PLAN)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_writer.os, "pwrite", full)
    with pytest.raises(Resumable, match="bytes are free"), GGUFWriter(tmp_path / "m.gguf", small):
        raise AssertionError("the header was not written, and nobody said so")
