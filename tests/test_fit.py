"""A file of the size asked for: the information against true divergences, the trade-off against trying everything."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from PIL import Image
from test_convert import quantkit
from toy import toy_model, write_toy

from quantkit.errors import UsageError
from quantkit.evaluate import Predictions
from quantkit.fit import Option, allocate, frontier
from quantkit.forward import final_states, last, network
from quantkit.model import open_model
from quantkit.plan import make_plan
from quantkit.recipe import Recipe
from quantkit.sensitivity import fisher
from quantkit.sizing import sized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("source") / "Toy.F32.gguf", toy_model(), T.F32)


def log_probabilities(path, ids):
    net = network(open_model(path), CPU)
    return Predictions(last(final_states(net, ids, slice(None))), net.head(), None).logprobs(slice(None))


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.down_proj", "layers.0.self_attn.v_proj", "layers.2.mlp.up_proj", "lm_head", "embed_tokens"]
)
def test_the_divergence_of_a_small_change_is_foretold(source, tmp_path, name):
    """Against the true one, of the whole network with the change in it; taken output by output it is no more exact."""
    ids = torch.randint(2, 300, (4, 96), generator=torch.Generator().manual_seed(1))
    found = {}
    for _, part in fisher(network(open_model(source), CPU), ids, seed=0):
        found |= part
    key = next(k for k in found if name in k)
    model = toy_model()
    weight = dict(model.named_parameters())[key]
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.01 * weight.std()
    with torch.no_grad():
        weight.add_(delta)
    before = log_probabilities(source, ids)
    after = log_probabilities(write_toy(tmp_path / "Changed.F32.gguf", model, T.F32), ids)
    true = (before.exp() * (before - after)).sum(1).mean().item()
    rows = torch.arange(len(weight)) if name != "embed_tokens" else ids.unique()
    assert found[key].divergence(delta[rows], rows) == pytest.approx(true, rel=0.25)


def test_no_other_choice_of_its_size_is_better():
    draw = torch.Generator().manual_seed(0)
    table = {}
    for name in "abcdef":
        size = int(torch.randint(1, 40, (1,), generator=draw))
        harm = torch.rand(1, generator=draw).item()
        table[name] = tuple(Option(f"Q{b}", size * b, harm * 4.0**-b) for b in (2, 3, 4, 5, 6, 8))
    total = sum(o[-1].nbytes for o in table.values())
    for budget in range(total // 4, total + 1, total // 16):
        found = allocate(table, budget)
        assert found.nbytes <= budget
        fitting = (c for c in itertools.product(*table.values()) if sum(o.nbytes for o in c) <= found.nbytes)
        best = min(sum(o.divergence for o in c) for c in fitting)
        assert found.divergence <= best * 1.1


def test_the_line_of_best_choices_has_none_below_it():
    table = {
        "0 a": (Option("2", 20, 1.0), Option("4", 40, 0.1), Option("8", 80, 0.0)),
        "1 a": (Option("2", 10, 3.0), Option("4", 20, 0.2), Option("8", 40, 0.0)),
    }
    line = frontier(table)
    assert line[0] == (30, 4.0) and line[-1] == (120, 0.0) and line == sorted(line)
    for chosen in itertools.product(*table.values()):
        nbytes, cost = sum(o.nbytes for o in chosen), sum(o.divergence for o in chosen)
        (n, kl), (m, more) = next((a, b) for a, b in itertools.pairwise(line) if a[0] <= nbytes <= b[0] and a != b)
        assert cost >= kl + (more - kl) * (nbytes - n) / (m - n) - 1e-12


def test_a_size_that_cannot_be_had_is_refused():
    with pytest.raises(UsageError, match="take 20 bytes, and 19 are left"):
        allocate({"a": (Option("Q2_K", 20, 1.0),)}, 19)


def test_a_file_has_the_size_asked_for_and_its_recipe_repeats_it(source, tmp_path):
    common = ("--samples", 4, "--seqlen", 64, "--no-eval", "--json")
    code, stdout, stderr = quantkit("convert", source, "-o", tmp_path / "one", "--target-size", "1.2MB", *common)
    assert code == 0, stderr
    record = json.loads(stdout)
    (variant,) = record["variants"]
    made = tmp_path / "one" / variant["path"]
    assert 0.97 * 1.2e6 < made.stat().st_size <= 1.2e6 and "in all" in stderr
    types = {t["type"] for t in variant["tensors"]} - {"F32"}
    assert len(types) > 2
    picture = (tmp_path / "one" / "types.svg").read_text()
    assert all(f"<!-- {t} -->" in picture for t in types) and "<!-- predicted KL (nats a token) -->" in picture
    with Image.open(tmp_path / "one" / "types.png") as image:
        assert image.size[0] > 1000
    assert Oracle(made).logits([2, 3, 4, 5]).shape[0] == 4
    recipe = tmp_path / "one" / "recipe.yaml"
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "two", "--recipe", recipe, "--json")
    assert code == 0, stderr
    assert (tmp_path / "two" / variant["path"]).read_bytes() == made.read_bytes()


def test_a_size_is_had_from_python(source):
    """The recipe that comes of it is planned like any other."""
    model, rows = open_model(source), torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(to=("gguf",), target_bpw=5.0, calibration="default")
    *progress, last = sized(model, recipe, network(model, CPU), rows)
    assert [p.done for p in progress] == list(range(1, progress[-1].total + 1))
    assert last.recipe.target_bpw is None and last.choice.found.options.keys() == last.choice.table.keys()
    (output,) = make_plan(model, last.recipe, CPU).outputs
    assert 4.8 < 8 * sum(row.nbytes for row in output.rows) / model.parameters <= 5.0
    with pytest.raises(UsageError, match="needs a calibration and one size"):
        next(sized(model, last.recipe.model_copy(update={"layers": {}}), network(model, CPU), rows))


@pytest.mark.parametrize("target", ["gptq-4bit-32g", "ct-4bit-32g"])
def test_a_packed_folder_has_the_bits_asked_for(source, tmp_path, target):
    """Matrices of one activation have the same bits, and the recipe repeats the folder."""
    common = ("--samples", 4, "--seqlen", 64, "--no-eval", "--json")
    code, stdout, stderr = quantkit(
        "convert", source, "-o", tmp_path / "one", "--to", target, "--target-bpw", 6.2, *common
    )
    assert code == 0, stderr
    (variant,) = json.loads(stdout)["variants"]
    assert 6 < variant["bits_per_weight"] <= 6.2  # to one more bit for the matrices of one activation
    refs = open_model(tmp_path / "one" / target).tensors.values()
    by_item: dict[tuple, set] = {}
    for ref in (r for r in refs if r.placed.reads):
        by_item.setdefault((ref.placed.layer, ref.placed.reads), set()).add(ref.type)
    assert all(len(types) == 1 for types in by_item.values()) and len(set().union(*by_item.values())) > 1
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "two", "--recipe", tmp_path / "one" / "recipe.yaml")
    assert code == 0, stderr
    one, two = (tmp_path / name / target / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--to", "gguf"), "needs a type for it"),
        (("--to", "Q4_K_M", "--target-size", "2MB"), "nothing to choose for a size"),
        (("--to", "gptq", "--to", "gguf", "--target-size", "2MB"), "for one target alone"),
        (("--target-size", "2MB", "--target-bpw", "4"), "one size"),
        (("--target-size", "2 apples"), "no size such as"),
        (("--target-size", "0.1MB"), "the smallest types"),
    ],
)
def test_what_cannot_be_fitted_is_refused(source, tmp_path, options, says):
    code, _, stderr = quantkit("convert", source, "-o", tmp_path / "x", "--samples", 2, "--seqlen", 32, *options)
    assert code == 2 and says in stderr and not (tmp_path / "x").exists()
