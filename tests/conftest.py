"""What tests share: the real models, fetched once into the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from models import GEMMA3, SMOLLM2, fetch, fetch_converter
from toy import FAMILIES, write_family

import quantkit  # noqa: F401  (before torch: it says how torch's threads are to wait, see quantkit/__init__.py)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Scores are kept from test to test, never from one run of the tests to the next."""
    with mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}):
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as one GGUF file."""
    return fetch(SMOLLM2)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270m, Q4_K_M, as one GGUF file."""
    return fetch(GEMMA3)


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> Path:
    """For each row of `FAMILIES` a folder as transformers saves it, and a `.gguf` as llama.cpp's converter makes it."""
    root = tmp_path_factory.mktemp("families")
    folders = [write_family(root / name, name) for name in FAMILIES]
    script = Path(__file__).with_name("convert_families.py")
    command = [sys.executable, str(script), str(fetch_converter()), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root
