"""An HF folder as a `Model`: plain floats, GPTQ or AWQ, told apart by `quantization_config`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from quantkit import arch as families
from quantkit.arch.facts import facts_of, stated
from quantkit.arch.schema import Placed, require_blocks
from quantkit.chat import ChatTemplate
from quantkit.codecs import CODECS, Bytes
from quantkit.codecs.packed import AWQ_PARTS, COMPRESSED_PARTS, GPTQ_PARTS, unpack_awq, unpack_compressed, unpack_gptq
from quantkit.errors import BadInput, FormatError, Unsupported
from quantkit.files.safetensors import Folder, open_folder
from quantkit.later import Tensor
from quantkit.model.given import stated_config, with_template
from quantkit.model.mixed import compressed_settings, gptq_settings
from quantkit.model.record import Model, Ref, transformers_config

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def open_hf_folder(path: Path, overrides: Sequence[str] = (), template: ChatTemplate | None = None) -> Model:
    """The model in a folder with config.json, safetensors and tokenizer.json; see `open_model`."""
    config = _json(path / "config.json")
    arch = families.by_hf(str(config.get("model_type")), where=str(path / "config.json"))
    facts = stated(overrides, facts_of([arch]))
    folder = open_folder(path)
    require_blocks(config, len(folder.entries), str(path / "config.json"))
    known = transformers_config(config, path)
    defaults = known.to_dict() | {name: getattr(known, name) for name in known.attribute_map}  # older names of its keys
    config = stated_config(arch.complete(config, defaults, where=str(path / "config.json")), facts)
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise FormatError("quantization_config is not an object", where=path / "config.json", hint="get it again")
    method = quantization.get("quant_method", "dense")
    if method not in _READERS:
        raise Unsupported(f"the format {method!r} is not read", where=path, hint=f"known: {', '.join(_READERS)}")
    refs = {p.hf: _READERS[method](folder, p, quantization) for p in arch.weights(config)}
    _refuse_unknown(folder, refs, config)
    files = {n: (path / n).read_text(encoding="utf-8") for n in TOKENIZER_FILES if (path / n).is_file()}
    if "tokenizer.json" not in files:
        raise BadInput("no tokenizer.json in this folder", where=path, hint="save the fast tokenizer beside the model")
    files = with_template(files, template) if template else files
    name = path.resolve().name
    return Model(name, path, method, arch, config, lambda: files, refs, facts=facts, template=template)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise FormatError(f"not readable as JSON ({e})", where=path, hint="get it again") from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", where=path, hint="get it again")
    return value


def _refuse_unknown(folder: Folder, refs: Mapping[str, Ref], config: Mapping[str, Any]) -> None:
    """Hold a folder's tensors against those that were asked for; what was left unread must have no effect.

    That is so for rotary frequencies that old folders hold, for a second copy of a tied embedding, and for the biases
    of zeros that AutoGPTQ gives to every matrix.
    """
    stems = {name.rpartition(".")[0] for name in refs}
    for name in sorted(folder.entries.keys() - refs.keys()):
        stem, _, part = name.rpartition(".")
        tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
        packed = stem in stems and part in (*GPTQ_PARTS, *AWQ_PARTS, *COMPRESSED_PARTS, "g_idx", "weight_zero_point")
        zeros = part == "bias" and stem in stems and not bool(folder.read(name).any())
        if not (tied or packed or zeros or name.endswith("rotary_emb.inv_freq")):
            raise Unsupported(
                f"{config['model_type']} with this configuration has no tensor {name}",
                where=folder.path,
                hint="this variant of the family is not supported",
            )


def _dense_ref(folder: Folder, placed: Placed, _: Mapping[str, Any]) -> Ref:
    entry = folder.entries.get(placed.hf)
    if entry is None:
        raise BadInput(f"the tensor {placed.hf} is missing", where=folder.path, hint="the folder is not complete")
    if entry.shape != placed.shape or "F" not in entry.type:
        raise FormatError(
            f"the tensor {placed.hf} is {entry.type} {entry.shape} where config.json asks for {placed.shape}",
            where=folder.path,
            hint="the folder is damaged or mislabelled",
        )

    def stored() -> Bytes:
        return folder.stored(placed.hf).reshape(prod(placed.shape[:-1]), -1)

    plain = entry.type in CODECS  # as F64 is not
    return Ref(placed, entry.type, entry.nbytes, lambda: folder.read(placed.hf).float(), stored if plain else None)


_SCALE_PARTS, _SCALES, _INTEGERS = ("scales", "weight_scale"), ("F16", "BF16", "F32"), ("I32", "I64")


def _packed_ref(
    folder: Folder,
    placed: Placed,
    label: str,
    parts: tuple[str, ...],
    unpack: Callable[[dict[str, Tensor]], Tensor],
) -> Ref:
    stem = placed.hf.removesuffix(".weight")
    names = {part: f"{stem}.{part}" for part in parts}
    if names[parts[0]] not in folder.entries:
        return _dense_ref(folder, placed, {})
    if missing := [n for n in names.values() if n not in folder.entries]:
        raise BadInput(f"the tensor {missing[0]} is missing", where=folder.path, hint="the folder is not complete")
    for part, name in names.items():
        kind, known = folder.entries[name].type, _SCALES if part in _SCALE_PARTS else _INTEGERS
        if kind not in known:
            raise FormatError(f"{name} has the type {kind}", where=folder.path, hint=f"known: {', '.join(known)}")

    def read() -> Tensor:
        weight = unpack({part: folder.read(n) for part, n in names.items()})
        if tuple(weight.shape) != placed.shape:
            raise FormatError(f"{stem} unpacks to {tuple(weight.shape)}, not {placed.shape}", where=folder.path)
        return weight

    return Ref(placed, label, sum(folder.entries[n].nbytes for n in names.values()), read)


def _gptq_ref(folder: Folder, placed: Placed, quantization: Mapping[str, Any]) -> Ref:
    settings = gptq_settings(quantization, placed.hf.removesuffix(".weight"))
    bits = settings.get("bits")
    if bits not in (2, 3, 4, 8):
        raise FormatError(f"bits is {bits!r}", where="quantization_config", hint="known: 2, 3, 4, 8")
    v2 = quantization.get("checkpoint_format", quantization.get("format")) == "gptq_v2"
    unpack = lambda parts: unpack_gptq(parts, bits, v2, placed.hf)  # noqa: E731
    return _packed_ref(folder, placed, f"GPTQ-{bits}bit", GPTQ_PARTS, unpack)


def _awq_ref(folder: Folder, placed: Placed, quantization: Mapping[str, Any]) -> Ref:
    if quantization.get("bits") != 4 or str(quantization.get("version", "gemm")).lower() != "gemm":
        raise Unsupported("only 4-bit AWQ GEMM folders are read", where=folder.path, hint="see README, formats")
    return _packed_ref(folder, placed, "AWQ-4bit", AWQ_PARTS, lambda parts: unpack_awq(parts, placed.hf))


def _compressed_ref(folder: Folder, placed: Placed, quantization: Mapping[str, Any]) -> Ref:
    weights = compressed_settings(quantization, placed.hf.removesuffix(".weight"))
    bits = int(weights.get("num_bits") or 0)
    if quantization.get("format") != "pack-quantized" or weights.get("type") != "int" or bits not in range(2, 9):
        raise Unsupported("only pack-quantized integers are read", where=folder.path, hint="see README")
    parts = COMPRESSED_PARTS if weights.get("symmetric", True) else (*COMPRESSED_PARTS, "weight_zero_point")
    return _packed_ref(folder, placed, f"CT-{bits}bit", parts, lambda found: unpack_compressed(found, bits, placed.hf))


_READERS = {"dense": _dense_ref, "gptq": _gptq_ref, "awq": _awq_ref, "compressed-tensors": _compressed_ref}
