"""What `check_seals` finds in a GGUF that was written and then damaged."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as T
from toy import toy_model, write_toy

from quantkit.errors import VerifyError
from quantkit.files.gguf import GGUF, read_gguf
from quantkit.files.raw import seal
from quantkit.model import open_model
from quantkit.plan import make_plan
from quantkit.recipe import load_recipe
from quantkit.seal import check_seals
from quantkit.targets import Output

UP, GATE = "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("sound") / "Toy.Q4_0.gguf", toy_model(), T.Q4_0)


@pytest.fixture(scope="module")
def output(sound) -> Output:
    """The plan by which the file would be written again as it is."""
    recipe = load_recipe(None, {"to": ["Q4_0"], "pure": True, "output_type": "Q4_0"})
    recipe = recipe.model_copy(update={"calibration": None, "eval_text": None})
    return make_plan(open_model(sound), recipe, torch.device("cpu")).outputs[0]


def flipped(raw: bytearray, source: GGUF) -> None:
    raw[source.tensors[UP].offset + 77] ^= 0x10


def swapped(raw: bytearray, source: GGUF) -> None:
    up, gate = (slice(t.offset, t.offset + t.nbytes) for t in (source.tensors[UP], source.tensors[GATE]))
    raw[up], raw[gate] = raw[gate], raw[up]


def retyped(raw: bytearray, source: GGUF) -> None:
    at = raw.index(UP.encode()) + len(UP) + 4 + 2 * 8
    assert raw[at] == T.Q4_0
    raw[at] = T.IQ4_NL  # a block of as many bytes and weights


def cut(raw: bytearray, source: GGUF) -> None:
    del raw[-32:]


def turned_to_infinity(raw: bytearray, source: GGUF) -> None:
    raw[source.tensors[UP].offset + 1] = 0x7C


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flipped, f"the tensor {UP} does not read back as it was written"),
        (swapped, f"the tensor {GATE} does not read back as it was written"),
        (retyped, rf"the tensor {UP} is IQ4_NL \(512, 256\) where Q4_0 \(512, 256\) was planned"),
        (cut, "bytes where .* were planned"),
        (turned_to_infinity, f"the tensor {UP} does not read back as it was written"),
    ],
)
def test_a_damaged_output_is_told_by_what_is_wrong(sound, output, tmp_path, damage, says):
    source, path = read_gguf(sound), tmp_path / "Toy.gguf"
    seals = {row.source: seal([source.raw(row.name)]) for row in output.rows}
    written = gguf_of(output, source, tmp_path / "written.gguf")
    assert list(check_seals(output, written, seals)) == [row.name for row in output.rows]
    raw = bytearray(written.read_bytes())
    damage(raw, read_gguf(written))
    path.write_bytes(raw)
    with pytest.raises(VerifyError, match=says):
        list(check_seals(output, path, seals))


def gguf_of(output: Output, source: GGUF, path: Path) -> Path:
    with output.writer(path) as writer:
        for row in output.rows:
            writer.write(row.name, source.raw(row.name))
    return path


def test_a_small_file_that_differs_is_told(sound, tmp_path):
    recipe = load_recipe(None, {"to": ["fp16"]}).model_copy(update={"calibration": None, "eval_text": None})
    output = make_plan(open_model(sound), recipe, torch.device("cpu")).outputs[0]
    seals, tensors = {}, open_model(sound).tensors
    with output.writer(tmp_path / "fp16") as writer:
        for row in output.rows:
            half = tensors[row.source].read().half()
            seals[row.source] = seal([half])
            writer.write(row.name, half)
    assert list(check_seals(output, tmp_path / "fp16", seals)) == [row.name for row in output.rows]
    config = tmp_path / "fp16" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 256', '"hidden_size": 255'))
    with pytest.raises(VerifyError, match=re.escape("the file config.json does not read back as it was written")):
        list(check_seals(output, tmp_path / "fp16", seals))


def test_floats_are_sealed_and_packed_folders_are_taken_apart(sound):
    recipe = load_recipe(None, {"to": ["fp16", "gptq", "Q4_K_M"]}).model_copy(update={"eval_text": None})
    outputs = make_plan(open_model(sound), recipe, torch.device("cpu")).outputs
    assert {o.target: o.sealed for o in outputs} == {"fp16": True, "gptq": False, "Q4_K_M": True}


def test_two_decoders_that_differ_are_told(sound, output, tmp_path, monkeypatch):
    """A decoder that reads one weight of a block otherwise is found on the rows both are given."""
    from quantkit import seal as module

    source = read_gguf(sound)
    written = gguf_of(output, source, tmp_path / "written.gguf")
    seals = {row.source: seal([source.raw(row.name)]) for row in output.rows}
    decode = module.dequantize

    def wrong(raw, kind):
        values = decode(raw, kind).copy()
        values[-1, -1] += 1
        return values

    monkeypatch.setattr(module, "dequantize", wrong)
    with pytest.raises(VerifyError, match=re.escape("two decoders read the tensor")):
        list(check_seals(output, written, seals))
    assert gguf.GGUFReader(written).tensors
