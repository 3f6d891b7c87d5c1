"""Every packed output that quantkit writes, opened by readers that are not ours; their logits beside ours.

    python benchmarks/peers/read_by_others.py make made                     # toys and SmolLM2, every option
    TORCHDYNAMO_DISABLE=1 gptqmodel/bin/python benchmarks/peers/read_by_others.py read made --loader gptqmodel
    peer/bin/python benchmarks/peers/read_by_others.py read made --loader auto_round

`read` prints one row for each output of a format that the reader takes: the largest difference of any logit from the
same folder as quantkit dequantizes it, run by transformers in float32; and how far those weights run in fp16 are from
that, which is what a reader that computes in half precision may be off. The environments are those of
`score_folder.py`. Where a reader fails, its row holds the error. GPTQModel would compile a kernel for every layer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

GRIDS = ("2bit-64g", "3bit-64g", "4bit-64g", "8bit-64g", "4bit-16g", "4bit-128g", "4bit-pc", "8bit-pc")
PACKED = (
    *(f"gptq-{g}" for g in GRIDS),
    *(f"ct-{g}" for g in ("2bit-64g", "4bit-64g", "8bit-64g", "4bit-pc", "8bit-pc")),
)
ASYMMETRIC = ("gptq-2bit-64g", "gptq-3bit-64g", "gptq-4bit-64g", "gptq-8bit-64g", "gptq-4bit-pc")
ASYMMETRIC += ("ct-4bit-64g", "ct-8bit-64g", "ct-4bit-pc")
LLAMA = (*PACKED, *(f"{t}-asym" for t in ASYMMETRIC), "gptq-4bit-64g-desc", "gptq-4bit-64g-asym-desc")
LLAMA += ("awq-4bit-32g", "awq-4bit-64g", "awq-4bit-128g")
EXPERTS = ("gptq-4bit-32g", "awq-4bit-32g", "ct-4bit-32g")
# A source, how it is stored, and the targets that are made of it; Q4_0 and Q8_0 go over exactly.
MADE = {
    "llama": ("Q4_1", LLAMA),
    "exact-4": ("Q4_0", ("gptq-4bit-32g", "gptq-4bit-32g-asym", "ct-4bit-32g", "ct-4bit-32g-asym")),
    "exact-8": ("Q8_0", ("gptq-8bit-32g", "gptq-8bit-32g-asym", "ct-8bit-32g")),
    "mixtral": ("", EXPERTS),
    "qwen3-experts": ("", EXPERTS),
}
SMOLLM2 = ("gptq-4bit-64g", "gptq-4bit-64g-asym", "gptq-4bit-64g-desc", "awq-4bit-64g", "ct-4bit-64g")
FORMATS = {"gptqmodel": ("gptq", "awq"), "auto_round": ("gptq",), "autoawq": ("awq",), "compressed_tensors": ("ct",)}
FORMATS["transformers"] = ("gptq", "awq", "ct")
KERNELS = {"gptqmodel": {"gptq": "gptq_torch", "awq": "awq_torch"}, "auto_round": {"gptq": "auto_round:torch_zp"}}


def make(out: Path, real: bool) -> None:
    """Write every source and convert it; calibration is short, for it is not quality that is looked at."""
    from gguf import GGMLQuantizationType
    from models import SMOLLM2 as ASSET
    from models import fetch
    from toy import toy_model, write_family, write_toy

    out.mkdir(parents=True, exist_ok=True)
    for name, (kind, targets) in MADE.items():
        if kind:
            source = write_toy(out / f"{name}.{kind}.gguf", toy_model(), GGMLQuantizationType[kind])
        else:
            source = write_family(out / f"{name}-source", name)
        convert(source, out / name, targets, "--samples", "4", "--seqlen", "64")
    if real:
        convert(fetch(ASSET), out / "smollm2", SMOLLM2, "--samples", "4", "--inputs", "source")


def convert(source: Path, out: Path, targets: tuple[str, ...], *options: str) -> None:
    named = [f"--to={t}" for t in targets]
    command = [sys.executable, "-m", "quantkit", "convert", source, "-o", out, *named, *options, "--no-eval", "--force"]
    subprocess.run(list(map(str, command)), check=True)


@torch.no_grad()
def read(out: Path, loader: str, backend: str | None, only: str) -> None:
    """A row of the table for each output; ours are run first, since GPTQModel puts a module of its own under `gguf`."""
    from score_folder import LOADERS

    taken = FORMATS[loader]
    folders = [p.parent for p in sorted(out.glob("*/*/config.json")) if p.parent.name.split("-")[0] in taken]
    folders = [f for f in folders if only in str(f)]
    ours = {folder: logits_of(folder) for folder in folders}
    for folder in folders:
        kernel = backend or KERNELS.get(loader, {}).get(folder.name.split("-")[0], "auto")
        exact, bound = ours[folder]
        try:
            model, name = LOADERS[loader](folder, kernel)
            nn.Module.float(model)  # transformers' own float() refuses a quantized model
            far = f"{(model.eval()(IDS).logits.float() - exact).abs().max().item():.2g}"
            far = f"{name} `{kind_of(model)}` | {far}"
        except (Exception, SystemExit) as e:  # a reader's failure is a finding
            far = f"{loader} {kernel} | {type(e).__name__}: {str(e).strip().splitlines()[0][:150] if str(e) else ''}"
        print(f"| {folder.parent.name} | {folder.name} | {far} | {bound:.2g} |", flush=True)


IDS = torch.arange(2, 258)[None] * 7 % 319


def logits_of(folder: Path) -> tuple[Tensor, float]:
    """Of the folder as quantkit reads it, in float32; and the most that fp16 weights and activations change of them."""
    from quantkit.forward import network, whole
    from quantkit.model import open_model

    model = whole(network(open_model(folder), torch.device("cpu")))
    exact = model(IDS).logits
    return exact, (model.half()(IDS).logits.float() - exact).abs().max().item()


def kind_of(model: nn.Module) -> str:
    """The class of the layer that holds a projection."""
    return next((type(m).__name__ for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loader", choices=sorted(FORMATS))
    parser.add_argument("--backend", help="the kernel, in place of the reader's plain torch one")
    parser.add_argument("--only", default="", help="folders whose path holds this")
    parser.add_argument("--no-smollm2", action="store_true")
    options = parser.parse_args()
    if options.step == "make":
        make(options.folder, not options.no_smollm2)
    else:
        read(options.folder, options.loader, options.backend, options.only)


if __name__ == "__main__":
    main()
