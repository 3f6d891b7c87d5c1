"""Llama-shaped GGUF files of any size with random weights, for timing: `python benchmarks/synthetic.py 1b out.gguf`.

Weights are Q8_0 blocks of random codes under scales of a trained model's magnitude, written row by row through
gguf-py's writer in little memory. The vocabulary is the toy's, filled up: nothing is ever generated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T


@dataclass(frozen=True)
class Size:
    """The widths of a Llama."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 32000


SIZES = {
    "300m": Size(4, 2048, 5632, 32, 4),
    "1b": Size(22, 2048, 5632, 32, 4),
    "3b": Size(26, 3200, 8704, 32, 32),
    "7b": Size(32, 4096, 11008, 32, 32),
}


def tensors(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the order of llama.cpp's converter."""
    kv = size.hidden // size.heads * size.kv_heads
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (size.vocab, size.hidden)}
    for i in range(size.layers):
        shapes = {
            "attn_norm": (size.hidden,),
            "attn_q": (size.hidden, size.hidden),
            "attn_k": (kv, size.hidden),
            "attn_v": (kv, size.hidden),
            "attn_output": (size.hidden, size.hidden),
            "ffn_norm": (size.hidden,),
            "ffn_gate": (size.ffn, size.hidden),
            "ffn_up": (size.ffn, size.hidden),
            "ffn_down": (size.hidden, size.ffn),
        }
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in shapes.items()}
    return found | {"output_norm.weight": (size.hidden,), "output.weight": (size.vocab, size.hidden)}


def q8_0(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random blocks: codes of a normal distribution that reaches 127 about once a block, as Q8_0 has it; uint8 rows."""
    blocks = shape[0] * shape[1] // 32
    raw = np.empty((blocks, 34), dtype=np.uint8)
    scales = (rng.random(blocks, dtype=np.float32) * 2e-4 + 4e-4).astype("<f2")
    raw[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    codes = np.clip(rng.standard_normal((blocks, 32), dtype=np.float32) * 50, -127, 127).astype(np.int8)
    raw[:, 2:] = codes.view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(path: Path, size: Size) -> Path:
    """Write the model at `path`; a layer's matrices repeat in the next, so that writing takes no longer than needed."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    words = [f"w{i}" for i in range(size.vocab - 258)]
    characters = sorted({*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)})
    tokens = ["<|s|>", "<|e|>", *map(chr, characters), *words][: size.vocab]
    writer.add_name(path.stem)
    writer.add_block_count(size.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.ffn)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_rope_dimension_count(size.hidden // size.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    made: dict[tuple[int, ...], np.ndarray] = {}
    shapes = tensors(size)
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype("f4"), 4 * shape[0], T.F32)
        else:
            rows = (shape[0], shape[1] // 32 * 34)
            writer.add_tensor_info(name, rows, np.dtype("u1"), rows[0] * rows[1], T.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, dtype=np.float32))
        else:
            if shape not in made:
                made[shape] = q8_0(shape, rng)
            writer.write_tensor_data(made[shape])
    writer.close()
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[2]), SIZES[sys.argv[1]]))
