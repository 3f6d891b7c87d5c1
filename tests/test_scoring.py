"""Scoring of whole models: against llama.cpp's logits, several texts, strides, a reference that runs once."""

from __future__ import annotations

import functools
import gzip
import json
import os
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from llama_oracle import Oracle
from test_convert import quantkit
from toy import toy_model, write_toy

from quantkit import cache, llamacpp, scoring
from quantkit.corpus import evaluation_chunks
from quantkit.errors import BadInput
from quantkit.model import open_model
from quantkit.texts import C4_DOCUMENTS, C4_FILE, C4_REPO, C4_REVISION, load_text

CTX, CHUNKS = 64, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two toys, one a slight change of the other, and two texts."""
    folder = tmp_path_factory.mktemp("scoring")
    source, changed = toy_model(), toy_model()
    with torch.no_grad():
        noise = torch.Generator().manual_seed(5)
        for p in changed.parameters():
            p.add_(0.02 * p.std() * torch.randn(p.shape, generator=noise) if p.dim() > 1 else 0)
    write_toy(folder / "source.gguf", source)
    write_toy(folder / "changed.gguf", changed)
    write_toy(folder / "changed-q8.gguf", changed, T.Q8_0)
    for name, seed in (("a", 1), ("b", 2)):
        letters = np.random.default_rng(seed).choice(list("etaoinshrdlu "), size=1200)
        (folder / f"{name}.txt").write_text("".join(letters))
    return folder


def perplexity(*args: object) -> dict:
    code, stdout, stderr = quantkit("perplexity", *args, "--json", "--device", "cpu")
    assert code == 0, stderr
    return json.loads(stdout)


def oracle_logprobs(path: Path, rows: torch.Tensor) -> np.ndarray:
    """llama.cpp's log-probabilities of chunks, float64 (n, length, vocab)."""
    oracle = Oracle(path)
    logits = np.stack([oracle.logits(row.tolist()) for row in rows]).astype(np.float64)
    oracle.close()
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def rows_of(place: Path, name: str, **how: int) -> torch.Tensor:
    tokenizer = open_model(place / "source.gguf").tokenizer()
    return evaluation_chunks(tokenizer.encode((place / f"{name}.txt").read_text()), CTX, tokenizer, CHUNKS, **how)


def test_statistics_are_those_of_llama_cpps_logits(place):
    """Every statistic of llama-perplexity --kl-divergence, from llama.cpp's own logits by numpy."""
    made = perplexity(
        *(place / "changed.gguf", "--reference", place / "source.gguf", "--text", place / "a.txt"),
        *("--ctx", CTX, "--chunks", CHUNKS),
    )
    rows = rows_of(place, "a")
    p, q = (oracle_logprobs(place / f"{n}.gguf", rows)[:, CTX // 2 : CTX - 1] for n in ("source", "changed"))
    target = rows[:, CTX // 2 + 1 :].numpy()[..., None]
    base, nll = (-np.take_along_axis(x, target, -1).ravel() for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1).ravel()
    n, delta = len(kl), np.exp(-nll) - np.exp(-base)
    assert made["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-3)
    assert made["reference_perplexity"] == pytest.approx(np.exp(base.mean()), rel=1e-3)
    assert made["delta_ln_ppl"] == pytest.approx((nll - base).mean(), rel=1e-2)
    covariance = np.cov(nll, base)
    paired = np.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / n)
    assert made["delta_ln_ppl_stderr"] == pytest.approx(paired, rel=1e-2)
    found = made["kl_divergence"]
    assert found["mean"] == pytest.approx(kl.mean(), rel=1e-2)
    assert found["stderr"] == pytest.approx(kl.std(ddof=1) / np.sqrt(n), rel=1e-2)
    for key, share in {"p999": 99.9, "p99": 99, "p95": 95, "p90": 90, "median": 50, "p10": 10, "p05": 5}.items():
        assert found[key] == pytest.approx(np.percentile(kl, share), rel=2e-2), key
    assert made["delta_p"]["rms"] == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-2)
    assert made["delta_p"]["mean"] == pytest.approx(delta.mean(), abs=1e-5)
    assert made["same_top"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=1.5 / n)


def write_logprobs(path: Path, tokens: torch.Tensor, logits: np.ndarray) -> np.ndarray:
    """As llama-perplexity's `log_softmax` does: what its codes say of logits (chunks, positions, vocabulary)."""
    top = logits.max(-1, keepdims=True)
    least = np.maximum(logits.min(-1, keepdims=True), top - 16)
    floor = least - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    scale = (top - least) / np.float32(65535)
    codes = np.rint((np.maximum(logits, least) - least) / scale)
    padded = np.pad(codes, [(0, 0), (0, 0), (0, codes.shape[-1] % 2)]).astype("<u2")
    head = np.concatenate([scale, floor], -1).astype("<f4").view("<u2")
    header = struct.pack("<8sIii", b"_logits_", tokens.shape[1], logits.shape[-1], len(tokens))
    path.write_bytes(header + tokens.numpy().astype("<i4").tobytes() + np.concatenate([head, padded], -1).tobytes())
    return scale * codes + floor


def test_a_file_of_llama_perplexitys_is_a_reference(place, tmp_path):
    """Its statistics are of what lies above e^-16; what the file is not about is said in a line."""
    rows, options = rows_of(place, "a"), ("--ctx", CTX, "--chunks", CHUNKS)
    scored = slice(CTX // 2, CTX - 1)
    p, q = (oracle_logprobs(place / f"{n}.gguf", rows)[:, scored] for n in ("source", "changed"))
    p = write_logprobs(tmp_path / "base.kld", rows, (4 * p).astype(np.float32))  # so sharp that some are left out
    made = perplexity(place / "changed.gguf", "--reference", tmp_path / "base.kld", "--text", place / "a.txt", *options)
    kl = np.where(p > -16, np.exp(p) * (p - q), 0).sum(-1).ravel()
    assert (p <= -16).any() and made["kl_divergence"]["mean"] == pytest.approx(kl.mean(), rel=1e-3)
    for key, share in {"p99": 99, "median": 50, "p05": 5, "p01": 1}.items():
        assert made["kl_divergence"][key] == pytest.approx(np.percentile(kl, share), rel=1e-2), key
    base = -np.take_along_axis(p, rows[:, CTX // 2 + 1 :].numpy()[..., None], -1)
    assert made["reference_perplexity"] == pytest.approx(np.exp(base.mean()), rel=1e-5)

    whole = (tmp_path / "base.kld").read_bytes()
    (tmp_path / "short.kld").write_bytes(whole[:-2])
    (tmp_path / "none.kld").write_bytes(b"_logits_" + bytes(12))
    for name, text, more, code, said in (
        ("base", "b", options, 65, "is about other tokens"),
        ("base", "a", ("--ctx", CTX, "--chunks", CHUNKS + 1), 2, f"--chunks {CHUNKS}"),
        ("base", "a", ("--ctx", CTX // 2), 2, f"--ctx {CTX}"),
        ("short", "a", options, 65, "where its header asks for"),
        ("none", "a", options, 65, "0 chunks of 0 tokens"),
    ):
        args = ("--reference", tmp_path / f"{name}.kld", "--text", place / f"{text}.txt", *more, "--device", "cpu")
        status, _, stderr = quantkit("perplexity", place / "changed.gguf", *args)
        assert status == code and said in stderr and stderr.count("\n") == 1, stderr


def test_a_stride_scores_each_token_once_with_the_text_before_it(place):
    """llama-perplexity's --ppl-stride: chunks of ctx + stride/2 (72, rounded up), the last `stride` tokens scored."""
    stride = 16
    made = perplexity(place / "source.gguf", *("--text", place / "a.txt", "--ctx", CTX, "--stride", stride))
    text = (place / "a.txt").read_text()
    oracle = Oracle(place / "source.gguf")
    ids, length = oracle.tokenize(text), 256
    count = (len(ids) - length + stride - 1) // stride
    rows = torch.tensor([ids[i * stride : i * stride + length] for i in range(count)])
    oracle.close()
    logprobs = oracle_logprobs(place / "source.gguf", rows)[:, length - stride - 1 : length - 1]
    nll = -np.take_along_axis(logprobs, rows[:, length - stride :].numpy()[..., None], -1)
    assert (made["chunks"], made["ctx"]) == (count, length)
    assert made["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-3)


def test_several_texts_are_scored_apart_and_together(place):
    options = ["--ctx", CTX, "--chunks", CHUNKS]
    a, b = (perplexity(place / "source.gguf", "--text", place / f"{n}.txt", *options) for n in "ab")
    both = perplexity(place / "source.gguf", *("--text", place / "a.txt", "--text", place / "b.txt"), *options)
    assert [t["perplexity"] for t in both["texts"]] == pytest.approx([a["perplexity"], b["perplexity"]], rel=1e-6)
    mean = (np.log(a["perplexity"]) + np.log(b["perplexity"])) / 2
    assert both["perplexity"] == pytest.approx(np.exp(mean), rel=1e-6) and both["chunks"] == 2 * CHUNKS


def test_a_ladder_runs_its_reference_once(place, monkeypatch):
    ran = []
    real = scoring.predict
    monkeypatch.setattr(scoring, "predict", lambda net, *rest: ran.append(net.model.name) or real(net, *rest))
    options = ["--reference", place / "source.gguf", "--text", place / "b.txt", "--ctx", CTX, "--chunks", 3]
    first = perplexity(place / "changed.gguf", *options)
    perplexity(place / "changed-q8.gguf", *options)
    assert ran == ["source", "changed", "changed"]
    assert perplexity(place / "changed.gguf", *options) == first and len(ran) == 3


def test_another_text_weight_or_type_is_scored_anew(place, monkeypatch):
    options = ["--text", place / "a.txt", "--ctx", CTX, "--chunks", 2]
    plain = perplexity(place / "source.gguf", *options)["perplexity"]
    assert perplexity(place / "source.gguf", *options, "--dtype", "bf16")["perplexity"] != plain
    assert perplexity(place / "changed.gguf", *options)["perplexity"] != plain
    moved = place / "moved.gguf"
    moved.write_bytes((place / "source.gguf").read_bytes())
    assert perplexity(moved, *options)["perplexity"] == plain
    moved.write_bytes((place / "changed.gguf").read_bytes())
    assert perplexity(moved, *options)["perplexity"] != plain


def test_bf16_is_near_fp32(place):
    options = ["--text", place / "a.txt", "--ctx", CTX, "--chunks", 2]
    plain, half = (perplexity(place / "source.gguf", *options, "--dtype", d)["perplexity"] for d in ("fp32", "bf16"))
    assert half == pytest.approx(plain, rel=0.02)


def test_a_full_cache_gives_way_to_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "LIMIT", 3000)
    for i, name in enumerate("abc"):
        cache.keep(name, {"x": torch.zeros(250)})
        os.utime(tmp_path / f"quantkit/scores/{name}.safetensors", (i + 1, i + 1))
    cache.keep("d", {"x": torch.ones(250)})
    assert cache.load("a") is None and cache.load("b") is None
    assert cache.load("d")["x"].sum() == 250


@pytest.mark.parametrize("ctx", [CTX, 600])
def test_weights_runtime_and_tokenizer_are_told_apart(place, ctx):
    """llama.cpp's own run: its logits for the runtime, ours for the weights; a chunk longer than its default too."""
    options = ["--reference", place / "source.gguf", "--text", place / "a.txt", "--ctx", ctx, "--chunks", 1]
    made = perplexity(place / "changed-q8.gguf", *options, "--engine", "llama.cpp")
    weights = perplexity(place / "changed-q8.gguf", *options)
    assert made["weights"]["kl_divergence"] == weights["kl_divergence"]
    assert made["perplexity"] != made["weights"]["perplexity"]
    assert 0 < made["runtime"]["kl_divergence"]["mean"] < 0.02
    tokens = made["tokenizer"].pop("tokens")
    assert made["tokenizer"] == {"llama_cpp_tokens": tokens, "equal": True, "first_difference": None}
    if ctx == CTX:
        rows = rows_of(place, "a")[:1]
        logprobs = oracle_logprobs(place / "changed-q8.gguf", rows)[:, CTX // 2 : CTX - 1]
        nll = -np.take_along_axis(logprobs, rows[:, CTX // 2 + 1 :].numpy()[..., None], -1)
        assert made["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-6)


def test_what_is_wrong_is_said_in_a_line(place, tmp_path, monkeypatch):
    source = place / "source.gguf"
    for args, code, said in (
        ((source, "--engine", "vllm"), 2, "known: quantkit, llama.cpp"),
        ((source, "--dtype", "int8"), 2, "known: fp32, bf16, fp16"),
        ((source, "--text", place / "a.txt", "--stride", 512), 2, "--stride"),
    ):
        status, _, stderr = quantkit("perplexity", *args, "--device", "cpu")
        assert status == code and said in stderr and stderr.count("\n") == 1, stderr
    llamacpp._library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = ("--text", place / "a.txt", "--ctx", CTX, "--chunks", 1)
    status, _, stderr = quantkit("perplexity", source, *options, "--engine", "llama.cpp", "--device", "cpu")
    assert status == 2 and "gguf-quantkit[llamacpp]" in stderr


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers for one file."""

    content = gzip.compress("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(1200)).encode())

    def do_HEAD(self) -> None:
        found = self.path == f"/datasets/{C4_REPO}/resolve/{C4_REVISION}/{C4_FILE}"
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", C4_REVISION)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args: object) -> None:
        pass


def test_c4_comes_from_the_hub_at_a_pinned_revision(tmp_path, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, real = f"http://127.0.0.1:{server.server_port}", huggingface_hub.hf_hub_download
    local = functools.partial(real, endpoint=address, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)
    text = load_text("c4")
    server.shutdown()
    server.server_close()
    assert text.source == f"{C4_REPO}@{C4_REVISION}/{C4_FILE}"
    assert text.plain() == " ".join(f"document {i}" for i in range(C4_DOCUMENTS))

    def offline(**request: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(BadInput, match=r"c4 cannot be downloaded.*\.jsonl") as caught:
        load_text("c4")
    assert "\n" not in str(caught.value)


def test_tasks_without_lm_eval_say_what_to_install(place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, stderr = quantkit("perplexity", place / "source.gguf", "--tasks", "hellaswag", "--device", "cpu")
    assert status == 2 and "gguf-quantkit[eval]" in stderr and stderr.count("\n") == 1
