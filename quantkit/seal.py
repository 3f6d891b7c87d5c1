"""Verification of outputs whose bytes are their meaning - GGUF files and folders of plain floats - by those bytes.

What was handed to the writer is hashed, and hashed again as it lies on the disk. Unlike weights, which `verify` takes
apart and compares as float32, no weight has to be hashed when it is solved. That a block's bytes stand for what libggml
says is held against the torch decoder, which has no part in writing, on every weight of every tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from quantkit.codecs import decode, decode_torch, lookup
from quantkit.errors import VerifyError
from quantkit.files.gguf import GGUF
from quantkit.files.safetensors import open_folder
from quantkit.targets import Output, Row
from quantkit.verify import reopened

SLAB = 1 << 18  # weights that both decoders are given at a time: their temporaries stay in a core's cache


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
    gguf, read = model.gguf, model.gguf.raw if model.gguf else open_folder(path).read

    def check(row: Row) -> str | None:
        if seal([read(row.name)]) != seals[row.source]:
            return f"the tensor {row.name} does not read back as it was written"
        if gguf and not _both_decoders_agree(gguf, row.name):
            return f"two decoders read the tensor {row.name} differently"
        return None

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for row, fault in zip(output.rows, pool.map(check, output.rows), strict=True):
            if fault:
                raise VerifyError(fault, where=output.path)
            yield row.name


def _both_decoders_agree(gguf: GGUF, name: str) -> bool:
    info = gguf.tensors[name]
    codec, width = lookup(info.type), info.shape[-1]
    slabs = gguf.raw(name).view(-1, codec.row_bytes(width)).split(max(1, SLAB // width))
    return all(
        torch.equal(decode(info.type, slab, (len(slab), width)), decode_torch(codec, slab).view(len(slab), width))
        for slab in slabs
    )
