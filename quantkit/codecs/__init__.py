"""Block codecs: the bytes of every GGUF tensor type to numbers and back, on any device.

    CODECS                              every type by ggml's name for it
    lookup(name)                        its record, or an error that names the known ones
    decode(name, raw, shape)            bytes -> float32
    decoded(name, raw)                  rows of bytes -> float32, each slab when it is asked for
    encode(name, weight, importance)    float32 -> bytes

On the CPU libggml does the work (bit for bit llama.cpp's); on another device the codec's own torch functions do, and
where a codec has no torch encoder the tensor makes a detour over the CPU. Plain floats are a cast and stay in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.codecs import ggml, iquants, kquants, legacy, microscaling, ternary
from quantkit.codecs.codec import Codec
from quantkit.codecs.sharing import Rows, share_out, slabs
from quantkit.errors import BadInput, FormatError, Unsupported, UsageError

__all__ = ["CODECS", "Codec", "Rows", "decode", "decode_torch", "decoded", "encode", "lookup", "share_out", "slabs"]

_FAMILIES = (legacy, kquants, iquants, ternary, microscaling)

CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for family in _FAMILIES for codec in family.CODECS})

# What an encoder is given at most: beyond, the sums in ggml's searches overflow float32, which its assertions answer by
# aborting the process (so measured, for every type: weights of 1e12 under an importance of 1e20 are the first to).
LARGEST_WEIGHT = 1e8
LARGEST_IMPORTANCE = 1e15


def lookup(name: str) -> Codec:
    """The codec of a tensor type, by ggml's name in capitals ("Q4_K", "F16")."""
    try:
        return CODECS[name]
    except KeyError:
        raise Unsupported(f"no codec for tensor type {name}", hint=f"known are {', '.join(CODECS)}") from None


def decode(name: str, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bytes (uint8, any shape) -> float32 of `shape` (torch order: the last dimension is the row) on raw's device."""
    codec = lookup(name)
    if raw.dtype != torch.uint8:
        raise TypeError(f"raw bytes are uint8, not {raw.dtype}")
    width = shape[-1] if shape else 1
    if width % codec.block:
        raise FormatError(f"rows of {width} do not divide into {name} blocks of {codec.block}")
    expected = prod(shape) // codec.block * codec.nbytes
    if raw.numel() != expected:
        raise FormatError(f"{raw.numel()} bytes where {name} of shape {tuple(shape)} takes {expected}")
    if _native(codec, raw.device):
        return ggml.decode(codec, raw).view(shape)
    return decode_torch(codec, raw).view(shape)


def decoded(name: str, raw: Tensor) -> Rows:
    """The rows that `raw` (rows, row_bytes) uint8 stands for, float32; each slab is decoded when it is asked for."""
    codec = lookup(name)
    width = raw.shape[1] // codec.nbytes * codec.block
    return lambda part: decode(name, raw[part], (part.stop - part.start, width))


def decode_torch(codec: Codec, raw: Tensor) -> Tensor:
    """Bytes of n blocks -> (n, block) float32 by the codec's own decoder, on any device; libggml has no part in it."""
    blocks = raw.reshape(-1, codec.nbytes)
    out = torch.empty(len(blocks), codec.block, device=raw.device)
    for piece in slabs(len(blocks), codec.block, raw.device):
        out[piece] = codec.decode(**codec.split(blocks[piece]))
    return out


def encode(name: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weight (..., width) float32 -> (rows, row_bytes) uint8 on the same device; leading dimensions count as rows.

    `importance` (width,) weighs the squared error of each column, as llama.cpp's importance matrix does. What is
    encoded is finite and stays so: a weight or a scale that the type cannot hold is an error.
    """
    codec = lookup(name)
    weight = weight.reshape(-1, weight.shape[-1] if weight.dim() else 1).float()
    _check_weight(codec, weight)
    if importance is not None:
        _check_importance(importance, weight.shape[1])
        importance = importance.to(weight)
    elif codec.requires_importance:
        raise UsageError(f"{name} cannot be encoded without an importance matrix", hint="give one, or choose Q2_K")
    if codec.encode is None or _native(codec, weight.device):
        raw = ggml.encode(codec, weight.cpu(), None if importance is None else importance.cpu()).to(weight.device)
    else:
        pieces = slabs(len(weight), weight.shape[1], weight.device)
        raw = torch.cat([codec.join(codec.encode(weight[piece], importance)) for piece in pieces])
    _check_scales(codec, raw.view(-1, codec.nbytes))
    return raw.view(len(weight), -1)


def _native(codec: Codec, device: torch.device) -> bool:
    """Whether libggml does the work: on the CPU, where it is installed; a plain float is a cast, which torch does."""
    return device.type == "cpu" and codec.block > 1 and ggml.find() is not None


def _check_weight(codec: Codec, weight: Tensor) -> None:
    rows, width = weight.shape
    if not weight.numel() or width % codec.block:
        raise BadInput(
            f"{rows} rows of {width} weights do not divide into {codec.name} blocks of {codec.block}",
            hint="choose a type with smaller blocks (Q8_0 has 32, F16 has 1) for this tensor",
        )
    low, high = (bound.item() for bound in weight.aminmax())
    if not (-float("inf") < low and high < float("inf")):
        raise BadInput(f"cannot encode as {codec.name}: a weight is not finite", hint="the source tensor is damaged")
    if codec.block > 1 and max(-low, high) > LARGEST_WEIGHT:
        what = f"cannot encode as {codec.name}: a weight of {max(-low, high):g} is out of range"
        raise BadInput(what, hint="choose F32 or BF16")


def _check_importance(importance: Tensor, width: int) -> None:
    if importance.shape != (width,):
        raise BadInput(f"the importance matrix has shape {tuple(importance.shape)} where the rows have {width} columns")
    if not ((importance >= 0) & (importance <= LARGEST_IMPORTANCE)).all():
        raise BadInput(f"the importance matrix holds a value that is not a number of 0 to {LARGEST_IMPORTANCE:g}")


def _check_scales(codec: Codec, blocks: Tensor) -> None:
    offset = 0
    for _, dtype, count in codec.fields:
        end = offset + dtype.itemsize * count
        if dtype.is_floating_point and not blocks[:, offset:end].contiguous().view(dtype).isfinite().all():
            raise BadInput(f"cannot encode as {codec.name}: a weight is too large for it", hint="choose BF16 or F32")
        offset = end
