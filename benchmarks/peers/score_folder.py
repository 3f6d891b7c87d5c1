"""Load a GPTQ, AWQ or fp16 folder with a reader that is not quantkit's, and score it as llama.cpp's tool would.

    python benchmarks/peers/score_folder.py out/gptq --loader auto_round --text calibration/eval/demo.txt --compare

Prints one JSON object: the loader and its version, perplexity with its standard error, and with `--compare` how far the
peer's weights and logits lie from the same folder read by quantkit into a plain model of transformers.

The readers disagree about versions, so each has an environment of its own, and quantkit's is left alone:

    python -m venv peer
    peer/bin/pip install torch==2.13.0
    peer/bin/pip install -e . transformers accelerate auto-round auto-round-lib         # --loader auto_round
    peer/bin/pip install --no-deps autoawq==0.2.9                                       # --loader autoawq

    python -m venv gptqmodel                                                            # --loader gptqmodel, and
    gptqmodel/bin/pip install torch==2.13.0                                             # transformers for GPTQ, AWQ
    gptqmodel/bin/pip install -e . optimum accelerate datasets dill torchao defuser tokenicer device-smi logbar
    gptqmodel/bin/pip install pypcre threadpoolctl ninja requests pillow protobuf
    gptqmodel/bin/pip install --no-deps gptqmodel==7.7.0

GPTQModel 7.7.0 declares torch>=2.14.1 and works with 2.13.0 on a CPU; without `--no-deps` pip fetches what it declares.
The first time, transformers' default kernel for it is compiled, which takes minutes and a C++ compiler.

Everything is widened to float32 after loading (`--dtype float32`): a reader that multiplies codes and scales in half
precision then differs from another only where it reads something else. `--dtype float16` scores it as it comes; a
fused kernel stays as it is in either case. Runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CTX = 512


def load_transformers(folder: Path, backend: str) -> tuple[nn.Module, str]:
    """transformers by itself; it hands GPTQ to optimum and gptqmodel, AWQ to gptqmodel, where these are installed."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float16)
    return model, f"transformers {version('transformers')}"


def load_auto_round(folder: Path, backend: str) -> tuple[nn.Module, str]:
    """AutoRound's own layers, put in by transformers when it is asked to read a folder of another method this way."""
    from transformers import AutoRoundConfig

    config = AutoRoundConfig(backend=backend)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", quantization_config=config, dtype=torch.float16
    )
    return model, f"auto-round {version('auto-round')}"


def load_gptqmodel(folder: Path, backend: str) -> tuple[nn.Module, str]:
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND[backend.upper()], dtype=torch.float16)
    return loaded.model, f"gptqmodel {version('gptqmodel')}"


def load_autoawq(folder: Path, backend: str) -> tuple[nn.Module, str]:
    """AutoAWQ's own `dequantize_gemm` on every layer: its loader runs on a CPU only through Intel's old extension."""
    from awq.utils.packing_utils import dequantize_gemm
    from safetensors.torch import load_file

    group = json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    for name in [n for n in tensors if n.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        qweight, qzeros, scales = (tensors.pop(stem + part) for part in ("qweight", "qzeros", "scales"))
        weight = dequantize_gemm(qweight, qzeros, scales.float(), 4, group)
        tensors[stem + "weight"] = weight.T.contiguous()
    return plain_model(folder, tensors), f"autoawq {version('autoawq')} (packing_utils.dequantize_gemm)"


def load_compressed_tensors(folder: Path, backend: str) -> tuple[nn.Module, str]:
    """The library's own decompressor on every layer: transformers loads no folders with zero points."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        stem = name.removesuffix("weight_packed")
        parts = {n.removeprefix(stem): tensors.pop(n) for n in list(tensors) if n.startswith(f"{stem}weight_")}
        parts["weight_scale"] = parts["weight_scale"].float()
        tensors[stem + "weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return plain_model(folder, tensors), f"compressed-tensors {version('compressed-tensors')}"


def load_quantkit(folder: Path, backend: str) -> tuple[nn.Module, str]:
    """The folder as quantkit reads it."""
    from quantkit.model import open_model

    tensors = {name: ref.read() for name, ref in open_model(folder).tensors.items()}
    return plain_model(folder, tensors), f"quantkit {version('gguf-quantkit')}"


def plain_model(folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """transformers' model of plain linear layers with these weights, in float32."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or (missing and not config.tie_word_embeddings):
        raise SystemExit(f"the folder does not fit the model: missing {missing}, unexpected {unexpected}")
    return model


LOADERS = {
    "auto_round": load_auto_round,
    "autoawq": load_autoawq,
    "compressed_tensors": load_compressed_tensors,
    "gptqmodel": load_gptqmodel,
    "quantkit": load_quantkit,
    "transformers": load_transformers,
}


def chunks_of(folder: Path, text: Path, count: int) -> Tensor:
    """The first chunks of the text as llama.cpp cuts them: BOS, where the tokenizer adds it, opens every chunk."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_bytes().decode("utf-8"), add_special_tokens=False).input_ids
    bos = tokenizer("").input_ids[:1]
    ids = [*bos, *ids]
    rows = torch.tensor(ids[: len(ids) // CTX * CTX]).view(-1, CTX)[:count].clone()
    if bos:
        rows[:, 0] = bos[0]
    return rows


def compare_weights(peer: nn.Module, ours: nn.Module) -> dict[str, Any]:
    """Over all linear layers. A packed layer tells its matrix when it is given the identity."""
    theirs = dict(peer.named_modules())
    dtype = next(peer.parameters()).dtype
    worst, layers, equal, equal_in_half = 0.0, 0, 0, 0
    for name, layer in ours.named_modules():
        if isinstance(layer, nn.Linear):
            other = theirs[name]
            packed = type(other) is not nn.Linear
            weight = (other(torch.eye(layer.in_features, dtype=dtype)[None])[0].T if packed else other.weight).float()
            worst = max(worst, (weight - layer.weight).abs().max().item())
            layers += 1
            equal += torch.equal(weight, layer.weight)
            equal_in_half += torch.equal(weight.half(), layer.weight.half())
    return {
        "max_weight_difference": worst,
        "layers": layers,
        "layers_equal": equal,
        "layers_equal_in_half_precision": equal_in_half,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loader", choices=sorted(LOADERS), required=True)
    parser.add_argument("--backend", default="auto", help="the kernel, such as auto_round:torch_zp or gptq_torch")
    parser.add_argument("--text", type=Path, default=Path("calibration/eval/demo.txt"))
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--compare", action="store_true", help="against the folder as quantkit reads it")
    parser.add_argument("--json", type=Path, help="also write the result there")
    options = parser.parse_args()

    ours = load_quantkit(options.folder, "")[0] if options.compare else None  # first: gptqmodel replaces `gguf`
    model, reader = LOADERS[options.loader](options.folder, options.backend)
    if options.dtype == "float32":
        nn.Module.float(model)  # transformers' own float() refuses a quantized model
    rows = chunks_of(options.folder, options.text, options.chunks)

    losses, worst = [], 0.0
    scored, targets = slice(CTX // 2, CTX - 1), slice(CTX // 2 + 1, CTX)
    for row in rows:
        logits = model(row[None]).logits[0].float()
        losses.append(nn.functional.cross_entropy(logits[scored], row[targets], reduction="none").double())
        if ours is not None:
            worst = max(worst, (logits - ours(row[None]).logits[0]).abs().max().item())
    nll = torch.cat(losses)
    mean, square = nll.mean().item(), (nll * nll).mean().item()
    linear = [m for n, m in model.named_modules() if n.endswith("layers.0.mlp.down_proj")]
    record: dict[str, Any] = {
        "loader": reader,
        "layer": f"{type(linear[0]).__module__}.{type(linear[0]).__name__}" if linear else None,
        "dtype": options.dtype,
        "perplexity": math.exp(mean),
        "stderr": math.exp(mean) * math.sqrt(max(square - mean * mean, 0.0) / (len(nll) - 1)),
        "chunks": len(rows),
        "tokens_scored": len(nll),
    }
    if ours is not None:
        record["max_logit_difference"] = worst
        record |= compare_weights(model, ours)
    record["versions"] = {name: version(name) for name in ("torch", "transformers")}
    result = json.dumps(record, indent=2)
    if options.json:
        options.json.write_text(result + "\n")
    sys.stdout.write(result + "\n")


if __name__ == "__main__":
    main()
