"""`open_model`: a GGUF, a split GGUF, or an HF folder (dense, GPTQ or AWQ) as one record with one way to read weights.

Nothing is read but headers until a tensor's `read()` is called. Tensors carry HF names, since the forward pass is
transformers' own; a GGUF's names, row orders and configuration are turned round here by the architecture's table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit import arch as families
from quantkit.arch.schema import Architecture, Placed
from quantkit.arch.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from quantkit.codecs import decode
from quantkit.codecs.packed import AWQ_PARTS, GPTQ_PARTS, unpack_awq, unpack_gptq
from quantkit.errors import BadInput, FormatError, Unsupported
from quantkit.files.gguf import GGUF, TensorInfo, read_gguf
from quantkit.files.safetensors import NAMES, Folder, open_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TYPE_SUFFIX = re.compile(r"[-._](?:I?Q\d\w*|TQ\d\w*|MXFP4|[BF]+16|F32|fp16|fp32|f16)$", re.IGNORECASE)


@dataclass(frozen=True)
class Ref:
    """One tensor of a model. `read()` gives it as float32 in HF's row order; `type` is how the source stores it."""

    placed: Placed
    type: str
    nbytes: int
    read: Callable[[], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first, as in torch."""
        return self.placed.shape


@dataclass(frozen=True)
class Model:
    """A model that can be read: configuration, texts of its tokenizer files, and every tensor by its HF name."""

    name: str
    path: Path
    format: str  # gguf, dense, gptq or awq
    arch: Architecture
    config: dict[str, Any]
    files: dict[str, str]
    tensors: dict[str, Ref]
    gguf: GGUF | None = None

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        return sum(prod(t.shape) for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors as the source stores them."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def layers(self) -> int:
        """How many decoder blocks."""
        return self.config["num_hidden_layers"]

    def block(self, layer: int) -> dict[str, Ref]:
        """The tensors of one block by their names inside the block."""
        prefix = f"model.layers.{layer}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if t.placed.layer == layer}

    def outer(self) -> dict[str, Ref]:
        """The tensors outside the blocks, by their full names."""
        return {n: t for n, t in self.tensors.items() if t.placed.layer is None}

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return load_tokenizer(self.files)


def open_model(path: str | Path) -> Model:
    """Open whatever model lies at `path`.

    Raises BadInput where nothing is found, FormatError for a damaged file, Unsupported for a family, a tensor type or a
    tokenizer that quantkit has no entry for. An unknown or a missing tensor is an error, never a random initialization.
    """
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        return _open_gguf(_only_gguf(path))
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise BadInput("no such file or folder", where=path, hint="give a GGUF file or an HF model folder")
    return _open_gguf(path)


def _only_gguf(path: Path) -> Path:
    found = sorted(p for p in path.glob("*.gguf") if not re.search(r"-(?!00001)\d{5}-of-\d{5}$", p.stem))
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{len(found)} GGUF files in this folder", where=path, hint=f"name one, such as {found[0].name}")
    raise BadInput("no model in this folder", where=path, hint="it needs a .gguf file, or config.json and safetensors")


def _open_gguf(path: Path) -> Model:
    gguf = read_gguf(path)
    shapes = {n: t.shape for n, t in gguf.tensors.items()}
    arch = families.by_gguf(str(gguf.get("general.architecture")), gguf.get, where=str(path))
    config = arch.config_from_gguf(gguf.get, shapes, lambda name: _decoded(gguf, name))
    files = tokenizer_files({key: value.data for key, value in gguf.metadata.items()})
    ids = {f"{k}_token_id": gguf.get(f"tokenizer.ggml.{g}_token_id") for k, g in _SPECIAL.items()}
    ids = {k: int(v) for k, v in ids.items() if v is not None}
    config |= ids | {"pad_token_id": ids.get("pad_token_id")}  # transformers has defaults of its own for some families
    files["generation_config.json"] = json.dumps(ids, indent=2) + "\n"
    tensors = _match(arch, config, shapes, str(path))
    refs = {p.hf: _gguf_ref(gguf, gguf.tensors[p.gguf], p, config) for p in tensors}
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
    return Model(_TYPE_SUFFIX.sub("", stem), path, "gguf", arch, config, files, refs, gguf)


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _match(
    arch: Architecture, config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], where: str
) -> list[Placed]:
    """Hold what a GGUF holds against what its architecture says it must hold."""
    expected = list(arch.weights(config))
    for p in expected:
        if p.expert is not None and p.gguf.replace("_exps", f".{p.expert}") in found:
            raise Unsupported("one tensor an expert is not read", where=where, hint="convert the model again")
        if p.gguf not in found:
            raise BadInput(f"the tensor {p.gguf} is missing", where=where, hint="the file is incomplete; get it again")
        wanted = p.shape if p.weight.experts is None else (config[p.weight.experts], *p.shape)
        if tuple(found[p.gguf]) != wanted:
            shape = tuple(found[p.gguf])
            raise FormatError(
                f"the tensor {p.gguf} has shape {shape} where {arch.gguf} with these keys has {wanted}",
                where=where,
                hint="the file is damaged or mislabelled",
            )
    if unknown := sorted(set(found) - {p.gguf for p in expected} - arch.computed(config).keys()):
        raise Unsupported(
            f"architecture {arch.gguf} has no entry for the tensor {unknown[0]}",
            where=where,
            hint="this variant of the family is not supported",
        )
    return expected


def _gguf_ref(gguf: GGUF, info: TensorInfo, placed: Placed, config: Mapping[str, Any]) -> Ref:
    nbytes = info.nbytes if placed.expert is None else info.nbytes // info.shape[0]
    start = nbytes * (placed.expert or 0)

    def read() -> Tensor:
        weight = decode(info.type, gguf.raw(info.name)[start : start + nbytes], placed.shape)
        return placed.weight.layout.to_hf(weight, config) if placed.weight.layout else weight

    return Ref(placed, info.type, nbytes, read)


def _refuse_unknown(folder: Folder, refs: Mapping[str, Ref], config: Mapping[str, Any]) -> None:
    """Hold a folder's tensors against those that were asked for; what was left unread must have no effect.

    That is so for rotary frequencies that old folders hold, for a second copy of a tied embedding, and for the biases
    of zeros that AutoGPTQ gives to every matrix.
    """
    stems = {name.rpartition(".")[0] for name in refs}
    for name in sorted(folder.entries.keys() - refs.keys()):
        stem, _, part = name.rpartition(".")
        tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
        packed = stem in stems and part in (*GPTQ_PARTS, *AWQ_PARTS, "g_idx")
        zeros = part == "bias" and stem in stems and not bool(folder.read(name).any())
        if not (tied or packed or zeros or name.endswith("rotary_emb.inv_freq")):
            raise Unsupported(
                f"{config['model_type']} with this configuration has no tensor {name}",
                where=folder.path,
                hint="this variant of the family is not supported",
            )


def _decoded(gguf: GGUF, name: str) -> Tensor:
    info = gguf.tensors[name]
    return decode(info.type, gguf.raw(name), info.shape)


def _open_folder(path: Path) -> Model:
    config = _json(path / "config.json")
    arch = families.by_hf(str(config.get("model_type")), where=str(path / "config.json"))
    known = transformers_config(config, path)
    defaults = known.to_dict() | {name: getattr(known, name) for name in known.attribute_map}  # older names of its keys
    config = arch.complete(config, defaults, where=str(path / "config.json"))
    folder = open_folder(path)
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "dense")
    if method not in _READERS:
        raise Unsupported(f"the format {method!r} is not read", where=path, hint=f"known: {', '.join(_READERS)}")
    refs = {p.hf: _READERS[method](folder, p, quantization) for p in arch.weights(config)}
    _refuse_unknown(folder, refs, config)
    files = {n: (path / n).read_text(encoding="utf-8") for n in TOKENIZER_FILES if (path / n).is_file()}
    if "tokenizer.json" not in files:
        raise BadInput("no tokenizer.json in this folder", where=path, hint="save the fast tokenizer beside the model")
    return Model(path.resolve().name, path, method, arch, config, files, refs)


def transformers_config(config: Mapping[str, Any], where: Path) -> Any:
    """The configuration as transformers completes it; BadInput where it refuses to."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config", "torch_dtype")}
    try:
        return AutoConfig.for_model(config["model_type"], **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise BadInput(f"transformers refuses this configuration ({reason})", where=where) from e


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise FormatError(f"not readable as JSON ({e})", where=path, hint="get it again") from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", where=path, hint="get it again")
    return value


def _dense_ref(folder: Folder, placed: Placed, _: Mapping[str, Any]) -> Ref:
    entry = folder.entries.get(placed.hf)
    if entry is None:
        raise BadInput(f"the tensor {placed.hf} is missing", where=folder.path, hint="the folder is not complete")
    if entry.shape != placed.shape or not entry.dtype.is_floating_point:
        raise FormatError(
            f"the tensor {placed.hf} is {NAMES[entry.dtype]} {entry.shape} where config.json asks for {placed.shape}",
            where=folder.path,
            hint="the folder is damaged or mislabelled",
        )
    return Ref(placed, NAMES[entry.dtype], entry.nbytes, lambda: folder.read(placed.hf).float())


def _packed_ref(
    folder: Folder,
    placed: Placed,
    label: str,
    parts: tuple[str, ...],
    unpack: Callable[[dict[str, Tensor]], Tensor],
) -> Ref:
    stem = placed.hf.removesuffix(".weight")
    names = {part: f"{stem}.{part}" for part in parts}
    if names["qweight"] not in folder.entries:
        return _dense_ref(folder, placed, {})
    if missing := [n for n in names.values() if n not in folder.entries]:
        raise BadInput(f"the tensor {missing[0]} is missing", where=folder.path, hint="the folder is not complete")

    def read() -> Tensor:
        weight = unpack({part: folder.read(n) for part, n in names.items()})
        if tuple(weight.shape) != placed.shape:
            raise FormatError(f"{stem} unpacks to {tuple(weight.shape)}, not {placed.shape}", where=folder.path)
        return weight

    return Ref(placed, label, sum(folder.entries[n].nbytes for n in names.values()), read)


def _gptq_ref(folder: Folder, placed: Placed, quantization: Mapping[str, Any]) -> Ref:
    bits = quantization.get("bits")
    if bits not in (2, 3, 4, 8):
        raise FormatError(f"bits is {bits!r}", where="quantization_config", hint="known: 2, 3, 4, 8")
    v2 = quantization.get("checkpoint_format", quantization.get("format")) == "gptq_v2"
    unpack = lambda parts: unpack_gptq(parts, bits, v2, placed.hf)  # noqa: E731
    return _packed_ref(folder, placed, f"GPTQ-{bits}bit", GPTQ_PARTS, unpack)


def _awq_ref(folder: Folder, placed: Placed, quantization: Mapping[str, Any]) -> Ref:
    if quantization.get("bits") != 4 or str(quantization.get("version", "gemm")).lower() != "gemm":
        raise Unsupported("only 4-bit AWQ GEMM folders are read", where=folder.path, hint="see README, formats")
    return _packed_ref(folder, placed, "AWQ-4bit", AWQ_PARTS, lambda parts: unpack_awq(parts, placed.hf))


_READERS = {"dense": _dense_ref, "gptq": _gptq_ref, "awq": _awq_ref}
