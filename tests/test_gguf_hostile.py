"""Broken and hostile files: each refused with one line, in no time and no memory; llama.cpp's parser as a check."""

from __future__ import annotations

import itertools
import struct
import time
import tracemalloc

import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    T_F32,
    T_Q4_0,
    T_Q4_K,
    T_Q8_0,
    U8,
    U16,
    U32,
    Craft,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_oracle import parses

from quantkit.errors import FormatError
from quantkit.files.gguf import read_gguf
from quantkit.files.gguf_header import Header, parse_header

C = Craft()
HUGE = 10**9


def number(name: str, value: int = 1) -> bytes:
    return C.key(name, U32, C.pack("I", value))


def tensors(*rows: bytes, data: int = 4096, **kw: int) -> bytes:
    return C.file(tensors=rows, data=bytes(data), **kw)


# A sound file with something of everything, which the mutations below start from.
SOUND = C.file(
    [
        C.key("general.architecture", STRING, C.string("llama")),
        number("general.alignment", 64),
        C.array("t.words", STRING, 3, C.string("a") + C.string("ä") + C.string("")),
        C.array("t.scores", F32, 2, C.pack("2f", 0.5, -1)),
        C.array("t.flags", BOOL, 2, b"\0\1"),
        C.key("t.flag", BOOL, b"\1"),
    ],
    [C.tensor("a.weight", (32, 2), T_Q8_0, 0), C.tensor("b.weight", (3, 2), T_F32, 128)],
    bytes(128 + 64),
    alignment=64,
)

REFUSED = {
    # what it is: (the file, the words of the answer)
    "empty": (b"", "the file is empty"),
    "one byte": (b"G", "not a GGUF: it starts with b'G'"),
    "text": (b"hello world, this is text", "not a GGUF: it starts with b'hell'"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
    "web page": (b"<!DOCTYPE html><html>", "a web page"),
    "zip": (b"PK\x03\x04" + bytes(40), "a zip archive or a PyTorch checkpoint"),
    "old GGJT": (b"tjgg" + bytes(40), "GGJT file from before GGUF"),
    "magic only": (b"GGUF", "ends inside its header"),
    "version 0": (b"GGUF" + bytes(40), "version 0 is not one of"),
    "version 4": (Craft(version=4).file(), "version 4 is not one of"),
    "no counts": (b"GGUF\3\0\0\0\0", "the tensor count needs 8 bytes but the file has 1 left"),
    "tensor count": (C.file(n_tensors=HUGE), "the tensor count is 1,000,000,000, more than fit in the 16 bytes left"),
    "tensor count, room for it": (C.file(n_tensors=140_000, data=bytes(5_000_000)), "more than the 131,072"),
    "key count": (C.file(n_keys=HUGE), "the key count is 1,000,000,000, more than fit in the 8 bytes left"),
    "key count, room for it": (C.file(n_keys=66_000, data=bytes(1_000_000)), "more than the 65,536"),
    "key missing": (C.file([number("a")], n_keys=2, data=bytes(20), alignment=1), "the name of key 1"),
    "key length": (C.file([C.pack("Q", 2**63) + b"abcdef"]), "needs 9,223,372,036,854,775,808 bytes"),
    "key empty": (C.file([number("")]), "is not plain ASCII"),
    "key with a space": (C.file([number("a b")]), "'a b', is not plain ASCII"),
    "key with a newline": (C.file([number("a\nb")]), r"'a\nb', is not plain ASCII"),
    "key not ASCII": (C.file([number("ä")]), "is not plain ASCII"),
    "key not UTF-8": (C.file([C.key(b"a\xff", U8, b"\0")]), "the name of key 0 is not UTF-8"),
    "key too long": (C.file([number("a" * 70_000)]), "is not plain ASCII of 1 to 65,535"),
    "key twice": (C.file([number("a"), number("a")]), "key a is there twice"),
    "value type": (C.file([C.key("a", 13, bytes(8))]), "key a has type 13"),
    "value cut": (C.file([number("a")], alignment=1)[:-3], "key a needs 4 bytes but the file has 1 left"),
    "string length": (C.file([C.key("a", STRING, C.pack("Q", 2**64 - 1))]), "needs 18,446,744,073,709,551,615 bytes"),
    "string not UTF-8": (C.file([C.key("a", STRING, C.string(b"ab\xc3"))]), "key a is not UTF-8"),
    "bool": (C.file([C.key("a", BOOL, b"\2")]), "key a is a bool of 2"),
    "bools": (C.file([C.array("a", BOOL, 3, b"\0\1\xff")]), "key a holds a bool that is not 0 or 1"),
    "array type": (C.file([C.array("a", 99, 1, bytes(8))]), "an item of key a has type 99"),
    "array in an array": (C.file([C.array("a", ARRAY, 1, C.pack("IQ", U8, 0))]), "an array of arrays"),
    "array of numbers": (C.file([C.array("a", U32, HUGE, b"")]), "the item count of key a is 1,000,000,000"),
    "array of strings": (C.file([C.array("a", STRING, HUGE, b"")]), "the item count of key a is 1,000,000,000"),
    "array, room for it": (C.file([C.array("a", U8, 17_000_000, bytes(17_000_000))]), "more than the 16,777,216"),
    "array of cut strings": (C.file([C.array("a", STRING, 2, C.string("ab" * 9))], alignment=1), "key a needs 8 bytes"),
    "array of a long string": (C.file([C.array("a", STRING, 1, C.pack("Q", HUGE))]), "key a needs 1,000,000,000 bytes"),
    "alignment 0": (C.file([number("general.alignment", 0)]), "alignment is 0, not a power of two"),
    "alignment 48": (C.file([number("general.alignment", 48)]), "alignment is 48, not a power of two"),
    "alignment 2 MiB": (C.file([number("general.alignment", 1 << 21)]), "alignment is 2,097,152"),
    "alignment type": (C.file([C.key("general.alignment", U16, C.pack("H", 32))]), "is of type UINT16"),
    "tensor missing": (
        tensors(C.tensor("a", (3,), 0, 0), n_tensors=2, alignment=1, data=16),
        "the tensor count is 2, more",
    ),
    "name with a path": (tensors(C.tensor("../../etc/passwd", (3,), 0, 0)), "'../../etc/passwd', is not 1 to 63 of"),
    "name with a zero": (tensors(C.tensor("a\0b", (3,), 0, 0)), "is not 1 to 63 of"),
    "name empty": (tensors(C.tensor("", (3,), 0, 0)), "is not 1 to 63 of"),
    "name of a dot": (tensors(C.tensor("..", (3,), 0, 0)), "is not 1 to 63 of"),
    "name of 64": (tensors(C.tensor("a" * 64, (3,), 0, 0)), "is not 1 to 63 of"),
    "name not UTF-8": (tensors(C.tensor(b"\xff", (3,), 0, 0)), "the name of tensor 0 is not UTF-8"),
    "no dims": (tensors(C.tensor("a", (), 0, 0)), "tensor a has 0 dims"),
    "five dims": (tensors(C.tensor("a", (1,) * 5, 0, 0)), "tensor a has 5 dims"),
    "many dims": (tensors(C.string("a") + C.pack("I", 2**32 - 1)), "tensor a has 4,294,967,295 dims"),
    "dim 0": (tensors(C.tensor("a", (3, 0), 0, 0)), "tensor a has the shape [0, 3]"),
    "dim over 2^32": (tensors(C.tensor("a", (1, 2**32 + 1), 0, 0)), "a dim must be 1 to 2^32"),
    "dims that overflow": (tensors(C.tensor("a", (2**32,) * 4, 0, 0)), "the data of tensor a ends at byte"),
    "type of old": (tensors(C.tensor("a", (32,), 4, 0)), "tensor a has type 4, which quantkit does not know"),
    "type to come": (tensors(C.tensor("a", (32,), 2**32 - 1, 0)), "tensor a has type 4294967295"),
    "row off its block": (tensors(C.tensor("a", (128, 2), T_Q4_K, 0)), "rows of 128, not a multiple of Q4_K's 256"),
    "block over rows": (tensors(C.tensor("a", (16, 2), T_Q4_0, 0)), "rows of 16, not a multiple of Q4_0's 32"),
    "tensor twice": (tensors(C.tensor("a", (8,), 0, 0), C.tensor("a", (8,), 0, 32)), "tensor a is there twice"),
    "offset off alignment": (tensors(C.tensor("a", (8,), 0, 0), C.tensor("b", (8,), 0, 36)), "tensor b starts at 36"),
    "overlap": (tensors(C.tensor("a", (16,), 0, 0), C.tensor("b", (8,), 0, 32)), "where the one before ends, 64"),
    "hole": (tensors(C.tensor("a", (8,), 0, 0), C.tensor("b", (8,), 0, 64)), "where the one before ends, 32"),
    "out of order": (tensors(C.tensor("a", (8,), 0, 32), C.tensor("b", (8,), 0, 0)), "tensor a starts at 32"),
    "offset outside": (tensors(C.tensor("a", (8,), 0, 2**64 - 32)), "tensor a starts at 18,446,744,073,709,551,584"),
    "data cut": (
        tensors(C.tensor("a", (8,), 0, 0), C.tensor("b", (9,), 0, 32), data=67),
        "the data of tensor b ends at",
    ),
    "no data": (
        tensors(C.tensor("a", (8,), 0, 0), data=0),
        "the data of tensor a ends at byte 96, but the file has 64",
    ),
    "split by a bool": (C.file([C.key("split.count", BOOL, b"\1")]), "split.count is not an integer"),
    "split, no set": (C.file([C.key("split.count", U16, C.pack("H", 3))]), "one of 3 shards, but its name"),
    "big-endian count": (Craft(">").file(n_tensors=HUGE), "the tensor count is 1,000,000,000"),
    "version 1 string": (Craft(version=1).file([C.pack("I", 2**32 - 1)]), "needs 4,294,967,295 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line_no_time_and_no_memory(what, tmp_path):
    raw, words = REFUSED[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FormatError) as caught:
        read_gguf(path)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    error = caught.value
    assert words in error.what
    assert error.where == str(path) and error.hint
    assert len(str(error).splitlines()) == 1 and len(error.what) < 400
    assert error.offset is None or 0 <= error.offset <= len(raw)
    assert error.offset is not None or what.startswith("split")
    assert seconds < 0.5 and peak < 1 << 20


def test_an_array_of_a_billion_in_49_bytes_answers_in_milliseconds(tmp_path):
    raw = C.file([C.array("a", STRING, HUGE, b"")], alignment=1)
    assert len(raw) == 49
    (tmp_path / "m.gguf").write_bytes(raw)
    start = time.process_time()
    with pytest.raises(FormatError, match="more than fit in the 0 bytes left"):
        read_gguf(tmp_path / "m.gguf")
    assert time.process_time() - start < 0.05


def test_a_header_without_end_is_refused_though_the_file_has_the_bytes(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(C.file([C.key("a", STRING, C.pack("Q", 1 << 29))]))
    with open(path, "r+b") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(FormatError, match=r"the header runs past 256 MiB in key a"):
        read_gguf(path)


def test_every_truncation_of_a_sound_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND)
    sound = read_gguf(path)
    last = sound.tensors["b.weight"]
    end = last.offset + last.nbytes
    for length in range(end):
        with pytest.raises(FormatError):
            parse_header(SOUND[:length], path)
    assert parse_header(SOUND[:end], path).tensors == sound.tensors, "the padding at the end may be missing"


def parse_or_refuse(raw: bytes) -> Header | None:
    """The header of `raw`, which then keeps the promises made to those who use it; None where it is refused."""
    start = time.process_time()
    try:
        header = parse_header(raw, "m.gguf")
    except FormatError as error:
        assert len(str(error).splitlines()) == 1
        return None
    finally:
        assert time.process_time() - start < 0.5
    end = 0
    for info in header.tensors.values():
        assert end < info.offset < info.offset + info.nbytes <= len(raw)
        end = info.offset + info.nbytes - 1
    return header


def test_any_byte_of_the_header_changed():
    """Whatever is still accepted, llama.cpp's parser accepts as well."""
    accepted = 0
    end = len(SOUND) - 192
    for at, flip in itertools.product(range(end), (0x01, 0x02, 0x20, 0x80, 0xFF)):
        raw = bytearray(SOUND)
        raw[at] ^= flip
        if parse_or_refuse(bytes(raw)):
            accepted += 1
            assert parses(bytes(raw)), f"byte {at} ^ {flip:#x}"
    assert parses(SOUND) and 0 < accepted < 5 * end


NUMBERS = (0, 1, 2, 31, 63, 64, 127, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
EDITS = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, len(SOUND) - 1), st.integers(0, 255)),
    st.tuples(st.just("u32"), st.integers(0, len(SOUND) - 1), st.sampled_from(NUMBERS).map(lambda n: n % 2**32)),
    st.tuples(st.just("u64"), st.integers(0, len(SOUND) - 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("cut"), st.integers(0, len(SOUND) - 1), st.integers(0, 64)),
    st.tuples(st.just("repeat"), st.integers(0, len(SOUND) - 1), st.integers(1, 64)),
)


def edited(raw: bytes, kind: str, at: int, number: int) -> bytes:
    if kind == "cut":
        return raw[:at] + raw[at + number :]
    if kind == "repeat":
        return raw[: at + number] + raw[at:]
    new = struct.pack({"byte": "<B", "u32": "<I", "u64": "<Q"}[kind], number)
    return raw[:at] + new + raw[at + len(new) :]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(EDITS, min_size=1, max_size=4))
def test_files_mangled_at_random_parse_or_are_refused(edits):
    raw = SOUND
    for edit in edits:
        raw = edited(raw, *edit)
    tracemalloc.start()
    header = parse_or_refuse(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    if header and header.version > 1 and header.order == "<":
        assert parses(raw)
