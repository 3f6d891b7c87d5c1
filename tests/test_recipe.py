"""Recipes: every mistake at once, options over files, and the shipped ones."""

from __future__ import annotations

import pytest

from quantkit.errors import BadInput, UsageError
from quantkit.recipe import load_recipe
from quantkit.resources import resource


def test_options_lie_over_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("to: [gptq, awq]\nsamples: 8\n")
    recipe = load_recipe(str(path), {"samples": 4, "seed": None})
    assert recipe.to == ("gptq", "awq") and recipe.samples == 4 and recipe.seed == 0


def test_one_target_needs_no_list(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("to: gptq\n")
    assert load_recipe(str(path), {}).to == ("gptq",)


def test_every_mistake_is_reported_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("to: []\nsamples: 0\nsamplse: 3\nseqlen: many\n")
    with pytest.raises(UsageError) as e:
        load_recipe(str(path), {})
    for field in ("to:", "samples:", "samplse:", "seqlen:"):
        assert field in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("text", "says"), [("[1, 2]", "mapping"), ("to: [", "not readable as YAML")])
def test_what_is_no_recipe_is_refused(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        load_recipe(str(path), {})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(BadInput, match=r"one of: demo, publish"):
        load_recipe("dmeo", {})


@pytest.mark.parametrize("path", sorted(resource("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path):
    assert load_recipe(path.stem, {}).to


def test_layers_are_rules_in_their_order(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('to: Q4_K_M\nlayers: {"blk.0.*": {type: q8_0}, "*.ffn_down": {type: Q6_K}}\n')
    rules = load_recipe(str(path), {}).choices().layers
    assert [(r.pattern, r.type) for r in rules] == [("blk.0.*", "Q8_0"), ("*.ffn_down", "Q6_K")]


def test_a_layer_of_no_known_type_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('to: Q4_K_M\nlayers: {"*.ffn_down": {type: Q9_K}, "*.attn_v": {tpye: Q6_K}}\n')
    with pytest.raises(UsageError, match=r"no tensor type 'Q9_K'.*tpye"):
        load_recipe(str(path), {})
