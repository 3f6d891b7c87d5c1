"""What tests share: the real models, fetched once into the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import GEMMA3, SMOLLM2, fetch

import quantkit  # noqa: F401  (before torch: it says how torch's threads are to wait, see quantkit/__init__.py)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as one GGUF file."""
    return fetch(SMOLLM2)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270m, Q4_K_M, as one GGUF file."""
    return fetch(GEMMA3)
