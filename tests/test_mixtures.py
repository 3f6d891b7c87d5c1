"""The mixtures against published sizes and a published file: no figure here was computed by our own code."""

from __future__ import annotations

from math import prod
from pathlib import Path

import gguf
import pytest
from mixture_cases import CHOICES, hashed, toys

from quantkit.codecs import lookup
from quantkit.errors import UsageError
from quantkit.files.gguf import read_gguf
from quantkit.recipe import Recipe
from quantkit.targets.layers import LayerRule, require_matches
from quantkit.targets.mixture_rules import MIXTURES, Shape
from quantkit.targets.mixtures import choose, file_type
from quantkit.targets.target import Choices

SAID = Path(__file__).with_name("mixtures-llama-quantize.txt")

# What `llama-quantize --dry-run` prints for the 70B shape of Llama 2 and miqu, in MiB.
LLAMA_70B_MIB = {
    "Q2_K": 24282,
    "Q3_K_M": 31733,
    "Q4_K_S": 37431,
    "Q4_K_M": 39503,
    "Q5_K_M": 46494,
    "Q6_K": 53965,
    "Q8_0": 69896,
    "IQ2_XS": 19391,
    "IQ4_XS": 35473,
}


def llama(layers: int, hidden: int, ffn: int, kv: int, vocab: int) -> list[tuple[str, tuple[int, ...], str]]:
    """The tensors of a dense Llama in file order, as F16."""
    tensors = [("token_embd.weight", (vocab, hidden), "F16")]
    for i in range(layers):
        shapes = {
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }
        tensors += [(f"blk.{i}.{n}.weight", s, "F16") for n, s in shapes.items()]
        tensors += [(f"blk.{i}.{n}.weight", (hidden,), "F32") for n in ("attn_norm", "ffn_norm")]
    return [*tensors, ("output_norm.weight", (hidden,), "F32"), ("output.weight", (vocab, hidden), "F16")]


@pytest.mark.parametrize(("name", "mib"), LLAMA_70B_MIB.items())
def test_the_70b_shape_has_its_published_size(name, mib):
    tensors = llama(80, 8192, 28672, 1024, 32000)
    types = choose(name, tensors, Shape(gqa=8, is_70b=True), imatrix=name == "IQ2_XS")
    nbytes = sum(prod(s[:-1]) * lookup(t).row_bytes(s[-1]) for (_, s, _), t in zip(tensors, types, strict=True))
    assert abs(nbytes / 2**20 - mib) < 1, nbytes / 2**20


def test_a_published_file_has_the_types_we_would_choose(gemma3):
    tensors = [(n, t.shape, t.type) for n, t in read_gguf(gemma3).tensors.items()]
    assert choose("Q4_K_M", tensors, Shape(gqa=4, tied=True), imatrix=False) == [t for _, _, t in tensors]


def test_more_bits_go_to_the_first_and_last_eighth_and_every_third():
    tensors = llama(32, 4096, 11008, 4096, 32000)
    types = choose("Q4_K_M", tensors, Shape(gqa=1), imatrix=False)
    raised = [n for (n, _, _), t in zip(tensors, types, strict=True) if t == "Q6_K" and n.startswith("blk")]
    layers = sorted({int(n.split(".")[1]) for n in raised})
    assert layers == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize("name", MIXTURES)
def test_narrow_rows_fall_back_and_always_fit(name):
    tensors = llama(4, 576, 1536, 192, 1000)
    types = choose(name, tensors, Shape(gqa=3, tied=False), imatrix=True)
    for (tensor, shape, present), kind in zip(tensors, types, strict=True):
        assert shape[-1] % lookup(kind).block == 0, tensor
        assert len(shape) > 1 or kind == present


@pytest.mark.parametrize("name", MIXTURES)
def test_file_types_are_llama_cpps(name):
    assert gguf.LlamaFileType(file_type(name)).name.endswith(name)


def test_eight_experts_keep_attention_at_eight_bits():
    tensors = llama(2, 1024, 2048, 256, 1000)
    types = dict(zip([n for n, _, _ in tensors], choose("Q4_K_M", tensors, Shape(4, experts=8), False), strict=True))
    assert types["blk.0.attn_k.weight"] == types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.0.attn_output.weight"] == "Q5_K"


@pytest.fixture(scope="module")
def toy_tensors(tmp_path_factory):
    files = toys(tmp_path_factory.mktemp("toys")).items()
    return {name: [(n, t.shape, t.type) for n, t in read_gguf(path).tensors.items()] for name, path in files}


@pytest.mark.parametrize("line", SAID.read_text().splitlines(), ids=lambda line: " ".join(line.split()[:2]))
def test_types_are_those_that_llama_quantize_says(line, toy_tensors):
    """Every mixture under every set of options; what it said is on file, see mixture_cases.py."""
    name, mixture, *hashes = line.split()
    tensors, shape = toy_tensors[name], Shape(gqa=4, tied=name == "tied")
    for choices, theirs in zip(CHOICES, hashes, strict=True):
        asked = Recipe(to=(mixture,), **choices).choices()
        types = choose(mixture, tensors, shape, imatrix=False, choices=asked)
        assert hashed(dict(zip((n for n, _, _ in tensors), types, strict=True))) == theirs, choices


def asking(*rules: tuple[str, str]) -> Choices:
    return Choices(layers=tuple(LayerRule(*rule) for rule in rules))


def test_rules_for_layers_go_before_all_else_and_the_first_counts():
    tensors = llama(4, 512, 1024, 256, 1000)
    rules = asking(("blk.1.ffn_down", "Q8_0"), ("*.ffn_down", "Q3_K"), ("output*", "Q5_K"))
    types = dict(zip([n for n, _, _ in tensors], choose("Q4_K_M", tensors, Shape(2), False, rules), strict=True))
    assert types["blk.1.ffn_down.weight"] == "Q8_0" and types["output.weight"] == "Q5_K"
    assert types["blk.0.ffn_down.weight"] == types["blk.3.ffn_down.weight"] == "Q3_K"
    assert types["blk.0.attn_q.weight"] == "Q4_K" and types["output_norm.weight"] == "F32"


def test_a_rule_that_does_not_fit_a_layer_says_what_would():
    with pytest.raises(UsageError, match=r"blk.0.attn_q.weight: its rows of 576 .* choose Q8_0"):
        choose("Q4_K_M", llama(1, 576, 1536, 192, 1000), Shape(3), False, asking(("*.attn_q", "Q6_K")))


def test_a_rule_that_matches_nothing_names_what_is_near():
    names = [n for n, _, _ in llama(2, 512, 1024, 256, 1000)]
    with pytest.raises(UsageError, match=r"'\*.ffn_dwon' matches no tensor.*blk.\*.ffn_down"):
        require_matches(asking(("*.attn_v", "Q6_K"), ("*.ffn_dwon", "Q6_K")).layers, names)
