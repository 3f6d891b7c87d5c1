"""Benchmarks that need another machine run here in a size that says nothing, so that they run there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu
from synthetic import Size


def test_a_block_says_where_its_time_goes():
    size = Size(layers=1, hidden=256, ffn=512, heads=8, kv_heads=2, vocab=300)
    page = gpu.one_block(size, 4, 64, torch.device("cpu"), None)
    parts = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in page if "%" in line}
    assert {what for _, _, what in gpu.PARTS} < parts.keys()
    block = float(next(line for line in page if line.startswith("One block")).split()[2])
    assert sum(parts.values()) == pytest.approx(block, abs=0.1)
