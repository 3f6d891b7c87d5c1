"""What is never held whole: the tensors outside the blocks, of which an embedding may be most of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as T
from toy import tokenizer, toy_model, write_toy

from quantkit import Recipe, calibration_batch, convert, load_text, make_plan, open_model
from quantkit.events import Failed, VariantDone
from quantkit.forward import EMBEDDING
from quantkit.model import Model

TARGETS = ("fp16", "gptq-4bit-64g", "awq-4bit-64g", "Q4_K_M")


def written(path: Path, dtype: torch.dtype | None) -> Path:
    """The toy as a GGUF, or as a folder of one float type."""
    if dtype is None:
        return write_toy(path / "Toy.Q8_0.gguf", toy_model(), T.Q8_0)
    toy_model().to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def refusing(model: Model) -> Model:
    """The model, without a way to read a tensor outside the blocks as a whole."""

    def whole() -> torch.Tensor:
        raise AssertionError("read whole")

    refs = {n: replace(r, read=whole) if r.placed.layer is None else r for n, r in model.tensors.items()}
    return replace(model, tensors=refs)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["gguf", "folder"])
def test_no_outer_tensor_is_read_whole_where_it_is_only_copied(tmp_path, dtype):
    model = refusing(open_model(written(tmp_path, dtype)))
    recipe = Recipe(to=TARGETS, samples=4, seqlen=64, eval_text=None)
    rows = calibration_batch(load_text("default"), model.tokenizer(), 4, 64)
    events = list(convert(model, make_plan(model, recipe, "cpu"), tmp_path / "out", "cpu", rows, None, None))
    assert [e.output.target for e in events if isinstance(e, VariantDone)] == list(TARGETS)
    assert not [e for e in events if isinstance(e, Failed)]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_those_of_the_whole(tmp_path, dtype):
    model = open_model(written(tmp_path, dtype))
    some = torch.tensor([3, 7, 7, 319])
    assert torch.equal(model.tensors[EMBEDDING].some(some), model.tensors[EMBEDDING].read()[some])
    for ref in model.tensors.values():
        whole = ref.read().reshape(-1, ref.shape[-1])
        assert torch.equal(ref.rows()(slice(0, len(whole))), whole), ref.placed.hf
