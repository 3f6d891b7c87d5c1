"""`quantkit advise`: memory against what llama.cpp allocates, file sizes against published ones, and the choice."""

from __future__ import annotations

import ctypes as c
import json
import os
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from llama_oracle import QUIET, library
from test_convert import quantkit
from toy import toy_model, vocabulary, write_toy

from quantkit.advise import Ask, Option, fit, marlin_refuses, recommend
from quantkit.hardware import CARDS, GIB, Card, Machine, find_card, parse_size
from quantkit.memory import Weights, cells, in_ram, kv_bytes, on_device, weights_of
from quantkit.model import open_model

MIB = 2**20
COUNTS, TYPES, SWA_FULL = 0, 104, 140  # bytes of llama_context_params, checked below


def allocated(path: Path, ctx: int, kv: int = 1) -> dict[str, float]:
    """MiB that llama.cpp logs for a context, by part; windows are cached as llama-server has them."""
    lib, lines = library(), []
    callback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(
        lambda _, line, __: lines.append(line.decode(errors="replace"))
    )
    lib.llama_log_set(c.cast(callback, c.c_void_p), None)
    try:
        model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        assert bytes(params.bytes[:4]) == b"\0\2\0\0" and bytes(params.bytes[136:141]) == b"\0\1\1\1\1"
        assert bytes(params.bytes[TYPES : TYPES + 8 : 4]) == b"\1\1"
        c.c_uint32.from_buffer(params, COUNTS).value = ctx
        params.bytes[TYPES] = params.bytes[TYPES + 4] = kv
        params.bytes[SWA_FULL] = False
        context = lib.llama_init_from_model(model, params)
        assert context
        lib.llama_free(context)
        lib.llama_model_free(model)
    finally:
        lib.llama_log_set(c.cast(QUIET, c.c_void_p), None)
    found = re.findall(r":\s+\S+ +(model|KV|compute|output) buffer size = +([\d.]+) MiB", "".join(lines))
    return {kind: sum(float(size) for k, size in found if k == kind) for kind in ("model", "KV", "compute", "output")}


@pytest.mark.parametrize("ctx", [2048, 8192])
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_memory_is_what_llama_cpp_allocates(name, ctx, request):
    path = request.getfixturevalue(name)
    real, need = allocated(path, ctx), in_ram(weights_of(name, open_model(path)), ctx, "f16")
    predicted = (need.total - need.overhead) / MIB
    assert predicted == pytest.approx(sum(real.values()), rel=0.05)
    assert need.kv / MIB == pytest.approx(real["KV"], abs=0.01)
    assert need.compute / MIB == pytest.approx(real["compute"], rel=0.05)
    assert need.output / MIB == pytest.approx(real["output"], abs=0.01)


@pytest.mark.parametrize(("kv", "number"), [("q8_0", 8), ("q4_0", 2)])
def test_a_quantized_cache_is_what_llama_cpp_allocates(smollm2, kv, number):
    need = in_ram(weights_of("x", open_model(smollm2)), 1024, kv)
    assert need.kv / MIB == pytest.approx(allocated(smollm2, 1024, number)["KV"], abs=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 4096},
        {"num_attention_heads": 64},
        {"num_attention_heads": 64, "num_key_value_heads": 64},
    ],
    ids=["ffn", "heads", "kv"],
)
def test_the_compute_buffer_follows_the_widest_moment(tmp_path, changes):
    path = write_toy(tmp_path / "toy.gguf", toy_model(num_hidden_layers=2, **changes))
    need = in_ram(weights_of("x", open_model(path)), 8192, "f16")
    assert need.compute / MIB == pytest.approx(allocated(path, 8192)["compute"], rel=0.05)


def test_mixtures_of_experts_are_near(families):
    path = families / "qwen3-experts.gguf"
    need, real = in_ram(weights_of("x", open_model(path)), 512, "f16"), allocated(path, 512)
    assert need.kv / MIB == pytest.approx(real["KV"], abs=0.01)
    assert need.compute / MIB == pytest.approx(real["compute"], rel=0.1)


def header_of_70b(path: Path) -> Path:
    """miqu-1-70b as its header says it is, Q5_K throughout, its 49 GB a hole in a sparse file."""
    hidden, ffn, kv, vocab, layers = 8192, 28672, 1024, 32000, 80
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("miqu-1-70b")
    w.add_block_count(layers)
    w.add_context_length(32764)
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(ffn)
    w.add_head_count(64)
    w.add_head_count_kv(8)
    w.add_rope_dimension_count(128)
    w.add_rope_freq_base(1e6)
    w.add_layer_norm_rms_eps(1e-5)
    tokens, kinds = vocabulary()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens + [f"w{i}" for i in range(vocab - len(tokens))])
    w.add_token_types(kinds + [1] * (vocab - len(tokens)))
    w.add_token_merges(["a b"])
    block = {
        **{"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden)},
        **{"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)},
        **{"attn_norm": (hidden,), "ffn_norm": (hidden,)},
    }
    shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,), "output.weight": (vocab, hidden)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    end = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            w.add_tensor_info(name, shape, np.dtype("f4"), 4 * shape[0], T.F32)
            size = 4 * shape[0]
        else:
            rows = (shape[0], shape[1] // 256 * 176)
            size = rows[0] * rows[1]
            w.add_tensor_info(name, rows, np.dtype("u1"), size, T.Q5_K)
        end = -(-(end + size) // 32) * 32
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + end)
    return path


def test_published_sizes_of_miqu_come_from_its_header(tmp_path):
    """25.5, 41.4 and 48.8 GB are what the Hub shows of miqudev/miqu-1-70b's three files, GB of 1e9 bytes."""
    path = header_of_70b(tmp_path / "miqu-1-70b.q5_K_M.gguf")
    types = [x for t in ("Q2_K", "Q4_K_M", "Q5_K_M") for x in ("--type", t)]
    code, stdout, stderr = quantkit("advise", path, *types, "--vram", "RTX 3090", "--ram", "64GiB", "--json")
    assert code == 0, stderr
    record = json.loads(stdout)
    made = {v["name"]: v for v in record["variants"]}
    assert [round(made[t]["bytes"] / 1e9, 1) for t in ("Q2_K", "Q4_K_M", "Q5_K_M")] == [25.5, 41.4, 48.8]
    split = made["Q2_K"]
    assert split["fits"] == "split" and 60 < split["layers_on_device"] < 80
    assert split["device"]["total"] <= 24 * GIB < split["device"]["total"] + split["device"]["weights"] / 60
    assert made["Q4_K_M"]["host"]["kv"] + made["Q4_K_M"]["device"]["kv"] == 8192 * 80 * 2 * 8 * 128 * 2
    assert record["recommendation"]["name"] == "Q2_K" and "layers" in record["recommendation"]["reason"]


def test_predicted_bytes_are_those_of_the_file(smollm2, tmp_path):
    code, stdout, _ = quantkit("advise", smollm2, "--type", "Q8_0", "--vram", "8GiB", "--json")
    options = ("--to", "Q8_0", "--no-eval", "--no-calibration")
    assert code == 0 and quantkit("convert", smollm2, "-o", tmp_path / "o", *options)[0] == 0
    made = next((tmp_path / "o").glob("*.gguf"))
    assert json.loads(stdout)["variants"][0]["bytes"] == made.stat().st_size
    code, stdout, _ = quantkit("advise", tmp_path / "o", "--vram", "8GiB", "--json")
    assert code == 0 and json.loads(stdout)["variants"][0]["bytes"] == made.stat().st_size


def model_of(name: str, gib: float, **config: object) -> Weights:
    whole, plain = int(gib * GIB), {"num_hidden_layers": 10, "max_position_embeddings": 32768, "vocab_size": 1000}
    plain |= {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    return Weights(name, "gguf", whole, (whole // 11,) * 10, 0, 0, whole // 11, plain | {"head_dim": 64} | config)


def test_the_best_that_fits_is_taken_and_never_a_broken_one():
    place = Machine(8 * GIB, 64 * GIB, (Card("card", 8, 500, ""),), 50)
    made = {"big": (12, 0.001), "good": (6, 0.02), "small": (3, 0.1), "odd": (4, 0.001)}
    options = [
        Option(model_of(n, gib), "llama.cpp", kl, "rope" if n == "odd" else None) for n, (gib, kl) in made.items()
    ]
    fits = {f.option.weights.name: f for f in (fit(o, Ask(4096), place) for o in options)}
    assert {n: f.where for n, f in fits.items()} == {"big": "split", "good": "vram", "small": "vram", "odd": "vram"}
    choice, reason = recommend(list(fits.values()))
    assert choice.option.weights.name == "good" and "KL" in reason
    assert fits["good"].bounds[0][1] == pytest.approx(500e9 / (6 * GIB + 10 * 4096 * 2 * 2 * 64 * 2), rel=1e-3)
    assert fits["big"].layers == 7
    assert recommend([fit(options[0], Ask(4096), Machine(None, GIB))]) is None


def test_a_context_grows_until_memory_or_training_ends():
    place = Machine(None, 2 * GIB)
    wide = model_of("x", 1, num_key_value_heads=8, head_dim=128)
    found = fit(Option(wide, "llama.cpp"), Ask(512), place)
    assert 512 < found.largest_context < 32768
    assert in_ram(wide, found.largest_context, "f16").total <= 2 * GIB
    assert in_ram(wide, found.largest_context + 256, "f16").total > 2 * GIB
    assert fit(Option(wide, "llama.cpp"), Ask(512, "q4_0"), place).largest_context > found.largest_context


def test_experts_windows_and_batches_count_as_they_run():
    config = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
    dense = model_of("x", 1)
    experts = Weights("e", "gguf", GIB, dense.blocks, sum(dense.blocks) // 2, 0, 0, {**dense.config, **config}, 8)
    assert experts.active == sum(dense.blocks) - sum(dense.blocks) // 2 + sum(dense.blocks) // 2 * 2 // 8
    sliding = {**dense.config, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 5}
    assert (cells(sliding, 0, 8192), cells(sliding, 1, 8192), cells(sliding, 0, 300)) == (1024, 8192, 512)
    assert kv_bytes(dense.config, 0, 4096, "f16", 3) == 3 * kv_bytes(dense.config, 0, 4096, "f16")
    device, host = on_device(dense, 4096, "f16", 1, 4)
    assert device.weights == sum(dense.blocks[:4]) and device.weights + host.weights == dense.total


@pytest.mark.parametrize(
    ("changes", "shapes", "said"),
    [
        ({}, {(192, 576)}, "576"),
        ({}, {(1024, 4096), (11008, 4096)}, None),
        ({"bits": 3}, set(), "3 bits"),
        ({"group_size": 16}, set(), "groups of 16"),
        ({"sym": False}, set(), "symmetric"),
        ({"group_size": -1, "bits": 8}, {(64, 128)}, None),
    ],
)
def test_marlin_takes_what_its_kernels_take(changes, shapes, said):
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True} | changes
    reason = marlin_refuses(config, shapes)
    assert reason is None if said is None else said in reason


def test_cards_and_sizes_are_read():
    assert find_card("NVIDIA GeForce RTX 4060 Ti 16GB").gib == 16 and find_card("NVIDIA GeForce RTX 4090").gib == 24
    assert find_card("a toaster") is None
    assert all(c.source.startswith("https://") and c.gb_per_s > 200 for c in CARDS)
    assert parse_size("24GiB", "") == parse_size("24G", "") == 24 * GIB and parse_size("24GB", "") == 24 * 10**9
    assert parse_size("1.5TiB", "") == 1536 * GIB and parse_size("1TB", "") == 10**12
    for args, said in ((("--vram", "24 apples"), "--vram"), (("--kv", "q5_1"), "f16, q8_0, q4_0")):
        status, _, stderr = quantkit("advise", "nothing.gguf", *args)
        assert status == 2 and said in stderr


def test_the_table_says_what_to_take(smollm2):
    code, stdout, _ = quantkit("advise", smollm2, "--vram", "4GiB", "--ram", "8GiB")
    assert code == 0 and f"Take {smollm2.name}" in stdout and "wholly" in stdout and "read by llama.cpp" in stdout
    code, stdout, _ = quantkit("advise", smollm2, "--ram", "128MiB")
    assert code == 0 and "Nothing fits" in stdout


def test_the_file_that_just_fits_is_made(tmp_path):
    """Of a card with room for 1.2 MB of weights beside the cache; the embedding, which is untied, stays in RAM."""
    source = write_toy(tmp_path / "Toy.F16.gguf", toy_model(), T.F16)
    need, _ = on_device(weights_of("Toy", open_model(source)), 512, "f16")
    mib = (need.total - need.weights + 1.2e6) / MIB
    (tmp_path / "recipe.yaml").write_text("samples: 4\nseqlen: 64\neval_text: null\n")
    options = ("--context", "512", "--vram", f"{mib:.4f}MiB")
    out = tmp_path / "out"
    code, _, stderr = quantkit("advise", source, *options, "--make", out, "--recipe", tmp_path / "recipe.yaml")
    assert code == 0 and "weights may take" in stderr, stderr
    (made,) = out.glob("*.gguf")
    (variant,) = json.loads(quantkit("advise", made, *options, "--json")[1])["variants"]
    assert variant["fits"] == "vram" and 0.9 * mib * MIB < variant["device"]["total"] <= mib * MIB
    assert (out / "recipe.yaml").is_file()
    code, _, stderr = quantkit("advise", source, "--context", "16k", "--vram", "10MiB", "--make", tmp_path / "no")
    assert code == 2 and "cache and buffers take" in stderr and not (tmp_path / "no").exists()
    code, _, stderr = quantkit("advise", source, "--context", "much")
    assert code == 2 and "no number of tokens" in stderr


def test_a_broken_variant_of_a_report_is_not_recommended(smollm2, tmp_path):
    out = tmp_path / "out"
    targets = ("--to", "Q8_0", "--to", "Q4_0")
    assert quantkit("convert", smollm2, "-o", out, *targets, "--no-calibration", "--no-eval")[0] == 0
    report = json.loads((out / "report.json").read_text())
    report["evaluation"] = {"name": "a text"}
    for v, kl in zip(report["variants"], (0.9, 0.1), strict=True):
        v |= {"kl_divergence": {"mean": kl}, "delta_ln_ppl": 0.05, "same_top": 0.8}
    (out / "report.json").write_text(json.dumps(report))
    code, stdout, _ = quantkit("advise", out, "--vram", "8GiB", "--json")
    record = json.loads(stdout)
    assert code == 0 and record["recommendation"]["name"] == "Q4_0"
    assert {v["name"]: bool(v["broken"]) for v in record["variants"]} == {"Q8_0": True, "Q4_0": False}
