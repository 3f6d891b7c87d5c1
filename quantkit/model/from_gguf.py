"""A GGUF, or a split set, as a `Model`: the architecture's table turns names, row orders and configuration round."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quantkit import arch as families
from quantkit.arch.schema import Architecture, Placed
from quantkit.arch.tokenizer import tokenizer_files
from quantkit.chat import ChatTemplate
from quantkit.codecs import Bytes, Floats, decode, in_bytes
from quantkit.errors import BadInput, FormatError, Unsupported
from quantkit.files.gguf import GGUF, TensorInfo, read_gguf, stacked
from quantkit.files.key_types import require_types
from quantkit.later import Tensor, torch
from quantkit.model.given import laid_over
from quantkit.model.record import Model, Ref

EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|down|up))\.(\d+)\.weight", re.ASCII)
_TYPE_SUFFIX = re.compile(r"[-._](?:I?Q\d\w*|TQ\d\w*|MXFP4|[BF]+16|F32|fp16|fp32|f16)$", re.IGNORECASE)


def open_gguf(path: Path, overrides: Sequence[str] = (), template: ChatTemplate | None = None) -> Model:
    """The model in a GGUF, by its own name or that of any shard of its set; see `open_model`."""
    read = read_gguf(path)
    require_types(read.metadata)
    if other := _OTHERS.get(str(read.get("general.type"))):
        raise BadInput(f"holds {other}, and no model", where=path, hint="name the model's own file")
    gguf, facts = laid_over(_with_stacks(read), overrides, template)
    shapes = {n: t.shape for n, t in gguf.tensors.items()}
    arch = families.by_gguf(str(gguf.get("general.architecture")), partial(_single, gguf), where=str(path))
    config = arch.config_from_gguf(partial(_single, gguf), shapes, lambda name: _numbers(gguf, name))
    ids = {f"{k}_token_id": gguf.get(f"tokenizer.ggml.{g}_token_id") for k, g in _SPECIAL.items()}
    ids = {k: int(v) for k, v in ids.items() if v is not None}
    config |= ids | {"pad_token_id": ids.get("pad_token_id")}  # transformers has defaults of its own for some families

    def files() -> dict[str, str]:
        made = tokenizer_files({key: value.data for key, value in gguf.metadata.items()})
        return made | {"generation_config.json": json.dumps(ids, indent=2) + "\n"}

    tensors = _match(arch, config, shapes, str(path))
    _require_tokens(gguf, config["vocab_size"])
    refs = {p.hf: _gguf_ref(gguf, gguf.tensors[p.gguf], p, config) for p in tensors}
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
    name = _TYPE_SUFFIX.sub("", stem)
    return Model(name, path, "gguf", arch, config, files, refs, gguf, facts=facts, template=template)


_OTHERS = {"imatrix": "an importance matrix", "adapter": "an adapter", "mmproj": "an image encoder"}  # general.type
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _with_stacks(gguf: GGUF) -> GGUF:
    """The experts that a GGUF of 2023 holds one by one as the stacks of today (llama.cpp pull request 6387)."""
    experts: dict[str, dict[int, str]] = {}
    for name in gguf.tensors:
        if match := EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}_exps.weight", {})[int(match[2])] = name
    for parts in experts.values():
        if missing := set(range(len(parts))) - parts.keys():
            name = EXPERT.sub(rf"\g<1>.{min(missing)}.weight", next(iter(parts.values())))
            raise BadInput(f"the tensor {name} is missing", where=gguf.paths[0], hint="get the file again")
    return stacked(gguf, {name: [parts[e] for e in range(len(parts))] for name, parts in experts.items()})


def _single(gguf: GGUF, key: str) -> Any:
    """The one value of a key, if there is one; FormatError for an array, of which our families have none."""
    value = gguf.get(key)
    if isinstance(value, list | np.ndarray):
        raise FormatError("holds more than one value", where=key, hint="this variant of the family is not supported")
    return value


def _require_tokens(gguf: GGUF, rows: int) -> None:
    """FormatError for a vocabulary that is not the embedding's; llama.cpp opens no such file."""
    tokens = gguf.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != rows:
        what = f"{len(tokens)} tokens for an embedding of {rows} rows"
        raise FormatError(what, where="tokenizer.ggml.tokens", hint="the file is damaged; get it again")


def _match(
    arch: Architecture, config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], where: str
) -> list[Placed]:
    """Hold what a GGUF holds against what its architecture says it must hold."""
    expected = []
    for p in arch.weights(config):
        expected.append(p)
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
    expert = placed.expert
    nbytes = info.nbytes if expert is None else info.nbytes // info.shape[0]

    def stored() -> Bytes:
        return gguf.stored(info.name) if expert is None else gguf.stored_matrix(info.name, expert)

    def read() -> Tensor:
        weight = decode(info.type, torch.from_numpy(stored()), placed.shape)
        return layout.to_hf(weight, config) if layout else weight

    def rows() -> Bytes:
        raw = stored().reshape(prod(placed.shape[:-1]), -1)
        return layout.to_hf(raw, config) if layout else raw  # of a matrix, it only moves rows

    layout = placed.weight.layout
    return Ref(placed, info.type, nbytes, read, rows if layout is None or len(placed.shape) == 2 else None)


def _numbers(gguf: GGUF, name: str) -> Floats:
    """A tensor that the configuration is made from, in one row."""
    info = gguf.tensors[name]
    return in_bytes(info.type, gguf.stored(name)[None])(slice(None), np.empty((1, prod(info.shape)), np.float32))[0]
