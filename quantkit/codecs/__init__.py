"""Block codecs: the bytes of every GGUF tensor type to numbers and back, on any device.

    CODECS                              every type by ggml's name for it
    lookup(name)                        its record, or an error that names the known ones
    decode(name, raw, shape)            bytes -> float32
    decoded(name, raw)                  rows of bytes -> float32, each slab when it is asked for
    encode(name, weight, importance)    float32 -> bytes
    recode(name, rows, shape)           rows of another type, or of floats -> bytes and their error, without torch

On the CPU libggml does the work, or numpy where that is quicker, bit for bit llama.cpp's; on another device the
codec's own torch functions do, and where a codec has no torch encoder the tensor makes a detour over the CPU. Plain
floats are a cast and stay in torch.
"""

from __future__ import annotations

from math import prod

from quantkit.codecs import cpu, ggml
from quantkit.codecs.codec import ITEM_BYTES, Bytes, Codec, Floats
from quantkit.codecs.limits import check_bounds, check_importance, check_rows, too_large
from quantkit.codecs.recode import Numbers, in_bytes, in_floats, read_through, recode
from quantkit.codecs.registry import CODECS, lookup
from quantkit.codecs.sharing import Rows, share_out, slabs
from quantkit.errors import FormatError
from quantkit.later import Device, Tensor, on_cpu, torch

__all__ = [
    "CODECS",
    "Bytes",
    "Codec",
    "Floats",
    "Numbers",
    "Rows",
    "decode",
    "decode_torch",
    "decoded",
    "encode",
    "in_bytes",
    "in_floats",
    "lookup",
    "native",
    "read_through",
    "recode",
    "share_out",
    "slabs",
]


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
        return torch.from_numpy(ggml.decode(codec, raw.numpy())).view(shape)
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
    check_rows(codec, *weight.shape)
    check_bounds(codec, *(bound.item() for bound in weight.aminmax()))
    check_importance(codec, importance, weight.shape[1])
    importance = None if importance is None else importance.to(weight)
    if codec.encode is None or _native(codec, weight.device):
        columns = None if importance is None else importance.cpu().numpy()
        raw = torch.from_numpy(cpu.encode(codec, weight.detach().cpu().numpy(), columns)).to(weight.device)
    else:
        pieces = slabs(len(weight), weight.shape[1], weight.device)
        raw = torch.cat([codec.join(codec.encode(weight[piece], importance)) for piece in pieces])
    _check_scales(codec, raw.view(-1, codec.nbytes))
    return raw.view(len(weight), -1)


def native(device: Device) -> bool:
    """Whether libggml does the work: on the CPU, where it is installed."""
    return on_cpu(device) and ggml.find() is not None


def _native(codec: Codec, device: Device) -> bool:
    return codec.block > 1 and native(device)  # a plain float is a cast, which torch does


def _check_scales(codec: Codec, blocks: Tensor) -> None:
    offset = 0
    for _, kind, count in codec.fields:
        end = offset + ITEM_BYTES[kind] * count
        if "float" in kind and not blocks[:, offset:end].contiguous().view(getattr(torch, kind)).isfinite().all():
            raise too_large(codec)
        offset = end
