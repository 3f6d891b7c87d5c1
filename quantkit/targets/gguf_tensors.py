"""The tensors of a GGUF to be: what each is made of, and how one becomes bytes of its type.

On the CPU a GGUF's own bytes go straight to libggml (`codecs.recode`). Floats in memory, of a folder or of a block that
was calibrated, and every tensor on another device, are torch's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from quantkit.arch.rope import Array
from quantkit.codecs import (
    Numbers,
    Rows,
    decode,
    decoded,
    encode,
    in_bytes,
    lookup,
    native,
    read_through,
    share_out,
    slabs,
)
from quantkit.errors import BadInput
from quantkit.files.imatrix import Imatrix
from quantkit.later import Device, Tensor, torch
from quantkit.model import Model, in_rows
from quantkit.targets.mixtures import quantizable
from quantkit.targets.target import Piece, Row, Solved, finite
from quantkit.targets.unsolved import recoded, straight, told_of, weight_loss


@dataclass(frozen=True)
class Held:
    """One tensor of the new file: its name there, shape and present type, and the HF tensors it is made of.

    These are one, or all experts of a stack, and are solved in one piece. A tensor that only a GGUF has is `computed`
    and rides along with the embedding.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    parts: tuple[str, ...]
    reads: tuple[str, ...] = ()  # the activation that each part is fed
    computed: Array | None = None

    @property
    def source(self) -> str:
        """Its one name among the source's tensors."""
        return self.parts[0] if self.computed is None else self.name


def held(model: Model) -> list[Held]:
    """Every tensor of the new file: in the order of a GGUF source, or from a folder as the architecture's rows stand.

    From a folder, what llama.cpp does not quantize becomes float32, as its own converter has it.
    """
    parts: dict[str, list[str]] = {}
    for source, ref in model.tensors.items():
        parts.setdefault(ref.placed.gguf, []).append(source)
    made = {}
    for name, sources in parts.items():
        ref = model.tensors[sources[0]]
        shape = ref.shape if ref.placed.expert is None else (len(sources), *ref.shape)
        fed = tuple(a for s in sources if (a := model.tensors[s].placed.reads))
        made[name] = Held(name, shape, ref.type, tuple(sources), fed)
    embedding = next(iter(model.tensors))
    for name, value in model.arch.computed(model.config).items():
        made[name] = Held(name, tuple(value.shape), "F32", (embedding,), (), value)
    if model.gguf is not None:
        return [replace(made[n], type=t.type) for n, t in model.gguf.tensors.items()]
    return [t if quantizable(t.name, t.shape) else replace(t, type="F32") for t in made.values()]


def importance_of(piece: Piece, tensor: Held, given: Imatrix | None, calibrated: bool) -> Array | None:
    """The importance of the tensor's columns, (experts, width): as it is given, or as the calibration has it."""
    if given:
        return given.importance(tensor.name).reshape(-1, tensor.shape[-1])
    stats = [piece.stats[name] for name in tensor.reads] if calibrated else []
    return torch.stack([s.importance for s in stats]).cpu().numpy() if stats else None


def encoded(piece: Piece, tensor: Held, row: Row, importance: Array | None) -> Solved:
    """One tensor as bytes of its type in GGUF's row order, and the error that makes.

    `importance` is (experts, width), one row for a matrix that is no stack of experts.
    """
    count, width = prod(row.shape) // row.shape[-1], row.shape[-1]
    numbers = _numbers(piece, tensor)
    if row.solver == "copy" and piece.model.gguf is not None:
        _check(piece, tensor, numbers, count, width)
        return Solved(row.source, {row.name: piece.model.gguf.stored(row.name)}, None, 0.0)
    if numbers:
        return straight(row.source, row.name, row.type, numbers, count, width, importance)
    rows = gguf_rows(piece, tensor)
    weights = None if importance is None else torch.from_numpy(importance)
    try:
        raw, loss = encode_rows(row.type, rows, count, width, weights, piece.device)
    except BadInput as e:
        raise BadInput(e.what, where=e.where or row.name, hint=e.hint) from e
    if piece.stats and tensor.reads:
        stats = [piece.stats[name] for name in tensor.reads]
        before, made = told_of(rows(slice(0, count)), len(stats)), told_of(raw, len(stats))
        loss = weight_loss(before, decode(row.type, made, before.shape), *stats)
    return Solved(row.source, {row.name: raw.flatten()}, None, loss)


def _numbers(piece: Piece, tensor: Held) -> Numbers | None:
    """The rows as they lie in a GGUF, where libggml does the work: HF's order and back again would end the same."""
    gguf = piece.model.gguf
    if gguf is None or piece.weights or not native(piece.device):
        return None
    return in_bytes(tensor.type, gguf.stored(tensor.name).reshape(-1, lookup(tensor.type).row_bytes(tensor.shape[-1])))


def _check(piece: Piece, tensor: Held, numbers: Numbers | None, count: int, width: int) -> None:
    """Read every part of a tensor for the check that reading makes, and keep none."""
    if numbers is None:
        rows = gguf_rows(piece, tensor)
        share_out(lambda part: bool(len(rows(part))), slabs(count, width))
        return
    try:
        read_through(numbers, count, width)
    except BadInput as e:
        raise BadInput(e.what, where=tensor.name, hint=e.hint) from e


def gguf_rows(piece: Piece, tensor: Held) -> Rows:
    """The rows of the tensor, float32, as a GGUF lays them out, an expert's after another's.

    Of a GGUF they are decoded as they lie there, and one by one where a folder has them in the same order.
    """
    if piece.weights or piece.model.gguf is None:
        placed = None if tensor.computed is not None else piece.refs[tensor.parts[0]].placed
        alike = placed is not None and placed.expert is None and placed.weight.layout is None
        return piece.rows(tensor.parts[0]) if alike else in_rows(gguf_order(piece, tensor))
    row_bytes = lookup(tensor.type).row_bytes(tensor.shape[-1])
    rows = decoded(tensor.type, piece.model.gguf.raw(tensor.name).view(-1, row_bytes))
    return lambda part: finite(tensor.name, rows(part).to(piece.device))


def gguf_order(piece: Piece, tensor: Held) -> Tensor:
    """The tensor's values, float32, as a GGUF lays them out."""
    if tensor.computed is not None:
        return torch.from_numpy(tensor.computed).to(piece.device)
    placed = piece.refs[tensor.parts[0]].placed
    if placed.expert is not None:
        return torch.stack([piece.weight(p) for p in tensor.parts])
    weight, layout = piece.weight(tensor.parts[0]), placed.weight.layout
    return layout.to_gguf(weight, piece.model.config) if layout else weight


def encode_rows(
    kind: str, rows: Rows, count: int, width: int, importance: Tensor | None, device: Device
) -> tuple[Tensor, float]:
    """`count` rows as bytes (count, row_bytes), and the relative error of them.

    They are those of as many experts as `importance` (experts, width) has rows, each with its own.
    """
    each = count // (1 if importance is None else len(importance))
    parts = [part for first in range(0, count, each) for part in slabs(each, width, device, first)]
    raw = torch.empty(count, lookup(kind).row_bytes(width), dtype=torch.uint8, device=device)
    loss = recoded(
        rows,
        parts,
        lambda before, part: encode(kind, before, None if importance is None else importance[part.start // each]),
        lambda made: decode(kind, made, (len(made), width)),
        raw,
    )
    return raw, loss
