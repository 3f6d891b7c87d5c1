"""How GPTQ and AWQ lay integer codes on disk: `pack_*` and the readers' side, `unpack_*`.

The two directions share nothing but the layout below, on purpose: packing adds shifted integers in torch, unpacking
takes the words apart byte by byte in numpy. An error in either shows as a difference when an output is verified.

GPTQ (AutoGPTQ `qlinear_cuda`; GPTQModel reads the same), K inputs, N outputs, b bits, groups of g:
    qweight int32 (K*b/32, N)    codes along K, low bits first; 3-bit codes run across word borders
    qzeros  int32 (K/g, N*b/32)  zeros along N; "gptq" (v1) stores zero-1, "gptq_v2" stores zero
    scales  fp16  (K/g, N)       g_idx int32 (K,)
AWQ "gemm" (AutoAWQ `packing_utils.py`), 4 bits only:
    qweight int32 (K, N/8)       nibble i of word c is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros  int32 (K/g, N/8)     the same order, no -1
    scales  fp16  (K/g, N)
compressed-tensors "pack-quantized" (its `pack_quantized/helpers.py`), codes as they are here, none negative:
    weight_packed int32 (N, K*b/32)       codes along K, low bits first
    weight_scale  fp16  (N, K/g)          weight_shape int64 (2,): N, K
    weight_zero_point int32 (N*b/32, K/g) along N, where zeros are not all 2^(b-1)
Scales of bf16 and float32 are read as well: some write them in the model's own type.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantkit.codecs.grid import Quantized
from quantkit.errors import FormatError
from quantkit.later import Tensor, torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_PARTS = ("qweight", "qzeros", "scales")
COMPRESSED_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_DAMAGED = "the folder is damaged"


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(n, m) integers below 2^bits -> (n*bits/32, m) int32: each column is one stream of bits, low bits first."""
    per = 32 // np.gcd(32, bits)  # codes after which the stream is back at a word border: 8 of 4 bits, 32 of 3
    words = per * bits // 32
    runs = codes.reshape(-1, per, codes.shape[1])
    out = torch.zeros(runs.shape[0], words + 1, codes.shape[1], dtype=torch.int32, device=codes.device)
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        code = runs[:, i].int()
        out[:, word] |= code << shift
        if shift + bits > 32:
            out[:, word + 1] |= code >> (32 - shift)
    return out[:, :words].reshape(-1, codes.shape[1])


def pack_gptq(q: Quantized, bits: int, v2: bool = False) -> dict[str, Tensor]:
    """Quantized (N, K) -> the four tensors of a GPTQ layer; v1 files hold symmetric grids only."""
    zeros = q.zeros.T.to(torch.int64) - (0 if v2 else 1)
    return {
        "qweight": pack_bits(q.codes.T, bits),
        "qzeros": pack_bits(zeros.T, bits).T.contiguous(),
        "scales": q.scales.T.contiguous(),
        "g_idx": q.groups,
    }


def pack_awq(q: Quantized) -> dict[str, Tensor]:
    """Quantized (N, K) of 4 bits -> the three tensors of an AWQ GEMM layer."""

    def words(columns: Tensor) -> Tensor:  # (N, n) -> (n, N/8)
        ordered = columns.unflatten(0, (-1, 4, 2)).transpose(1, 2)  # of eight outputs the even ones come first
        return pack_bits(ordered.flatten(0, 2), 4).T.contiguous()

    return {"qweight": words(q.codes), "qzeros": words(q.zeros), "scales": q.scales.T.contiguous()}


def pack_compressed(q: Quantized, bits: int, symmetric: bool = True) -> dict[str, Tensor]:
    """Quantized (N, K) -> the tensors of a pack-quantized layer; its zeros are stored where the grid is asymmetric."""
    parts = {
        "weight_packed": pack_bits(q.codes.T, bits).T.contiguous(),
        "weight_scale": q.scales,
        "weight_shape": torch.tensor(q.codes.shape),
    }
    return parts if symmetric else parts | {"weight_zero_point": pack_bits(q.zeros, bits)}


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """(w, m) int32 -> (w*32/bits, m) uint8, the inverse of `pack_bits`: by bytes, or by bits where codes straddle."""
    stream = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8)
    per = 8 // bits
    if per * bits == 8:
        codes = np.empty((len(stream), stream.shape[1] * per), np.uint8)
        for i in range(per):
            codes[:, i::per] = (stream >> i * bits) & (2**bits - 1)
        return codes.T
    fields = np.unpackbits(stream, axis=1, bitorder="little").reshape(words.shape[1], -1, bits)
    return np.packbits(fields, axis=2, bitorder="little")[..., 0].T


def unpack_gptq(parts: Mapping[str, Tensor], bits: int, v2: bool, where: str) -> Tensor:
    """The four tensors of a GPTQ layer -> weight (N, K) float32, whatever its g_idx."""
    codes = unpack_bits(parts["qweight"].numpy(), bits).astype(np.int16)  # (K, N)
    zeros = unpack_bits(parts["qzeros"].numpy().T, bits).T.astype(np.int16)  # (G, N)
    if not v2:
        zeros = (zeros + 1) & (2**bits - 1)  # v1 wraps: a stored all-ones is zero 0 (AutoGPTQ)
    scales, group = parts["scales"].float().numpy(), parts["g_idx"].numpy()
    if codes.shape[0] != len(group) or (len(group) and not 0 <= group.min() <= group.max() < len(scales)):
        raise FormatError("g_idx does not match qweight and scales", where=where, hint=_DAMAGED)
    return torch.from_numpy(((codes - zeros[group]) * scales[group]).T.copy())


def unpack_awq(parts: Mapping[str, Tensor], where: str) -> Tensor:
    """The three tensors of an AWQ GEMM layer -> weight (N, K) float32."""
    back = np.argsort(AWQ_ORDER)

    def rows(words: np.ndarray) -> np.ndarray:  # (n, N/8) -> (n, N)
        nibbles = unpack_bits(words.T, 4).T
        return nibbles.reshape(len(words), -1, 8)[..., back].reshape(len(words), -1).astype(np.int16)

    codes, zeros = rows(parts["qweight"].numpy()), rows(parts["qzeros"].numpy())
    scales = parts["scales"].float().numpy()
    if codes.shape[0] % len(scales) or zeros.shape != scales.shape:
        raise FormatError("qweight, qzeros and scales do not fit together", where=where, hint=_DAMAGED)
    group = np.arange(len(codes)) // (len(codes) // len(scales))
    return torch.from_numpy(((codes - zeros[group]) * scales[group]).T.copy())


def unpack_compressed(parts: Mapping[str, Tensor], bits: int, where: str) -> Tensor:
    """The tensors of a pack-quantized layer -> weight (N, K) float32; symmetric where there are no zeros."""
    n, k = map(int, parts["weight_shape"])
    packed, scales = parts["weight_packed"].numpy(), parts["weight_scale"].float().numpy()
    count = parts["weight_scale"].shape[-1]
    if packed.shape != (n, -(-k * bits // 32)) or scales.shape != (n, count) or k % count:
        raise FormatError("the packed weight, its scale and shape do not fit together", where=where, hint=_DAMAGED)
    codes = unpack_bits(packed.T, bits)[:k].T.astype(np.int16)
    zeros = np.full(scales.shape, 2 ** (bits - 1), dtype=np.int16)
    if "weight_zero_point" in parts:
        zeros = unpack_bits(parts["weight_zero_point"].numpy(), bits)[:n].astype(np.int16)
    if zeros.shape != scales.shape:
        raise FormatError("the zero points do not fit the scale", where=where, hint=_DAMAGED)
    group = np.arange(k) // (k // count)
    return torch.from_numpy((codes - zeros[:, group]) * scales[:, group])
