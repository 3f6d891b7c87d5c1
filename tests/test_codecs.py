"""Every block type: the torch decoder against libggml and gguf-py bit for bit, libggml in threads against one call."""

from __future__ import annotations

import doctest

import codec_rows
import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.codecs import CODECS, bits, decode, decode_torch, encode, ggml, lookup, sharing
from quantkit.codecs.parts import Parts
from quantkit.errors import BadInput, FormatError, Unsupported, UsageError

BLOCKS = [name for name, codec in CODECS.items() if codec.block > 1]
CASTS = [name for name, codec in CODECS.items() if codec.block == 1]
NOT_IN_GGUF_PY = {"Q1_0"}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit; NaNs are equal to each other whatever their payload."""
    finite = a.isfinite()
    return (
        a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a[finite].view(torch.int32), b[finite].view(torch.int32))
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def encoded(name: str, x: torch.Tensor) -> torch.Tensor:
    return encode(name, x, codec_rows.importance(x.shape[-1]) if CODECS[name].requires_importance else None)


def one_call(name: str, x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """All rows by a single ggml_quantize_chunk, as llama.cpp would call it with one thread."""
    out = torch.empty(len(x), lookup(name).row_bytes(x.shape[1]), dtype=torch.uint8)
    imatrix = None if importance is None else importance.data_ptr()
    number, library = gguf.GGMLQuantizationType[name].value, ggml._library()
    written = library.ggml_quantize_chunk(number, x.data_ptr(), out.data_ptr(), 0, *x.shape, imatrix)
    assert written == out.numel()
    return out


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_ggufs(name):
    codec = lookup(name)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (codec.block, codec.nbytes)
    assert codec.row_bytes(3 * codec.block) == 3 * codec.nbytes


def test_a_row_is_whole_blocks():
    with pytest.raises(ValueError, match="a row of 33 does not divide into Q4_0 blocks of 32"):
        lookup("Q4_0").row_bytes(33)


def test_every_quantized_type_of_gguf_is_known():
    """But for those of activations, which no file holds, and those ggml has removed."""
    sizes = gguf.GGML_QUANT_SIZES
    assert {t.name for t in sizes} - set(CODECS) == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


@codec_rows.SAME_ARITHMETIC
@pytest.mark.parametrize("name", BLOCKS)
def test_torch_decodes_encoded_rows_as_libggml_and_gguf_py_do(name):
    codec = lookup(name)
    for kind, x in codec_rows.rows(width=768).items():
        raw = encoded(name, x)
        ours = decode_torch(codec, raw).view(x.shape)
        assert same_bits(ours, codec_rows.ggml_decode(codec, raw).view(x.shape)), kind
        assert same_bits(ours, decode(name, raw, x.shape)), kind
        if name not in NOT_IN_GGUF_PY:
            theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])
            assert torch.equal(ours, torch.from_numpy(np.ascontiguousarray(theirs)).view(x.shape)), kind


@codec_rows.SAME_ARITHMETIC
@pytest.mark.parametrize("name", BLOCKS)
def test_torch_decodes_any_bytes_as_libggml_does(name):
    codec = lookup(name)
    raw = torch.randint(0, 256, (700, codec.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    assert same_bits(decode_torch(codec, raw), codec_rows.ggml_decode(codec, raw))
    single = torch.cat([decode_torch(codec, block) for block in raw[:9]])  # blocks that start at odd addresses
    assert same_bits(single, codec_rows.ggml_decode(codec, raw[:9]))


@pytest.mark.parametrize("name", CASTS)
def test_casts_are_ggmls(name):
    codec, kind = lookup(name), gguf.GGMLQuantizationType[name]
    x = torch.cat([rows for key, rows in codec_rows.rows(width=96).items() if key != "huge"])
    raw = encode(name, x)
    assert raw.shape[1] == codec.row_bytes(96)
    assert torch.equal(raw, one_call(name, x, None))
    assert torch.equal(decode(name, raw, x.shape), torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind).copy()))


@pytest.mark.parametrize("name", BLOCKS)
def test_threads_write_the_bytes_of_one_call(name, monkeypatch):
    """23 rows in pieces of one or two on three threads, against a single ggml_quantize_chunk."""
    codec, width = lookup(name), 512
    x = torch.randn(23, width, generator=torch.Generator().manual_seed(1))
    weights = codec_rows.importance(width)
    monkeypatch.setattr(sharing, "SLAB", 2 * width)
    monkeypatch.setattr(sharing.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(sharing.torch, "set_num_threads", lambda count: None)  # or all later tests would have three
    for importance in [weights] if codec.requires_importance else [None, weights]:
        raw = encode(name, x, importance)
        single = one_call(name, x, importance)
        assert torch.equal(raw, single)
        assert same_bits(decode(name, raw, x.shape), codec_rows.ggml_decode(codec, single).view(x.shape))


def test_leading_dimensions_are_rows():
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(2))
    raw = encode("Q5_0", x)
    assert raw.shape == (30, lookup("Q5_0").row_bytes(64))
    assert torch.equal(raw, encode("Q5_0", x.flatten(0, 2)))
    assert torch.equal(raw[:1], encode("Q5_0", x[0, 0, 0]))
    assert decode("Q5_0", raw, x.shape).shape == x.shape
    assert torch.equal(encode("Q5_0", x.double()), raw)
    assert torch.equal(encode("Q5_0", x.transpose(0, 1)), encode("Q5_0", x.transpose(0, 1).contiguous()))


@pytest.mark.parametrize("name", BLOCKS)
def test_byteswap_turns_the_wide_fields_only(name):
    codec = lookup(name)
    raw = torch.arange(3 * codec.nbytes).to(torch.uint8).view(3, -1)
    swapped = torch.from_numpy(codec.byteswap(raw.numpy()))
    assert np.array_equal(codec.byteswap(swapped.numpy()), raw.numpy())
    little, big = codec.split(raw), codec.split(swapped)
    for field in little:
        turned = little[field].view(torch.uint8).numpy().view(f"V{little[field].itemsize}")
        assert big[field].view(torch.uint8).numpy().tobytes() == b"".join(v.tobytes()[::-1] for v in turned.flat)


def test_split_and_join_are_inverse():
    for codec in CODECS.values():
        raw = torch.arange(5 * codec.nbytes).to(torch.uint8).view(5, -1)
        assert torch.equal(codec.join(codec.split(raw)), raw)


@given(st.sampled_from([(1, 1), (1, 32), (2, 4), (2, 32), (4, 1), (4, 16), (4, 64)]), st.integers(1, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_pack_and_unpack_are_inverse(layout, runs, data):
    width, run = layout
    packed = torch.tensor([list(data.draw(st.binary(min_size=run * runs, max_size=run * runs)))], dtype=torch.uint8)
    values = bits.unpack(packed, width, run)
    assert values.shape == (1, packed.numel() * 8 // width)
    assert int(values.max()) < 2**width
    assert torch.equal(bits.pack(values, width, run), packed)


@given(st.binary(min_size=12, max_size=12))
def test_six_bit_scales_are_inverse(raw):
    packed = torch.tensor([list(raw)], dtype=torch.uint8)
    assert torch.equal(bits.pack_scale_min_k4(*bits.unpack_scale_min_k4(packed)), packed)
    assert torch.equal(bits.pack_scales_q3(bits.unpack_scales_q3(packed)), packed)


def test_examples_in_docstrings():
    assert doctest.testmod(bits).failed == 0


def test_an_unknown_type_names_the_known_ones():
    with pytest.raises(Unsupported, match=r"Q9_Z.*Q4_K") as caught:
        decode("Q9_Z", torch.zeros(4, dtype=torch.uint8), (4,))
    assert caught.value.exit_code == 65


def test_bytes_and_shape_must_agree():
    raw = torch.zeros(36, dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"36 bytes where Q4_0 of shape \(3, 32\) takes 54"):
        decode("Q4_0", raw, (3, 32))
    with pytest.raises(FormatError, match="rows of 48"):
        decode("Q4_0", raw, (2, 48))
    with pytest.raises(TypeError, match="uint8"):
        decode("Q4_0", raw.short(), (2, 32))


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS", "F16", "F32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(name, bad):
    x = torch.ones(3, 256)
    x[1, 77] = bad
    with pytest.raises(BadInput, match="not finite"):
        encode(name, x, torch.ones(256))


@pytest.mark.parametrize("name", [name for name in CODECS if lookup(name).requires_importance])
def test_importance_is_required(name):
    """Of every type for which libggml would abort, and of IQ1_M, which it encodes badly without."""
    with pytest.raises(UsageError, match=f"{name} cannot be encoded without an importance matrix"):
        encode(name, torch.ones(1, 256))


def test_required_importance_is_what_ggml_requires():
    requires = ggml._library().ggml_quantize_requires_imatrix
    theirs = {name for name in CODECS if requires(gguf.GGMLQuantizationType[name].value) & 1}
    assert theirs | {"IQ1_M"} == {name for name in CODECS if lookup(name).requires_importance}


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e20])
def test_importance_must_be_a_row_of_plain_numbers(value):
    importance = torch.ones(64)
    with pytest.raises(BadInput, match=r"shape \(32,\) where the rows have 64"):
        encode("Q4_0", torch.ones(3, 64), importance[:32])
    importance[5] = value
    with pytest.raises(BadInput, match="holds a value"):
        encode("Q4_0", torch.ones(3, 64), importance)


@pytest.mark.parametrize(("name", "largest"), [("Q4_0", 1e6), ("Q6_K", 9e8), ("F16", 7e4), ("MXFP4", 2e8)])
def test_what_a_type_cannot_hold_is_refused(name, largest):
    with pytest.raises(BadInput, match=f"cannot encode as {name}: a weight"):
        encode(name, torch.full((2, 256), largest))


def test_width_must_divide():
    with pytest.raises(BadInput, match=r"2 rows of 160 weights do not divide into Q4_K blocks of 256.*Q8_0"):
        encode("Q4_K", torch.ones(2, 160))


def test_another_libggml_by_the_environment(monkeypatch, tmp_path):
    shared_object = ggml.find()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    expected = encode("Q4_1", x)
    for place in (shared_object, shared_object.parent):
        monkeypatch.setenv(ggml.ENVIRONMENT, str(place))
        assert torch.equal(encode("Q4_1", x), expected)
    (tmp_path / "libggml-base.so").write_text("not a library")
    for place in (tmp_path, tmp_path / "missing.so"):
        monkeypatch.setenv(ggml.ENVIRONMENT, str(place))
        with pytest.raises(BadInput, match=f"cannot use libggml.*{ggml.ENVIRONMENT}"):
            encode("Q4_1", x)


@codec_rows.SAME_ARITHMETIC
def test_without_libggml_torch_does_what_it_can(monkeypatch):
    x = torch.randn(9, 768, generator=torch.Generator().manual_seed(4))
    expected = {name: encode(name, x) for name in ("Q4_K", "IQ3_S")}
    values = {name: decode(name, raw, x.shape) for name, raw in expected.items()}
    monkeypatch.setattr(ggml, "find", lambda: None)
    monkeypatch.setattr(sharing, "SLAB", 2 * 768)
    assert torch.equal(encode("Q4_K", x), expected["Q4_K"])
    assert torch.equal(decode("Q4_K", expected["Q4_K"], x.shape), values["Q4_K"])
    assert torch.equal(decode("IQ3_S", expected["IQ3_S"], x.shape), values["IQ3_S"])
    with pytest.raises(BadInput, match=r"libggml is not installed.*pip install libggml-python"):
        encode("IQ3_S", x)


LADDERS = [name for name, codec in CODECS.items() if codec.ladder]


@pytest.mark.parametrize("name", LADDERS)
def test_parts_put_together_are_the_bytes_they_were_taken_from(name):
    """Random bytes, but for scales that are no numbers, whose payload does not matter."""
    codec = lookup(name)
    raw = torch.randint(0, 256, (900, codec.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    fields = codec.split(raw)
    number = torch.stack([fields[f].float().isfinite().all(1) for f in ("d", "dmin", "m") if f in fields]).all(0)
    fields = {f: value[number] for f, value in fields.items()}
    parts = codec.ladder.read(**fields)
    assert torch.equal(codec.join(codec.ladder.write(parts)), raw[number])


@pytest.mark.parametrize("name", LADDERS)
def test_any_parts_in_range_are_written_and_read_as_they_are(name):
    """Every code and integer, from the least to the largest, in struct and in value."""
    codec, ladder = lookup(name), lookup(name).ladder
    generator = torch.Generator().manual_seed(4)
    was = ladder.read(**codec.split(encode(name, torch.randn(64, codec.block, generator=generator))))

    def drawn(like, bounds):
        low, high = bounds
        return None if like is None else torch.randint(low, high + 1, like.shape, generator=generator).to(like)

    codes = drawn(was.codes, (0, len(ladder.levels) - 1))
    parts = Parts(codes, was.d, drawn(was.scales, ladder.scales), was.dmin, drawn(was.mins, ladder.mins))
    raw = codec.join(ladder.write(parts))
    again = ladder.read(**codec.split(raw))
    for field in ("codes", "d", "scales", "dmin", "mins"):
        one, other = getattr(parts, field), getattr(again, field)
        assert one is other is None or torch.equal(one, other), field
    assert same_bits(ladder.values(parts), codec_rows.ggml_decode(codec, raw).view(64, -1))
    assert torch.equal(ladder.nearest(torch.tensor(ladder.levels)), torch.arange(len(ladder.levels)).to(torch.uint8))
