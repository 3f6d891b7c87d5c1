"""What `fit` may choose from: types for the tensors of a GGUF, bits for the matrices of a packed folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from quantkit.codecs import decode, encode, lookup
from quantkit.files.gguf_writer import tensor_nbytes
from quantkit.fit import Choices, Trial
from quantkit.forward import EMBEDDING
from quantkit.later import Tensor, torch
from quantkit.model import Model, Ref
from quantkit.sensitivity import Fisher
from quantkit.solvers.rtn import weighted
from quantkit.targets.folder import linear
from quantkit.targets.gguf_tensors import held
from quantkit.targets.grids import BITS, Asked
from quantkit.targets.mixtures import quantizable

ROWS = 128  # of a tensor that are encoded to measure a type by
# What llama.cpp reads on every backend, and `--solver gptq` solves; by what divides the rows.
TYPES = {
    256: ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    32: ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    1: ("F16",),
}


def types_of_width(width: int) -> tuple[str, ...]:
    """The types whose blocks divide rows of `width`, from the smallest on."""
    return next(kinds for block, kinds in TYPES.items() if width % block == 0)


def gguf_types(model: Model, ids: Tensor) -> Choices:
    """Every type that fits a tensor of a GGUF; `ids` are the tokens that are measured on."""
    by_part = {t.parts[0]: t for t in held(model) if t.computed is None and quantizable(t.name, t.shape)}

    def choices(name: str, weight: Tensor, information: Fisher) -> Iterator[Trial]:
        tensor = by_part[name]
        rows = _some(len(weight))
        if name == EMBEDDING:  # rows as often as their tokens come
            rows = ids.flatten()[:: max(1, ids.numel() // ROWS)].unique()
        some = weight[rows.to(weight.device)]
        importance = information.stats.importance if model.tensors[name].placed.reads else None
        for kind in types_of_width(weight.shape[1]):
            made = decode(kind, encode(kind, some, importance if lookup(kind).block > 1 else None), tuple(some.shape))
            nbytes = tensor_nbytes(tensor.name, tensor.shape, kind)
            yield Trial(tensor.name, kind, nbytes, information.divergence(made - some, rows))

    return choices


def grid_bits(model: Model, asked: Asked) -> Choices:
    """Every number of bits for the matrices of a GPTQ or compressed-tensors folder on the grid `asked`.

    Those of a block that read one activation are one item: vLLM makes one matrix of them, of one width in bits.
    """
    matrices = linear(model)

    def choices(name: str, weight: Tensor, information: Fisher) -> Iterator[Trial]:
        if name not in matrices:
            return
        rows = _some(len(weight))
        some = weight[rows.to(weight.device)]
        for bits in BITS:
            made = weighted(some, information.stats, replace(asked, bits=bits).grid(name, weight.shape[1])).dequantize()
            nbytes = prod(weight.shape) * bits // 8  # scales and zeros are the same for all
            cost = information.divergence(made - some, rows)
            yield Trial(item_of(matrices[name]), str(bits), nbytes, cost)

    return choices


def item_of(ref: Ref) -> str:
    """The item of `grid_bits` that a matrix belongs to: its layer, and the activation that it reads."""
    return f"{ref.placed.layer} {ref.placed.reads}"


def _some(count: int) -> Tensor:
    """Up to `ROWS` rows of so many, evenly spread."""
    return torch.linspace(0, count - 1, min(ROWS, count)).long()
