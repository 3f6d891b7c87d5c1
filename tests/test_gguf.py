"""Reading GGUF, against gguf-py's reader and writer, files built by hand, and llama.cpp."""

from __future__ import annotations

import argparse
import builtins
import pickle
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType as T
from gguf.scripts.gguf_convert_endian import convert_byteorder
from gguf_bytes import ARRAY, BOOL, F32, F64, I8, STRING, T_F32, T_Q8_0, U16, U32, U64, Craft

from quantkit.errors import BadInput, FormatError
from quantkit.files.atomic import staged
from quantkit.files.gguf import GGUF, TensorInfo, Value, read_gguf
from quantkit.files.gguf_writer import GGUFWriter, layout_gguf


def save(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def write(
    path: Path, metadata: dict[str, Value], tensors: list[tuple[str, tuple[int, ...], str]], seed: int = 0
) -> GGUF:
    """A file with random bytes for its tensors, by quantkit's writer."""
    layout = layout_gguf(metadata, tensors)
    rng = np.random.default_rng(seed)
    with staged(path) as partial, GGUFWriter(partial, layout) as out:
        for name, size in layout.sizes.items():
            out.write(name, rng.bytes(size))
    return read_gguf(path)


def test_a_real_file_reads_as_gguf_py_reads_it(smollm2):
    ours, theirs = read_gguf(smollm2), gguf.GGUFReader(smollm2)
    assert (ours.version, ours.byteorder, ours.alignment) == (3, "little", 32)
    assert ours.nbytes == smollm2.stat().st_size
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (info.type, info.nbytes, info.offset) == (tensor.tensor_type.name, tensor.n_bytes, tensor.data_offset)
        assert np.array_equal(ours.raw(tensor.name).numpy(), tensor.data.reshape(-1).view(np.uint8))
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        value = ours.metadata[name]
        assert [value.type, value.item][: len(field.types)] == field.types
        data = value.data.tolist() if isinstance(value.data, np.ndarray) else value.data
        assert data == field.contents()


def test_a_large_vocabulary_takes_a_fraction_of_a_second(tmp_path):
    words = [f"▁word{i}" for i in range(262_144)]
    metadata = {
        "tokenizer.ggml.tokens": Value(T.ARRAY, T.STRING, words),
        "tokenizer.ggml.scores": Value(T.ARRAY, T.FLOAT32, np.arange(len(words), dtype=np.float32)),
    }
    write(tmp_path / "v.gguf", metadata, [])
    start = time.process_time()
    read = read_gguf(tmp_path / "v.gguf")
    assert time.process_time() - start < 1
    assert read.get("tokenizer.ggml.tokens") == words


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_versions_and_byte_orders_by_hand(tmp_path, version, order):
    c = Craft(order, version)
    weight = np.arange(15, dtype=order + "f4").reshape(5, 3)
    raw = c.file(
        [
            c.key("general.architecture", STRING, c.string("llama")),
            c.key("a.big", U64, c.pack("Q", 2**64 - 1)),
            c.key("a.small", I8, c.pack("b", -5)),
            c.key("a.yes", BOOL, b"\1"),
            c.key("a.eps", F32, c.pack("f", 0.25)),
            c.array("a.flags", BOOL, 3, b"\1\0\1"),
            c.array("a.doubles", F64, 2, c.pack("2d", 0.1, -1e300)),
            c.array("a.words", STRING, 2, c.string("ä") + c.string("")),
            c.array("a.none", U16, 0, b""),
        ],
        [c.tensor("b.weight", (3, 5), T_F32, 0), c.tensor("a.weight", (2,), T_F32, 64)],
        weight.tobytes() + bytes(4) + np.array([7, 8], order + "f4").tobytes(),
    )
    read = read_gguf(save(tmp_path / "m.gguf", raw))
    assert (read.version, read.byteorder) == (version, {"<": "little", ">": "big"}[order])
    plain = {name: value.data for name, value in read.metadata.items() if value.item is None}
    assert plain == {"general.architecture": "llama", "a.big": 2**64 - 1, "a.small": -5, "a.yes": True, "a.eps": 0.25}
    assert type(read.get("a.yes")) is bool
    assert read.get("a.flags").tolist() == [True, False, True]
    assert read.get("a.doubles").tolist() == [0.1, -1e300]
    assert read.get("a.words") == ["ä", ""]
    assert read.get("a.none").tolist() == [] and read.get("a.none").dtype == np.uint16
    assert read.get("absent") is None and read.get("absent", 3) == 3
    start = len(raw) - 72
    assert list(read.tensors.values()) == [
        TensorInfo("b.weight", (5, 3), "F32", 60, start, 0),
        TensorInfo("a.weight", (2,), "F32", 8, start + 64, 0),
    ]
    assert torch.equal(read.raw("b.weight").view(torch.float32), torch.arange(15.0))
    assert read.raw("a.weight").view(torch.float32).tolist() == [7, 8]


def test_a_big_endian_file_of_gguf_py(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(7)
    writer.add_token_list(["a", "bc"])
    writer.add_token_scores([0.5, -2.0])
    writer.add_tensor("t.weight", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "b.gguf")
    assert read.byteorder == "big"
    assert (read.get("llama.block_count"), read.get("tokenizer.ggml.tokens")) == (7, ["a", "bc"])
    assert read.get("tokenizer.ggml.scores").tolist() == [0.5, -2.0]
    assert read.raw("t.weight").view(torch.float16).tolist() == [0, 1, 2, 3, 4, 5]


def test_quantized_blocks_survive_gguf_py_turning_the_file_around(tmp_path, monkeypatch):
    kinds = ["F32", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K"]
    plan = [(f"{kind.lower()}.weight", (3, 512), kind) for kind in kinds]
    little = write(tmp_path / "m.gguf", {"general.architecture": Value(T.STRING, None, "llama")}, plan)
    before = {name: little.raw(name).clone() for name in little.tensors}
    monkeypatch.setattr(builtins, "input", lambda _: "YES")
    convert_byteorder(gguf.GGUFReader(tmp_path / "m.gguf", "r+"), argparse.Namespace(order="big", dry_run=False))
    big = read_gguf(tmp_path / "m.gguf")
    assert big.byteorder == "big" and big.metadata == little.metadata
    for name, raw in before.items():
        assert torch.equal(big.raw(name), raw), name


def test_raw_is_mapped_private_and_goes_with_its_tensor(tmp_path):
    read = write(tmp_path / "m.gguf", {}, [("a", (100, 256), "Q4_K"), ("b", (3, 32), "Q8_0")])
    stored = (tmp_path / "m.gguf").read_bytes()

    def mapped() -> bool:
        return "m.gguf" in Path("/proc/self/maps").read_text()

    assert not mapped()
    raw = read.raw("b")
    assert mapped() and raw.dtype == torch.uint8 and raw.shape == (102,)
    info = read.tensors["b"]
    assert raw.numpy().tobytes() == stored[info.offset : info.offset + info.nbytes]
    raw.add_(1)
    assert read.raw("b").numpy().tobytes() == stored[info.offset : info.offset + info.nbytes]
    assert (tmp_path / "m.gguf").read_bytes() == stored
    part = raw[:4]
    del raw
    assert mapped()
    del part
    assert not mapped()
    with pytest.raises(KeyError):
        read.raw("c")


def test_a_file_that_changed_is_refused(tmp_path):
    read = write(tmp_path / "m.gguf", {}, [("a", (2, 32), "Q8_0")])
    again = pickle.loads(pickle.dumps(read))
    assert again == read and torch.equal(again.raw("a"), read.raw("a"))
    write(tmp_path / "m.gguf", {}, [("a", (2, 32), "Q8_0")], seed=1)
    with pytest.raises(BadInput, match=r"changed since it was opened"):
        read.raw("a")
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(BadInput, match=r"tensor a cannot be read: No such file"):
        read.raw("a")


def test_paths_that_are_no_file(tmp_path):
    for path, words in ((tmp_path / "no.gguf", "no such file"), (tmp_path, "a folder"), (Path("/dev/null"), "regular")):
        with pytest.raises(BadInput, match=words) as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value) and caught.value.hint and caught.value.where == str(path)


def split_set(folder: Path) -> list[Path]:
    """Three shards by gguf-py, two tensors each but for the last."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2)
    writer.add_block_count(7)
    for i in range(5):
        writer.add_tensor(f"t{i}.weight", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_a_split_set_reads_as_one_from_any_shard(tmp_path):
    paths = split_set(tmp_path)
    for path in paths:
        read = read_gguf(path)
        assert read.paths == tuple(paths)
        assert read.nbytes == sum(shard.stat().st_size for shard in paths)
        assert read.get("llama.block_count") == 7 and not any(key.startswith("split.") for key in read.metadata)
        assert [info.shard for info in read.tensors.values()] == [0, 0, 1, 1, 2]
        for i, name in enumerate(read.tensors):
            assert name == f"t{i}.weight" and read.raw(name).view(torch.float32).tolist() == [i] * 6


def spoil(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def test_split_sets_that_do_not_fit_together(tmp_path):
    c = Craft()

    def refused(words: str, first: Path) -> None:
        with pytest.raises(FormatError, match=words) as caught:
            read_gguf(first)
        assert caught.value.hint

    def fresh(name: str) -> list[Path]:
        (tmp_path / name).mkdir()
        return split_set(tmp_path / name)

    paths = fresh("missing")
    paths[1].unlink()
    refused(r"shard m-00002-of-00003.gguf is missing", paths[0])
    paths[2].unlink()
    refused(r"m-00002-of-00003.gguf \(and 1 more\) is missing", paths[0])
    paths = fresh("renamed")
    refused("its name does not say so", paths[0].rename(tmp_path / "renamed" / "m.gguf"))
    paths = fresh("swapped")
    paths[1].write_bytes(paths[2].read_bytes())
    refused("split.no is 2, but the set makes it 1", paths[0])
    paths = fresh("count")
    spoil(paths[1], c.key("split.count", U16, c.pack("H", 3)), c.key("split.count", U16, c.pack("H", 4)))
    refused("split.count is 4", paths[0])
    paths = fresh("total")
    spoil(paths[2], b"split.tensors.count", b"split.tensors.COUNT")
    refused("split.tensors.count is missing", paths[0])
    paths = fresh("twice")
    spoil(paths[2], b"t4.weight", b"t0.weight")
    refused("tensor t0.weight is in an earlier shard too", paths[0])
    paths = fresh("truncated")
    paths[2].write_bytes(paths[2].read_bytes()[:-16])
    refused("the data of tensor t4.weight ends at byte", paths[0])


def test_a_shard_of_another_byte_order_is_refused(tmp_path):
    for i, order in enumerate("<>"):
        c = Craft(order)
        keys = [c.key("split.no", U16, c.pack("H", i)), c.key("split.count", U16, c.pack("H", 2))]
        keys.append(c.key("split.tensors.count", U32, c.pack("I", 2)))
        save(tmp_path / f"m-0000{i + 1}-of-00002.gguf", c.file(keys, [c.tensor(f"t{i}", (32,), T_Q8_0, 0)], bytes(34)))
    with pytest.raises(FormatError, match="byte order"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_values_compare_by_type_and_content():
    numbers = Value(T.ARRAY, T.INT32, np.array([1, 2], np.int32))
    assert numbers == Value(T.ARRAY, T.INT32, np.array([1, 2], np.int32))
    assert numbers != Value(T.ARRAY, T.INT32, np.array([1, 3], np.int32))
    assert numbers != Value(T.ARRAY, T.UINT32, numbers.data)
    assert numbers != ARRAY
    assert Value(T.STRING, None, "x") == Value(T.STRING, None, "x")
