"""Mixtures of experts as GPTQ and AWQ folders: the Hub's names, routers left alone, each expert on its own tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_convert import quantkit
from test_families import CTX, ours
from toy import family_model

from quantkit.codecs.grid import Grid
from quantkit.files.imatrix import read_imatrix
from quantkit.model import open_model
from quantkit.solvers.rtn import rtn
from quantkit.targets.folder import linear

NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3-experts": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
TARGETS = ("gptq-8bit-32g", "gptq-4bit-32g", "awq-4bit-32g", "ct-4bit-32g", "Q4_0")


@pytest.fixture(scope="module", params=NAMES)
def made(request, families, tmp_path_factory) -> tuple[str, Path, dict]:
    """All targets of a toy from one calibration; an expert that under 30% of its tokens ask for counts as scarce."""
    out = tmp_path_factory.mktemp(request.param)
    (out / "words.txt").write_text("the rest is noise and so on " * 200)
    options = ("--calibration", out / "words.txt", "--samples", 16, "--seqlen", 128, "--no-eval", "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.targets.folder.SCARCE", 0.3)
        to = [option for t in TARGETS for option in ("--to", t)]
        code, stdout, stderr = quantkit("convert", families / request.param, "-o", out / "made", *to, *options)
    assert code == 0, stderr
    return request.param, out / "made", json.loads(stdout)


def test_names_are_the_hubs_and_routers_are_floats(made):
    name, out, _ = made
    module, parts = NAMES[name]
    for folder, part_of_it in zip(TARGETS[:-1], ("qweight", "qweight", "qweight", "weight_packed"), strict=True):
        with safe_open(out / folder / "model.safetensors", framework="pt") as f:
            stored = set(f.keys())
            router = f.get_tensor(f"model.layers.1.{module}.gate.weight")
        assert all(f"model.layers.2.{module}.experts.4.{part}.{part_of_it}" in stored for part in parts)
        assert router.dtype == torch.float16
    gptq, awq, ct = (json.loads((out / t / "config.json").read_text())["quantization_config"] for t in TARGETS[1:4])
    (left,) = gptq["dynamic"]
    assert left.startswith("-:") and re.match(left[2:], f"model.layers.2.{module}.gate")
    assert not re.match(left[2:], f"model.layers.2.{module}.experts.4.{parts[0]}")
    assert f"{module}.gate" in awq["modules_to_not_convert"] and rf"re:.*\.{module}.gate$" in ct["ignore"]


def state_of(model: torch.nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A folder's tensors as transformers' own module has them, the experts of a layer in stacks."""
    module, (gate, up, down) = NAMES[name]
    state = {n: tensors[n] for n in model.state_dict() if n in tensors}
    for layer in range(3):
        at, to = f"model.layers.{layer}.{module}", f"model.layers.{layer}.mlp"
        stack = {
            part: torch.stack([tensors[f"{at}.experts.{e}.{part}.weight"] for e in range(5)])
            for part in (gate, up, down)
        }
        state[f"{to}.experts.gate_up_proj"] = torch.cat([stack[gate], stack[up]], 1)
        state[f"{to}.experts.down_proj"] = stack[down]
        state[f"{to}.gate.weight"] = tensors[f"{at}.gate.weight"]
    return state


@torch.no_grad()
def test_transformers_computes_the_same_of_what_is_read_back(made, families):
    """The folders' weights in transformers' module give our logits, nearer the source than plain rounding does."""
    name, out, _ = made
    model, source = family_model(name), open_model(families / name)
    ids = torch.tensor([source.tokenizer().encode("the rest is noise and so on " * 40)[:CTX]])

    def logprobs() -> torch.Tensor:
        return torch.log_softmax(model(ids).logits[0, CTX // 2 : CTX - 1], -1)

    def kl(weights: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state_of(model, name, weights))
        return (before.exp() * (before - logprobs())).sum(-1).mean().item()

    before = logprobs()
    plain = {n: ref.read() for n, ref in source.tensors.items()}
    rounded = plain | {n: rtn(plain[n], Grid(4, 32)).dequantize() for n in linear(source)}
    by_rounding = kl(rounded)
    for folder in TARGETS[:-1]:
        most = 1e-3 if "8bit" in folder else by_rounding
        assert kl({n: ref.read() for n, ref in open_model(out / folder).tensors.items()}) < most, folder
        assert torch.allclose(logprobs(), ours(out / folder, ids), atol=2e-4)


def test_experts_that_few_tokens_ask_for_are_rounded_and_reported(made):
    """Those, and no others, whose count in the importance matrix of the same run is under the bound."""
    _, out, report = made
    imatrix, stacks = read_imatrix(out / "imatrix.gguf"), {}
    for layer in range(3):
        tokens = int(imatrix.counts[f"blk.{layer}.ffn_gate_inp.weight"][0])
        stacks[layer] = [int(c) for c in imatrix.counts[f"blk.{layer}.ffn_down_exps.weight"]]
        assert tokens == 16 * 128 and sum(c < 0.3 * tokens for c in stacks[layer]) not in (0, 5)
    for v in report["variants"][:-1]:
        fallen = {t["name"]: t["fallback"] for t in v["tensors"] if t.get("fallback")}
        experts = {(int(n.split(".")[2]), int(n.split(".experts.")[1].split(".")[0])): why for n, why in fallen.items()}
        assert experts == {
            (layer, e): f"{c} of 2048 calibration tokens"
            for layer, counts in stacks.items()
            for e, c in enumerate(counts)
            if c < 0.3 * 2048
        }
        assert len(fallen) == 3 * len(experts)
        assert any(w.startswith(f"{v['target']}: {len(fallen)} matrices are rounded") for w in report["warnings"])
