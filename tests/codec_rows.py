"""Rows that try an encoder: ordinary ones, and the corners where scales vanish, tie or change sign."""

from __future__ import annotations

import platform

import pytest
import torch

from quantkit.codecs import Codec, decode, encode, ggml

SAME_ARITHMETIC = pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"},
    reason="here compilers fuse multiplication and addition, so libggml's last bits are its own",
)


def ggml_decode(codec: Codec, raw: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ggml.decode(codec, raw.numpy()))


def ggml_encode(codec: Codec, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return torch.from_numpy(ggml.encode(codec, weight.numpy(), None if importance is None else importance.numpy()))


def rows(width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights (a few, width) float32 by kind; `width` divides by 64."""
    g = torch.Generator().manual_seed(seed)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, width, generator=g)

    def uniform(n: int) -> torch.Tensor:
        return torch.rand(n, width, generator=g)

    constants = torch.tensor([1.0, -1.0, 0.3, -0.3, 1e-3])[:, None]
    kinds = {
        "normal": normal(13) * 0.02,
        "heavy": normal(11).pow(3) * 0.02,
        "zero": torch.zeros(2, width),
        "negative zero": torch.where(uniform(3) > 0.5, 0.0, -0.0),
        "constant": constants.expand(5, width).clone(),
        "ternary": torch.randint(-1, 2, (5, width), generator=g) * 0.03,  # ties: a peak of either sign
        "integers": torch.randint(-4, 4, (5, width), generator=g).float(),
        "positive": uniform(3),
        "negative": -uniform(3),
        "sparse": normal(5) * (uniform(5) > 0.9),
        "empty sub-blocks": normal(5) * (uniform(5)[:, ::16] > 0.5).repeat_interleave(16, 1),
        "tiny": normal(5) * 1e-7,  # scales that fp16 holds as subnormals
        "vanishing": normal(5) * torch.logspace(-30, -9, 5)[:, None],  # below TINY, or scales of zero in fp16
        "huge": normal(5).clamp(-3, 3) * 1e4,
        "columns of all sizes": normal(11) * uniform(1).pow(6),
    }
    q4_0 = encode("Q4_0", kinds["normal"])
    return kinds | {"requantized": decode("Q4_0", q4_0, kinds["normal"].shape)}


def importance(width: int, kind: str = "uniform", seed: int = 0) -> torch.Tensor:
    """An importance row (width,) of one kind."""
    g = torch.Generator().manual_seed(seed)
    uniform, normal = torch.rand(width, generator=g), torch.randn(width, generator=g)
    return {
        "uniform": uniform + 0.01,
        "squares": normal.square() * 1e3,
        "outliers": normal.pow(6),
        "part zero": uniform * (normal > 0.5),
        "blocks zero": uniform * (normal[::32] > 0).repeat_interleave(32),
        "zero": torch.zeros(width),
    }[kind]
