"""Runs that are ended before they are done, by signals that can be caught and by one that cannot."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from test_convert import quantkit, source, text  # noqa: F401 (fixtures)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_was_ended_may_be_started_again(source, text, tmp_path, kill):  # noqa: F811
    """And what a kill has left is gone then."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "convert",
        source,
        "-o",
        out,
        "--to",
        "Q8_0",
        "--to",
        "gptq",
        "--no-eval",
    ]
    command += ["--calibration", text / "calibration.txt", "--samples", "16", "--seqlen", "128"]

    def heeding() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, command)), text=True, preexec_fn=heeding, **pipes) as process:
        while process.poll() is None and not (out.is_dir() and any(".partial-" in p.name for p in out.iterdir())):
            time.sleep(0.005)
        process.send_signal(kill)
        _, stderr = process.communicate(timeout=60)
    if kill == signal.SIGKILL:
        assert process.returncode == -kill and any(".partial-" in p.name for p in out.iterdir())
    else:
        assert process.returncode == 128 + kill and "nothing was left half-written" in stderr
        assert not out.exists()
    code, _, stderr = quantkit(*command[3:])
    assert code == 0 and not [p.name for p in out.iterdir() if ".partial-" in p.name], stderr
