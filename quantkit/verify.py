"""Every output is read back from disk before it gets its name, and compared with what the solver returned.

Packed folders are taken apart by `codecs.packed.unpack_*`, GGUF blocks by the torch decoders: neither is the code that
wrote them. What is compared is a hash of the float32 weight each tensor stands for, so nothing has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantkit.codecs import decode_torch, lookup
from quantkit.errors import QuantkitError, VerifyError
from quantkit.files.raw import seal
from quantkit.later import Tensor, torch
from quantkit.model import Model, open_model
from quantkit.targets import Output, Row

AT_ONCE = 2  # tensors that are read back: each takes a few times its size in float32


def digest(value: Tensor) -> str:
    """A hash of a weight's float32 values; the sign of a zero does not count."""
    return seal([value.detach().float() + 0.0])


def reopened(output: Output, path: Path) -> Model:
    """The finished `output`, opened again; VerifyError where its size is not the planned one or it does not open."""
    check_size(output, path)
    try:
        return open_model(path)
    except QuantkitError as e:
        raise VerifyError(f"does not open again ({e})", where=output.path) from e


def check_size(output: Output, path: Path) -> None:
    """VerifyError where the files of the finished `output` are not as large as planned."""
    found = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    if found != output.nbytes:
        raise VerifyError(f"has {found:,} bytes where {output.nbytes:,} were planned", where=output.path)


def verify(output: Output, path: Path, digests: Mapping[str, str]) -> Iterator[str]:
    """Reopen `output` at `path` and hold every tensor against its digest (by HF name), yielding each name when done.

    Opening holds names, shapes and configuration against the architecture. Raises VerifyError.
    """
    model = reopened(output, path)

    def check(row: Row) -> str | None:
        value = _read(model, row)
        if not bool(torch.isfinite(value).all()):
            return f"the tensor {row.name} holds values that are not finite"
        if digest(value) != digests[row.source]:
            return f"the tensor {row.name} does not read back as it was solved"
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for row, fault in zip(output.rows, pool.map(check, output.rows), strict=True):
            if fault:
                raise VerifyError(fault, where=output.path)
            yield row.name


def _read(model: Model, row: Row) -> Tensor:
    if model.gguf is None:
        return model.tensors[row.source].read()
    info = model.gguf.tensors[row.name]
    return decode_torch(lookup(info.type), model.gguf.raw(info.name)).view(info.shape)
