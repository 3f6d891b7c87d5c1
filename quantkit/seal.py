"""Verification of outputs whose bytes are their meaning - GGUF files and folders of plain floats - by those bytes.

What was handed to the writer is hashed, and hashed again as it lies on the disk where the reopened file says it lies:
every byte of every tensor, which finds one that is damaged, cut off or in another's place. Its type must be the planned
one. That a block's bytes stand for what libggml says is a fact about block types, which the tests prove for all kinds
of blocks; here the torch decoder, which has no part in writing, is held against libggml on rows from all over each
tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from quantkit.codecs import decode, decode_torch, lookup
from quantkit.errors import VerifyError
from quantkit.files.gguf import GGUF
from quantkit.files.safetensors import open_folder
from quantkit.model import Model
from quantkit.targets import Output, Row
from quantkit.verify import reopened

SAMPLE = 1 << 13  # weights of a tensor that both decoders are given, in whole rows


def seal(parts: Iterable[Tensor]) -> str:
    """A hash of tensors' bytes, SHA-256 because processors have it built in."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def check_seals(output: Output, path: Path, seals: Mapping[str, str]) -> Iterator[str]:
    """Reopen `output` at `path` and hold every tensor against its seal (by HF name), yielding each name when done.

    Opening holds names, shapes and configuration against the architecture. Raises VerifyError.
    """
    model = reopened(output, path)
    read, kinds = _reader(model, path)

    def check(row: Row) -> str | None:
        if kinds[row.name] != row.type:
            return f"the tensor {row.name} is {kinds[row.name]} where {row.type} was planned"
        if seal([read(row.name)]) != seals[row.source]:
            return f"the tensor {row.name} does not read back as it was written"
        if model.gguf and not _both_decoders_agree(model.gguf, row.name):
            return f"two decoders read the tensor {row.name} differently"
        return None

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for row, fault in zip(output.rows, pool.map(check, output.rows), strict=True):
            if fault:
                raise VerifyError(fault, where=output.path)
            yield row.name


def _reader(model: Model, path: Path) -> tuple[Callable[[str], Tensor], dict[str, str]]:
    """How to read what is stored as a tensor, and the type of each, as a plan names it."""
    if model.gguf:
        return model.gguf.raw, {name: info.type for name, info in model.gguf.tensors.items()}
    folder = open_folder(path)
    return folder.read, {name: str(entry.dtype).removeprefix("torch.") for name, entry in folder.entries.items()}


def _both_decoders_agree(gguf: GGUF, name: str) -> bool:
    info = gguf.tensors[name]
    codec, width = lookup(info.type), info.shape[-1]
    rows = gguf.raw(name).view(-1, codec.row_bytes(width))
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), -(-SAMPLE // width))).long()]
    return torch.equal(decode(info.type, some, (len(some), width)), decode_torch(codec, some).view(len(some), width))
