"""Error compensation on GGUF's grids: against ggml's own encoding under the same objective, and read by libggml."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import gguf
import pytest
import torch
from codec_rows import ggml_decode
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from test_convert import quantkit
from toy import toy_model, write_toy

from quantkit.codecs import CODECS, decode, encode, lookup
from quantkit.errors import BadInput
from quantkit.forward import embed, network
from quantkit.model import open_model
from quantkit.solvers import ladder as solver
from quantkit.solvers.ladder import ladder_gptq
from quantkit.stats import Stats, error

LADDERS = [name for name, codec in CODECS.items() if codec.ladder]
N, K = 24, 512


@dataclass(frozen=True)
class Plain:
    """A weight as it stands."""

    value: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        return self.value


def some_weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.fixture(scope="module")
def stats() -> Stats:
    """Activations that hold a fraction of all directions and columns of unlike size, as a model's do."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(300, K, generator=generator) * torch.rand(300, 1, generator=generator) ** 2
    scale = 0.2 + torch.rand(K, generator=generator) ** 4 * 3
    return Stats.zeros(K).add(torch.randn(2000, 300, generator=generator) @ mixing * scale)


@pytest.mark.parametrize("name", LADDERS)
def test_errors_are_less_than_half_of_ggmls_own(name, stats):
    weight, codec = some_weight(), lookup(name)
    by_ggml = decode(name, encode(name, weight, stats.importance), weight.shape)
    solution = ladder_gptq(weight, stats, codec, damp=0.05)
    raw = solution.quantized.raw
    assert raw.shape == (N, codec.row_bytes(K))
    read = ggml_decode(codec, raw).view(N, K)
    assert error(read - weight, stats.gram) < 0.5 * error(by_ggml - weight, stats.gram)
    assert torch.equal(read, solution.quantized.dequantize())
    assert solution.fallback == "" and solution.loss < 0.5 * solution.log["loss_rounded"]


@pytest.mark.parametrize("name", LADDERS)
def test_a_weight_on_the_grid_stays_there(name, stats):
    """As one dequantized to fp16 is, though what it is fed has drifted and another weight would make up for that."""
    codec = lookup(name)
    weight = decode(name, encode(name, some_weight(9)), (N, K)).half().float()
    drifted = Stats(stats.gram, stats.absum, stats.rows, stats.gram * 0.2)
    solution = ladder_gptq(weight, drifted, codec)
    assert solution.log["order"] == "none: it lies on the grid" and solution.fallback == ""
    assert torch.equal(solution.quantized.raw, encode(name, weight, stats.importance))
    off = ladder_gptq(weight + 0.01 * some_weight(10).sign(), drifted, codec)
    assert off.log["order"] != solution.log["order"]


@pytest.mark.parametrize("name", ["Q2_K", "IQ4_XS"])
def test_going_over_it_again_never_makes_it_worse(name, stats, monkeypatch):
    """On the objective that is descended: the damped Hessian's."""
    weight, codec = some_weight(2)[:8], lookup(name)
    damped = stats.gram + 0.05 * stats.gram.diagonal().mean() * torch.eye(K)
    made = []
    for rounds in (0, 1, 2):
        monkeypatch.setattr(solver, "ROUNDS", rounds)
        delta = ladder_gptq(weight, stats, codec, damp=0.05).quantized.dequantize() - weight
        made.append(error(delta, damped).item())
    assert made[2] <= made[1] * 1.00001 and made[1] < made[0]


def test_rows_do_not_influence_one_another(stats):
    """Up to the order of sums in a matrix product, which may tip a code that lies midway."""
    weight, codec = some_weight(3), lookup("Q3_K")
    together = ladder_gptq(weight, stats, codec, damp=0.05).quantized.dequantize()
    alone = torch.cat([ladder_gptq(part, stats, codec, damp=0.05).quantized.dequantize() for part in weight.split(12)])
    assert (together != alone).float().mean() < 0.02


def test_the_weight_that_is_aimed_at_makes_up_for_the_prefix(monkeypatch, stats):
    """With the source's activations twice those that arrive, the best weight is twice the weight."""
    monkeypatch.setattr("quantkit.solvers.gptq.AIM_DAMP", 0.01)
    drifted = Stats(stats.gram, stats.absum, stats.rows, stats.gram.clone())
    weight = some_weight(4)
    value = ladder_gptq(weight, drifted, lookup("Q6_K"), damp=0.01).quantized.dequantize()
    assert error(value - 2 * weight, stats.gram) < 0.01 * error(weight, stats.gram)  # less than damping leaves


def test_where_solving_goes_wrong_the_weight_is_ggmls(monkeypatch, stats):
    w, codec = some_weight(), CODECS["Q4_K"]
    for spoilt in (torch.zeros, lambda *shape: torch.full(shape, torch.nan)):
        monkeypatch.setattr(solver, "_solved", lambda *args, spoilt=spoilt: Plain(spoilt(*w.shape)))
        found = ladder_gptq(w, stats, codec)
        assert found.fallback == "solving did no better"
        assert torch.equal(found.quantized.raw, encode("Q4_K", w, stats.importance))


def test_what_no_token_reaches_is_rounded_by_ggml():
    weight, nothing = some_weight(), Stats(torch.zeros(K, K), torch.zeros(K), 10)
    solved = ladder_gptq(weight, nothing, lookup("Q4_K"))
    assert solved.fallback and torch.equal(solved.quantized.raw, encode("Q4_K", weight, torch.zeros(K)))


def test_statistics_must_be_finite():
    with pytest.raises(BadInput, match="not finite"):
        ladder_gptq(some_weight(), Stats(torch.full((K, K), torch.inf), torch.ones(K), 1), lookup("Q4_K"))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A toy as Q4_K_M, with the solver and without, and the two reports."""
    home = tmp_path_factory.mktemp("ladder")
    source = write_toy(home / "Toy.F16.gguf", toy_model(), T.F16)
    made = {}
    for name, options in {"ggml": (), "gptq": ("--solver", "gptq")}.items():
        out = home / name
        common = ("--to", "Q4_K_M", "--samples", 8, "--seqlen", 128, "--eval-chunks", 1, "--json")
        code, stdout, stderr = quantkit("convert", source, "-o", out, *common, *options)
        assert code == 0, stderr
        made[name] = (out / "Toy-Q4_K_M.gguf", json.loads(stdout)["variants"][0])
    return made


def test_a_solved_file_is_like_any_other_to_llama_cpp(toys):
    """The same types, the same size but for the metadata that name an importance matrix, and it runs."""
    (plain, _), (solved, record) = toys["ggml"], toys["gptq"]
    of = {
        path: {t.name: (t.tensor_type, tuple(t.shape)) for t in gguf.GGUFReader(path).tensors} for path in toys_of(toys)
    }
    assert of[plain] == of[solved] and solved.stat().st_size == record["bytes"]
    assert 0 <= plain.stat().st_size - solved.stat().st_size < 256
    logits = Oracle(solved).logits(list(range(2, 60)))
    assert torch.isfinite(torch.as_tensor(logits)).all()
    by_name = {t["name"]: t for t in record["tensors"]}
    assert by_name["blk.0.ffn_up.weight"]["solver"] == "gptq"
    assert by_name["token_embd.weight"]["solver"] == by_name["output.weight"]["solver"] == "gptq"


def test_a_solved_file_comes_nearer_to_the_source(toys):
    losses = {
        name: {t["name"]: t["loss"] for t in record["tensors"] if t["solver"] in ("ggml", "gptq")}
        for name, (_, record) in toys.items()
    }
    blocks = [n for n in losses["ggml"] if n.startswith("blk.")]
    assert sum(losses["gptq"][n] for n in blocks) < 0.7 * sum(losses["ggml"][n] for n in blocks)
    assert toys["gptq"][1]["kl_divergence"]["mean"] < toys["ggml"][1]["kl_divergence"]["mean"]


def test_calibration_begins_behind_the_embedding_as_it_is_written(tmp_path, monkeypatch):
    """The rows before the first block are the ones that a reader of the file has there."""
    source, begun = write_toy(tmp_path / "Toy.F16.gguf", toy_model(), T.F16), []

    def noting(net, ids, *embedding):
        states = embed(net, ids, *embedding)
        begun.append((ids, states.hidden.clone()))  # they move on in place
        return states

    monkeypatch.setattr(sys.modules["quantkit.convert"], "embed", noting)
    options = ("--to", "Q2_K", "--solver", "gptq", "--samples", 2, "--seqlen", 64, "--no-eval")
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "out", *options)
    assert code == 0, stderr
    (ids, of_source), (_, own) = begun
    made = network(open_model(tmp_path / "out" / "Toy-Q2_K.gguf"), torch.device("cpu"))
    assert torch.equal(own, embed(made, ids).hidden) and not torch.equal(own, of_source)


def toys_of(toys) -> list:
    return [path for path, _ in toys.values()]


def test_the_solver_needs_a_calibration(tmp_path):
    source = write_toy(tmp_path / "Toy.F16.gguf", toy_model(), T.F16)
    code, _, stderr = quantkit(
        "convert", source, "-o", tmp_path / "x", "--to", "Q4_K_M", "--solver", "gptq", "--no-calibration"
    )
    assert code == 2 and "needs a calibration" in stderr and not (tmp_path / "x").exists()
