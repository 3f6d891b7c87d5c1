"""Our encoders against libggml, byte for byte: torch's, that every device may give llama.cpp's file, and numpy's."""

from __future__ import annotations

import codec_rows
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.codecs import CODECS, Codec, decode, encode, iquants_numpy, lookup, sharing
from quantkit.codecs.search import descend, root, search_affine, search_positive, search_symmetric, total

IN_TORCH = [name for name, codec in CODECS.items() if codec.encode and codec.block > 1]
IMPORTANCE = ["none", "uniform", "squares", "outliers", "part zero", "blocks zero", "zero"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of small operations gain nothing from threads and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_torch(codec: Codec, x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return codec.join(codec.encode(x, importance)).view(len(x), -1)


def by_numpy(codec: Codec, x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    made = torch.empty(len(x), codec.row_bytes(x.shape[1]), dtype=torch.uint8)
    iquants_numpy.ENCODERS[codec.name](x.numpy(), None if importance is None else importance.numpy(), made.numpy())
    return made


BY = [(by_torch, name) for name in IN_TORCH] + [(by_numpy, name) for name in iquants_numpy.ENCODERS]


def test_the_common_types_have_a_torch_encoder():
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"} <= set(IN_TORCH)
    assert {f"Q{bits}_K" for bits in range(2, 7)} <= set(IN_TORCH)


@codec_rows.SAME_ARITHMETIC
@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize(("by", "name"), BY)
def test_it_encodes_as_libggml_does(by, name, kind):
    codec, width = lookup(name), 768
    importance = None if kind == "none" else codec_rows.importance(width, kind)
    kinds = codec_rows.rows(width)
    x = torch.cat(list(kinds.values()))
    same = (by(codec, x, importance) == codec_rows.ggml_encode(codec, x, importance)).all(1)
    owners = [key for key, rows in kinds.items() for _ in rows]
    assert same.all(), {owners[row] for row in (~same).nonzero()[:, 0].tolist()}


@codec_rows.SAME_ARITHMETIC
@given(
    by_name=st.sampled_from(BY),
    seed=st.integers(0, 2**32),
    power=st.sampled_from([1, 2, 3, 7]),
    exponent=st.integers(-9, 4),
    column_power=st.sampled_from([0, 1, 6]),
    weighted=st.sampled_from([None, 1, 4, 8]),
)
@settings(max_examples=60, deadline=None)
def test_it_encodes_any_rows_as_libggml_does(by_name, seed, power, exponent, column_power, weighted):
    (by, name), width = by_name, 512
    codec, g = lookup(name), torch.Generator().manual_seed(seed)
    x = torch.randn(3, width, generator=g).pow(power) * torch.rand(width, generator=g).pow(column_power)
    x *= 10.0**exponent / x.abs().max()
    importance = None if weighted is None else torch.randn(width, generator=g).abs().pow(weighted)
    assert torch.equal(by(codec, x, importance), codec_rows.ggml_encode(codec, x, importance))


@codec_rows.SAME_ARITHMETIC
def test_a_scale_below_zero_wraps_around_as_in_ggml():
    """A known quirk: where importance all but vanishes a sub-block's scale may come out negative, and ggml keeps its
    rounded value in a uint8_t. Some of these 768 blocks have one."""
    rows, width = 96, 2048
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=g) * torch.rand(width, generator=g).pow(6)
    importance = torch.rand(width, generator=g) * (torch.rand(width, generator=g) > 0.7)

    squares = x.square()
    sigma2 = 2 * squares.view(rows, -1, 256).mean(2).repeat_interleave(256, 1)
    w = importance * (sigma2 + squares).sqrt()
    scales, _, _ = search_affine(x.view(-1, 32).T, w.view(-1, 32).T, 15, -0.9, 0.05, 36)
    assert (scales < 0).any()

    for name in ("Q2_K", "Q4_K", "Q5_K"):
        codec = lookup(name)
        assert torch.equal(by_torch(codec, x, importance), codec_rows.ggml_encode(codec, x, importance))


def test_more_bits_and_importance_lower_the_error():
    x = codec_rows.rows(768)["heavy"]
    importance = codec_rows.importance(768, "squares")

    def error(name: str, weights: torch.Tensor | None) -> float:
        back = decode(name, by_torch(lookup(name), x, weights), x.shape)
        return float((importance * (x - back).square()).sum())

    errors = [error(f"Q{bits}_K", None) for bits in range(2, 7)]
    assert errors == sorted(errors, reverse=True)
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q4_0", "Q4_1", "IQ4_XS"):
        assert error(name, importance) < error(name, None)


def test_root_is_rounded_once():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert (root(x).numpy() == x.numpy() ** 0.5).all()


def test_total_adds_from_first_to_last():
    terms = torch.tensor([1e8, 1.0, 1.0, 1.0, -1e8])  # float32 loses each 1.0 beside 1e8
    assert total(terms[:, None]).item() == 0.0
    assert total(terms.flip(0)[[0, 4, 1, 2, 3], None]).item() == 3.0


def test_searches_find_a_grid_that_is_there():
    """Values made from whole codes: each search returns the scale and the codes they were made from."""
    codes = torch.tensor([[-4.0, 3, 1, 0, -2, 2, -1, 1]]).T
    d, found = search_symmetric(0.5 * codes, torch.ones_like(codes), 4)
    assert d.item() == 0.5
    assert torch.equal(found - 4, codes)

    codes = torch.tensor([[0.0, 15, 7, 3, 11, 1, 2, 5]]).T
    d, low, found = search_affine(0.25 * codes - 1, torch.ones_like(codes), 15, -0.9, 0.05, 36)
    assert (d.item(), low.item()) == (0.25, -1.0)
    assert torch.equal(found, codes)

    d, found = search_positive(0.25 * codes, torch.ones_like(codes), 15)
    assert d.item() == 0.25
    assert torch.equal(found, codes)


def test_descend_raises_what_the_scale_takes_off_the_error():
    g = torch.Generator().manual_seed(5)
    x, w = torch.randn(16, 40, generator=g), torch.rand(16, 40, generator=g)
    start = torch.randint(-4, 4, (16, 40), generator=g).float()
    d, codes = descend(x, w, start, -4, 3, torch.int8)

    def gain(codes: torch.Tensor) -> torch.Tensor:
        return (w * x * codes).sum(0).square() / (w * codes * codes).sum(0)

    assert (gain(codes) >= gain(start) * (1 - 1e-6)).all()
    torch.testing.assert_close(d, (w * x * codes).sum(0) / (w * codes * codes).sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODECS)
def test_a_gpu_writes_and_reads_the_same_bytes(name, monkeypatch):
    monkeypatch.setattr(sharing, "SLAB_ELSEWHERE", 10 * 768)
    x = torch.cat([rows for key, rows in codec_rows.rows(768).items() if key != "huge"])
    importance = codec_rows.importance(768, "squares")
    for weights in [importance] if lookup(name).requires_importance else [None, importance]:
        expected = encode(name, x, weights)
        raw = encode(name, x.cuda(), weights)
        assert raw.device.type == "cuda"
        assert torch.equal(raw.cpu(), expected)
        assert torch.equal(decode(name, raw, x.shape).cpu(), decode(name, expected, x.shape))
