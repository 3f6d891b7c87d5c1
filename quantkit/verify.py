"""Every output is read back from disk before it gets its name, and compared with what the solver returned.

Packed folders are taken apart by `codecs.packed.unpack_*`, which is not the code that wrote them. What is compared is a
hash of the float32 weight each tensor stands for, so nothing has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from quantkit.codecs import Rows, slabs
from quantkit.errors import BadInput, QuantkitError, VerifyError
from quantkit.files.raw import seal
from quantkit.model import Model, open_model
from quantkit.targets import Output, Row
from quantkit.targets.target import finite

AT_ONCE = 2  # tensors that are read back: packed, each takes a few times its size in float32


def digest(rows: Rows, shape: tuple[int, ...]) -> str:
    """A hash of the float32 values of a weight of `shape`; the sign of a zero does not count."""
    return seal(rows(part).detach().float() + 0.0 for part in slabs(prod(shape) // shape[-1], shape[-1]))


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
        rows = model.tensors[row.source].rows()
        try:
            found = digest(lambda part: finite(row.name, rows(part)), row.shape)
        except BadInput as e:
            return f"the tensor {row.name} {e.what}"
        return None if found == digests[row.source] else f"the tensor {row.name} does not read back as it was solved"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for row, fault in zip(output.rows, pool.map(check, output.rows), strict=True):
            if fault:
                raise VerifyError(fault, where=output.path)
            yield row.name
