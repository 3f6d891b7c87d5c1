"""Importance matrices: values against hooks in transformers' model, files against gguf-py and llama.cpp's layout."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from test_convert import quantkit
from toy import CONFIG, family_model, gguf_name, toy_model, write_toy

from quantkit.codecs import ggml, lookup
from quantkit.errors import BadInput, FormatError
from quantkit.files.gguf import read_gguf
from quantkit.files.imatrix import Imatrix, merge, read_imatrix, spread, write_imatrix
from quantkit.forward import last, network
from quantkit.importance import measure
from quantkit.model import open_model

WORDS = "the rest is noise and so on "


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("source") / "Toy.F32.gguf", toy_model(), T.F32)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 60)
    return path


def hooked(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What llama-imatrix sums, by hooks on every linear module of transformers' model: GGUF name -> (in,) float64."""
    model, sums = toy_model(), {}

    def hook(name: str):
        def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0].double().flatten(0, -2).square().sum(0)

        return note

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(gguf_name(f"{name}.weight")))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    return sums


def test_values_are_the_squares_that_every_matrix_is_fed(source):
    ids = torch.randint(2, CONFIG["vocab_size"], (3, 48), generator=torch.Generator().manual_seed(5))
    ours = last(measure(network(open_model(source), torch.device("cpu")), ids, "words"))
    theirs = hooked(ids)
    assert ours.sums.keys() == theirs.keys() and len(theirs) == 21
    for name, sums in theirs.items():
        assert np.allclose(ours.sums[name][0], sums.numpy(), rtol=1e-4, atol=1e-6), name
        assert ours.counts[name].tolist() == [144]
    assert (ours.datasets, ours.chunks, ours.chunk_size) == (("words",), 3, 48)


def called(name: str, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What transformers multiplies with each expert's own part of a stack: GGUF name -> sums (experts, in), counts."""
    model, sums, plain = family_model(name), {}, torch.nn.functional.linear
    stacks, model.config._experts_implementation = {}, "eager"
    for path, p in model.named_parameters():
        if ".experts." in path:
            kind, layer = path.rpartition(".")[2], path.split(".")[2]
            for e, part in enumerate(p):
                stacks[part.data_ptr()] = (f"blk.{layer}.{kind}", e, len(p))

    def linear(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        if weight.data_ptr() in stacks:
            stack, e, count = stacks[weight.data_ptr()]
            total, rows = sums.setdefault(stack, (torch.zeros(count, x.shape[-1]).double(), torch.zeros(count)))
            total[e] += x.double().square().sum(0)
            rows[e] += len(x)
        return plain(x, weight, *bias)

    with torch.no_grad(), mock.patch("torch.nn.functional.linear", linear):
        for row in ids:
            model(row[None])
    return sums


@pytest.mark.parametrize("name", ["mixtral", "qwen3-experts"])
def test_every_expert_has_the_squares_of_its_own_tokens(families, name, tmp_path):
    ids = torch.randint(2, 320, (3, 48), generator=torch.Generator().manual_seed(5))
    ours = last(measure(network(open_model(families / f"{name}.gguf"), torch.device("cpu")), ids, "words"))
    write_imatrix(tmp_path / "m.gguf", ours)
    ours = read_imatrix(tmp_path / "m.gguf")
    sources = {"ffn_gate_exps": "gate_up_proj", "ffn_up_exps": "gate_up_proj", "ffn_down_exps": "down_proj"}
    theirs = called(name, ids)
    for layer in range(3):
        for stack, source in sources.items():
            total, rows = theirs[f"blk.{layer}.{source}"]
            entry = f"blk.{layer}.{stack}.weight"
            assert ours.counts[entry].tolist() == rows.tolist() and len(set(rows.tolist())) > 1
            assert np.allclose(ours.sums[entry], total.numpy(), rtol=1e-4, atol=1e-6)
        assert ours.counts[f"blk.{layer}.ffn_gate_inp.weight"].tolist() == [144]


def test_an_expert_is_encoded_by_its_own_importance(families, text, tmp_path):
    """llama.cpp's encoder, given each expert's importance from the file that was left beside the output."""
    sizes = ["--calibration", text, "--samples", 4, "--seqlen", 64, "--no-eval"]
    code, _, stderr = quantkit("convert", families / "qwen3-experts.gguf", "-o", tmp_path / "o", "--to", "Q4_0", *sizes)
    assert code == 0, stderr
    made = read_gguf(tmp_path / "o" / "qwen3-experts-Q4_0.gguf")
    importance = read_imatrix(tmp_path / "o" / "imatrix.gguf").importance("blk.1.ffn_down_exps.weight")
    weight = open_model(families / "qwen3-experts.gguf").gguf.raw("blk.1.ffn_down_exps.weight").view(torch.float32)
    each = zip(weight.view(5, 96, 64), importance, strict=True)
    theirs = np.concatenate([ggml.encode(lookup("Q4_0"), w.numpy(), i).reshape(-1) for w, i in each])
    assert np.array_equal(made.stored("blk.1.ffn_down_exps.weight"), theirs)


def test_the_command_computes_what_a_conversion_computes(source, text, tmp_path):
    """Up to the order of sums: a conversion gives its calibration one core, the command has them all."""
    sizes = ["--samples", 4, "--seqlen", 64]
    code, stdout, stderr = quantkit("imatrix", source, "--text", text, "-o", tmp_path / "m.gguf", *sizes)
    assert code == 0 and "21 entries from 4 chunks of 64 tokens" in " ".join(stdout.split()), stderr
    options = ["-o", tmp_path / "out", "--to", "Q4_K_M", "--no-eval", "--calibration", text, *sizes]
    code, _, stderr = quantkit("convert", source, *options)
    assert code == 0, stderr
    alone, within = (read_imatrix(tmp_path / p) for p in ("m.gguf", "out/imatrix.gguf"))
    assert (alone.datasets, alone.chunks, alone.chunk_size) == (within.datasets, within.chunks, within.chunk_size)
    assert alone.sums.keys() == within.sums.keys()
    for name, sums in alone.sums.items():
        assert np.array_equal(alone.counts[name], within.counts[name])
        np.testing.assert_allclose(within.sums[name], sums, rtol=1e-5)
    fields = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert fields["blk.1.ffn_down.weight.in_sum2"].shape.tolist() == [512, 1]  # as ggml counts dims: columns, experts
    assert fields["blk.1.ffn_down.weight.counts"].data.tolist() == [[256.0]]


def some(seed: int, experts: int = 1, rows: int = 512, names: tuple[str, ...] = ("blk.0.attn_q.weight",)) -> Imatrix:
    generator = torch.Generator().manual_seed(seed)
    sums = {n: (torch.rand(experts, 64, generator=generator) * rows).numpy() for n in names}
    return Imatrix(sums, {n: np.full(experts, rows) for n in names}, (f"text-{seed}",), rows // 128, 128)


def test_what_is_written_is_read(tmp_path):
    before = some(1, experts=3)
    write_imatrix(tmp_path / "m.gguf", before)
    after = read_imatrix(tmp_path / "m.gguf")
    assert np.array_equal(after.sums["blk.0.attn_q.weight"], before.sums["blk.0.attn_q.weight"])
    assert after.counts["blk.0.attn_q.weight"].tolist() == [512, 512, 512]
    assert (after.datasets, after.chunks, after.chunk_size) == (("text-1",), 4, 128)


def test_an_expert_without_rows_counts_all_columns_alike():
    one = some(1, experts=2)
    one.counts["blk.0.attn_q.weight"][1] = 0
    assert one.importance("blk.0.attn_q.weight")[1].tolist() == [1.0] * 64
    assert spread(one, "blk.0.attn_q.weight").columns == 64


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    """A .dat as `save_imatrix_legacy` writes it."""
    raw = struct.pack("<i", len(entries))
    for name, (chunks, values) in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", chunks, len(values))
        raw += np.array(values, dtype="<f4").tobytes()
    return raw + tail


def test_the_old_format_is_read(tmp_path):
    tail = struct.pack("<ii", 7, 8) + b"wiki.txt"
    (tmp_path / "m.dat").write_bytes(legacy({"blk.0.ffn_up.weight": (4, [8.0, 2.0, 0.0])}, tail))
    found = read_imatrix(tmp_path / "m.dat")
    assert found.importance("blk.0.ffn_up.weight").tolist() == [[2.0, 0.5, 0.0]]
    assert (found.datasets, found.chunks) == (("wiki.txt",), 7)
    (tmp_path / "short.dat").write_bytes(legacy({"blk.0.ffn_up.weight": (4, [8.0])}))
    assert read_imatrix(tmp_path / "short.dat").datasets == ()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0\0",
        b"no matrix at all",
        struct.pack("<i", 1 << 30),
        struct.pack("<ii", 1, 1 << 30),
        struct.pack("<ii", 1, -1),
        legacy({"blk.0.ffn_up.weight": (4, [8.0, 2.0])})[:-1],
        legacy({"blk.0.ffn_up.weight": (4, [])}),
        legacy({"../../etc": (4, [8.0])}),
        legacy({"blk.0.ffn_up.weight": (4, [math.nan])}),
        legacy({"blk.0.ffn_up.weight": (4, [-1.0])}),
    ],
)
def test_what_is_no_importance_matrix_is_refused(raw, tmp_path):
    (tmp_path / "m.dat").write_bytes(raw)
    with pytest.raises(FormatError):
        read_imatrix(tmp_path / "m.dat")


def test_a_model_is_no_importance_matrix(source):
    with pytest.raises(FormatError, match="not an importance matrix"):
        read_imatrix(source)


def test_merging_adds_rows_up(tmp_path):
    one, two = some(1), some(2, rows=1024, names=("blk.0.attn_q.weight", "blk.0.attn_k.weight"))
    for i, part in enumerate((one, two)):
        write_imatrix(tmp_path / f"{i}.gguf", part)
    code, _, stderr = quantkit(
        "imatrix", "--merge", tmp_path / "0.gguf", tmp_path / "1.gguf", "-o", tmp_path / "both.gguf"
    )
    assert code == 0, stderr
    both = read_imatrix(tmp_path / "both.gguf")
    name = "blk.0.attn_q.weight"
    assert np.allclose(both.sums[name], one.sums[name] + two.sums[name])
    assert both.counts[name].tolist() == [1536] and both.counts["blk.0.attn_k.weight"].tolist() == [1024]
    assert (both.datasets, both.chunks, both.chunk_size) == (("text-1", "text-2"), 12, 128)


def test_merging_spreads_one_count_over_experts():
    """A file of one count a weight, as older versions wrote them, joins one with a count for each expert."""
    name = "blk.0.attn_q.weight"
    flat = some(1, experts=1)
    flat = Imatrix({name: np.tile(flat.sums[name], 2)}, flat.counts, flat.datasets, 4, 128)
    both = merge([flat, some(2, experts=2)])
    assert both.sums[name].shape == (2, 64) and both.counts[name].tolist() == [1024, 1024]
    with pytest.raises(BadInput, match="one model"):
        merge([flat, some(2)])


def test_statistics_are_llama_imatrix_s(tmp_path):
    """A closed form: half of the columns 1, half 3, so mean 2, deviation 1, and an entropy to write down."""
    name = "blk.0.attn_q.weight"
    x = np.array([[1.0, 3.0] * 32], np.float32)
    s = spread(Imatrix({name: x * 10}, {name: np.array([10])}, (), 1, 10), name)
    assert (s.rows, s.columns, s.total, s.mean, s.stddev, s.min, s.max, s.active) == (10, 64, 128, 2, 1, 1, 3, 1)
    assert s.entropy == pytest.approx(-sum(32 * p * math.log2(p) for p in (1 / 128, 3 / 128)))


def test_showing(tmp_path):
    write_imatrix(tmp_path / "m.gguf", some(1))
    code, stdout, _ = quantkit("imatrix", "--show", tmp_path / "m.gguf")
    assert code == 0 and "blk.0.attn_q.weight" in stdout and "512" in stdout and "text-1" in stdout
    code, stdout, _ = quantkit("imatrix", "--show", tmp_path / "m.gguf", "--json")
    entry = json.loads(stdout)["entries"]["blk.0.attn_q.weight"]
    assert code == 0 and entry["rows"] == 512 and entry["columns"] == 64


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["{source}"], 2, "no output file"),
        (["{source}", "{source}", "-o", "{out}"], 2, "2 models at once"),
        (["{missing}", "-o", "{out}"], 65, "no such file or folder"),
        (["--show", "{missing}"], 65, "cannot be opened"),
        (["--merge", "{source}", "-o", "{out}"], 65, "not an importance matrix"),
        (["{source}", "--text", "{missing}", "-o", "{out}"], 65, "no such text file"),
    ],
)
def test_bad_input_is_one_line(args, code, says, source, tmp_path):
    places = {"source": source, "missing": tmp_path / "nothing", "out": tmp_path / "out.gguf"}
    status, stdout, stderr = quantkit("imatrix", *(a.format(**places) for a in args))
    assert (status, stdout) == (code, "") and says in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not (tmp_path / "out.gguf").exists()
