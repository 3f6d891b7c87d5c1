"""torch is imported when it is first needed, by whichever thread comes first; the others meet no half of it."""

from __future__ import annotations

import subprocess
import sys

# Stands for torch, whose own import takes seconds: it lets the other thread ask in the middle of it.
SLOW = """
import time
from quantkit_test import begun
begun.set()
time.sleep(0.5)
class Tensor: pass
"""
ASKED = """
import sys, threading, types
begun = threading.Event()
sys.modules["quantkit_test"] = types.SimpleNamespace(begun=begun)
from quantkit.later import is_tensor, torch
thread = threading.Thread(target=lambda: torch.Tensor)
thread.start()
begun.wait()
print(is_tensor(b""), is_tensor(torch.Tensor()))
thread.join()
"""


def test_a_thread_waits_for_an_import_that_another_has_begun(tmp_path):
    """As the one that writes a tensor does while the main one comes to need torch."""
    (tmp_path / "torch.py").write_text(SLOW)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ASKED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "False True\n", done.stderr
