"""What a model takes to run: weights, KV cache, compute and output buffers, part by part, as llama.cpp allocates them.

Sources: llama.cpp `src/llama-kv-cache*.cpp` (cells in steps of 256; a sliding window keeps window + one micro-batch),
`src/llama-context.cpp` (a graph reserved for 512 tokens with all their logits). The compute buffer's formula was fitted
to what it logs for models whose widths differ, see tests/test_advise.py, and holds with flash attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.model import Model
from quantkit.targets import Output

UBATCH, STEP = 512, 256
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
# Beside its buffers a device holds the driver's own: gguf-parser-go counts 250 MiB of VRAM and 150 MiB of RAM.
DEVICE_OVERHEAD, HOST_OVERHEAD = 250 << 20, 150 << 20


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's tensors: of each block, and outside; those of the experts are counted in the blocks too."""

    name: str
    format: str
    nbytes: int  # of its files
    blocks: tuple[int, ...]
    experts: int  # bytes of all experts
    embedding: int
    output: int  # the output matrix and final norm; the embedding again where they are tied
    config: Mapping[str, Any]
    number: int = 0  # of experts in a block

    @property
    def total(self) -> int:
        """In one memory: a tied embedding is there once."""
        return sum(self.blocks) + self.embedding + (0 if self.config.get("tie_word_embeddings") else self.output)

    @property
    def active(self) -> int:
        """Bytes read for one token: of the embedding one row, of the experts those that are chosen."""
        chosen = self.experts * self.config.get("num_experts_per_tok", 1) // self.number if self.number else 0
        return sum(self.blocks) + self.output - self.experts + chosen


def weights_of(name: str, model: Model) -> Weights:
    """A model's own tensors."""
    sizes = [(r.placed.gguf, r.placed.layer, r.placed.expert is not None, r.nbytes) for r in model.tensors.values()]
    return _weights(name, model.format, model.disk_bytes, sizes, model)


def weights_of_output(output: Output, model: Model) -> Weights:
    """What an output planned for `model` will have."""
    by_gguf = {r.placed.gguf: r.placed for r in model.tensors.values()}
    sizes = []
    for row in output.rows:
        placed = model.tensors[row.source].placed if row.source in model.tensors else by_gguf.get(row.name)
        layer, expert = (placed.layer, placed.expert is not None) if placed else (None, False)
        sizes.append((placed.gguf if placed else row.name, layer, expert, row.nbytes))
    return _weights(output.target, output.format, output.nbytes, sizes, model)


def _weights(
    name: str, format: str, nbytes: int, sizes: list[tuple[str, int | None, bool, int]], model: Model
) -> Weights:
    blocks = [0] * model.layers
    for _, layer, _, size in sizes:
        if layer is not None:
            blocks[layer] += size
    embedding = sum(size for n, layer, _, size in sizes if n.startswith("token_embd"))
    outer = sum(size for _, layer, _, size in sizes if layer is None) - embedding
    if model.config.get("tie_word_embeddings"):
        outer += embedding
    experts = sum(size for _, _, expert, size in sizes if expert)
    return Weights(name, format, nbytes, tuple(blocks), experts, embedding, outer, model.config, model.experts)


def cells(config: Mapping[str, Any], layer: int, ctx: int) -> int:
    """Tokens that a layer's cache holds at a context of `ctx`: all, or its window and a micro-batch."""
    whole = _padded(ctx)
    kinds = config.get("layer_types")
    if not kinds or kinds[layer] != "sliding_attention" or not config.get("sliding_window"):
        return whole
    return min(whole, _padded(config["sliding_window"] + UBATCH))


def _padded(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def kv_bytes(config: Mapping[str, Any], layer: int, ctx: int, kv: str, batch: int = 1) -> int:
    """Bytes of one layer's keys and values, for `batch` sequences of `ctx` tokens."""
    values = 2 * config["num_key_value_heads"] * config["head_dim"]
    return int(batch * cells(config, layer, ctx) * values * KV_BYTES[kv])


def compute_bytes(config: Mapping[str, Any], ctx: int, batch: int = 1) -> int:
    """The buffer that a graph of 512 tokens is computed in: its widest moment and the attention masks (f16)."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    if experts := config.get("num_experts_per_tok"):
        ffn = experts * (config.get("moe_intermediate_size") or ffn)
    heads = 2 * config["head_dim"] * (config["num_attention_heads"] + config["num_key_value_heads"])
    widest = 5 * hidden + max(config["vocab_size"], 3 * ffn, heads)
    masks = {cells(config, layer, ctx) for layer in range(config["num_hidden_layers"])}
    return UBATCH * (4 * widest + 2 * batch * sum(masks))


def output_bytes(config: Mapping[str, Any], batch: int = 1) -> int:
    """The logits that are handed back."""
    return 4 * config["vocab_size"] * batch


@dataclass(frozen=True)
class Need:
    """Memory of a running model by parts, in bytes."""

    weights: int
    kv: int
    compute: int
    output: int
    overhead: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.kv + self.compute + self.output + self.overhead

    def record(self) -> dict[str, int]:
        """As JSON."""
        parts = {n: getattr(self, n) for n in ("weights", "kv", "compute", "output", "overhead")}
        return parts | {"total": self.total}


def in_ram(w: Weights, ctx: int, kv: str, batch: int = 1) -> Need:
    """All of a model in RAM."""
    layers = range(len(w.blocks))
    cache = sum(kv_bytes(w.config, i, ctx, kv, batch) for i in layers)
    return Need(w.total, cache, compute_bytes(w.config, ctx, batch), output_bytes(w.config, batch), HOST_OVERHEAD)


def on_device(w: Weights, ctx: int, kv: str, batch: int = 1, layers: int | None = None) -> tuple[Need, Need]:
    """What a card and RAM hold with the last `layers` blocks on the card; None: all of them and the output.

    llama.cpp keeps the token embedding in RAM and offloads the last blocks first; other programs hold all in VRAM.
    """
    n = len(w.blocks)
    count = n if layers is None else layers
    there = range(n - count, n)
    cache = [kv_bytes(w.config, i, ctx, kv, batch) for i in range(n)]
    compute = compute_bytes(w.config, ctx, batch)
    moved = sum(w.blocks[i] for i in there) + (w.output if layers is None else 0)
    if w.format != "gguf":
        moved = w.total
    device = Need(moved, sum(cache[i] for i in there), compute, output_bytes(w.config, batch), DEVICE_OVERHEAD)
    left = w.embedding + sum(w.blocks) + (0 if w.config.get("tie_word_embeddings") else w.output) - moved
    host = Need(max(left, 0), sum(cache) - device.kv, compute if count < n else 0, device.output, HOST_OVERHEAD)
    return (device if count or layers is None else replace(device, compute=0, output=0, overhead=0)), host


def token_bytes(w: Weights, ctx: int, kv: str) -> tuple[int, int]:
    """Bytes read to make one token: of the active weights, and of the cache of a sequence of `ctx` tokens."""
    return w.active, sum(kv_bytes(w.config, i, ctx, kv) for i in range(len(w.blocks)))


def quantized_shapes(model: Model) -> set[tuple[int, ...]]:
    """Shapes (out, in) of the packed matrices of a folder."""
    return {r.shape for r in model.tensors.values() if r.type.startswith(("GPTQ", "AWQ", "CT"))}
