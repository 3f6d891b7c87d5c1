"""`Codec`: one block type of GGUF as one frozen record - the C struct as data, bytes <-> numbers as pure functions.

A codec knows nothing of files, names or devices: bytes are a uint8 tensor, numbers a float32 tensor, on whichever
device they lie. Which engine decodes or encodes (libggml or these torch functions) is chosen in `quantkit.codecs`.
Where bytes are only moved they are a numpy array, as files are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.codecs.parts import Ladder, Parts
from quantkit.later import Tensor, torch

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Element types of a block's fields, by their names in torch, and the bytes of each.
F32, F16, BF16, U8, I8, U16 = "float32", "float16", "bfloat16", "uint8", "int8", "uint16"
ITEM_BYTES = {F32: 4, F16: 2, BF16: 2, U8: 1, I8: 1, U16: 2}

Field = tuple[str, str, int]  # name as in ggml-common.h, element type, count


@dataclass(frozen=True)
class Codec:
    """One GGUF block type.

    `fields` is the C struct in order (llama.cpp `ggml/src/ggml-common.h`). `decode(**fields)` maps tensors of shape
    (n, count) to (n, block) float32. `encode(x, importance)` maps x (rows, width) float32 and importance (width,)
    float32 or None to a dict of fields for the rows * width / block blocks in order; it is None where only libggml can.
    `ladder` takes blocks apart and puts them together where each weight has a code of its own.
    """

    name: str
    block: int
    fields: tuple[Field, ...]
    decode: Callable[..., Tensor]
    encode: Callable[[Tensor, Tensor | None], dict[str, Tensor]] | None = None
    requires_importance: bool = False  # ggml refuses to encode it without
    ladder: Ladder | None = None

    @classmethod
    def of_ladder(
        cls,
        name: str,
        block: int,
        fields: tuple[Field, ...],
        ladder: Ladder,
        encode: Callable[[Tensor, Tensor | None], Parts],
    ) -> Codec:
        """A type whose blocks decode as their parts say, and whose encoder gives parts."""
        return cls(
            name,
            block,
            fields,
            decode=lambda **struct: ladder.values(ladder.read(**struct)),
            encode=lambda x, importance: ladder.write(encode(x, importance)),
            ladder=ladder,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return sum(self._sizes())

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights; `width` must divide by the block."""
        if width % self.block:
            raise ValueError(f"a row of {width} does not divide into {self.name} blocks of {self.block}")
        return width // self.block * self.nbytes

    def split(self, raw: Tensor) -> dict[str, Tensor]:
        """Bytes of n blocks -> the struct's fields, each (n, count) in its own dtype."""
        parts = raw.reshape(-1, self.nbytes).split(self._sizes(), dim=1)
        # A copy even where a part is contiguous as it lies: to be viewed as its dtype it must start on a whole element.
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        return {
            name: copy.view(getattr(torch, kind)) for (name, kind, _), copy in zip(self.fields, copies, strict=True)
        }

    def join(self, fields: dict[str, Tensor]) -> Tensor:
        """The inverse of `split`: fields -> (n, nbytes) uint8."""
        parts = [fields[name].to(getattr(torch, kind)).view(torch.uint8) for name, kind, _ in self.fields]
        return torch.cat(parts, dim=1)

    def byteswap(self, raw: Bytes) -> Bytes:
        """Turn the multi-byte fields of n blocks around (big-endian file <-> little-endian file); its own inverse."""
        blocks, end = raw.reshape(-1, self.nbytes), 0
        out = np.empty_like(blocks)
        for (_, _, count), nbytes in zip(self.fields, self._sizes(), strict=True):
            field = slice(end, end := end + nbytes)
            out[:, field] = blocks[:, field].reshape(len(blocks), count, -1)[..., ::-1].reshape(len(blocks), nbytes)
        return out.reshape(raw.shape)

    def _sizes(self) -> list[int]:
        """Bytes of each field."""
        return [ITEM_BYTES[kind] * count for _, kind, count in self.fields]
