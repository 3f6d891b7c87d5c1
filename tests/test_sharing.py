"""Work shared out to threads: its order, and that it never waits for itself."""

from __future__ import annotations

import subprocess
import sys

import torch

from quantkit.codecs.sharing import share_out

NESTED = """
import torch
from quantkit.codecs.sharing import share_out

torch.set_num_threads(2)

def inner(part):
    return part.stop

def outer(part):
    torch.set_num_threads(2)  # whatever a library does to the threads of a pool
    return sum(share_out(inner, [slice(0, part.stop), slice(0, 1)]))

print(share_out(outer, [slice(0, n) for n in range(8)]))
"""


def test_parts_come_back_in_order():
    parts = [slice(n, n + 1) for n in range(64)]
    assert share_out(lambda part: torch.arange(64)[part].item(), parts) == list(range(64))


def test_work_that_shares_out_in_its_turn_ends():
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "[1, 2, 3, 4, 5, 6, 7, 8]\n", done.stderr
