"""Outputs appear whole or not at all, whatever ends the work."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import Resumable, UsageError
from quantkit.files import atomic
from quantkit.files.atomic import Syncing, free_bytes, require_space, staged


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(text)
    (folder / "sub" / "b.txt").write_text(text)


def test_a_file_appears_when_complete(tmp_path):
    final = tmp_path / "m.gguf"
    with staged(final) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(".m.gguf.partial-")
        partial.write_text("new")
        assert not final.exists()
    assert contents(tmp_path) == {"m.gguf": "new"}
    with staged(str(final)) as partial:
        partial.write_text("newer")
        assert final.read_text() == "new"
    assert contents(tmp_path) == {"m.gguf": "newer"}


def test_a_folder_appears_when_complete(tmp_path):
    with staged(tmp_path / "out") as partial:
        fill(partial, "new")
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path) == {"out/a.txt": "new", "out/sub/b.txt": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(tmp_path, error):
    (tmp_path / "m.gguf").write_text("old")
    fill(tmp_path / "out", "old")
    before = contents(tmp_path)
    with pytest.raises(error), staged(tmp_path / "m.gguf") as partial:
        partial.write_text("new")
        raise error
    with pytest.raises(error), staged(tmp_path / "out", replace=True) as partial:
        fill(partial, "new")
        raise error
    with pytest.raises(error), staged(tmp_path / "never"):
        raise error
    assert contents(tmp_path) == before


def test_a_folder_that_is_there_is_replaced_only_on_request(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="exists already"), staged(tmp_path / "out"):
        raise AssertionError("refused before any work")
    with staged(tmp_path / "out", replace=True) as partial:
        fill(partial, "new")
        assert contents(tmp_path / "out")["a.txt"] == "old"
    assert contents(tmp_path) == {"out/a.txt": "new", "out/sub/b.txt": "new"}
    with staged(tmp_path / "out", replace=True) as partial:
        partial.write_text("a file now")
    assert contents(tmp_path) == {"out": "a file now"}
    with pytest.raises(UsageError, match="exists already"), staged(tmp_path / "out") as partial:
        fill(partial, "a folder again")
    assert contents(tmp_path) == {"out": "a file now"}


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")
    before = contents(tmp_path)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise PermissionError("no")
        real(source, target)

    monkeypatch.setattr(atomic.os, "rename", rename)
    with pytest.raises(PermissionError), staged(tmp_path / "out", replace=True) as partial:
        fill(partial, "new")
    assert contents(tmp_path) == before


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="no such folder"), staged(tmp_path / "no" / "m.gguf"):
        raise AssertionError("refused before any work")
    with pytest.raises(UsageError, match="not a regular file"), staged("/dev/null"):
        raise AssertionError("refused before any work")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_matter_of_running_again(tmp_path, code):
    with (
        pytest.raises(Resumable, match=r"no more room to write .* bytes are free") as caught,
        staged(tmp_path / "m.gguf") as partial,
    ):
        partial.write_text("half")
        raise OSError(code, os.strerror(code))
    assert caught.value.where == str(tmp_path / "m.gguf") and "run the same command again" in caught.value.hint
    assert contents(tmp_path) == {}


def test_other_errors_of_the_system_pass_through(tmp_path):
    with pytest.raises(PermissionError), staged(tmp_path / "m.gguf"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(FileNotFoundError), staged(tmp_path / "m.gguf"):
        pass  # nothing was written, so there is nothing to publish


def test_much_that_was_written_is_brought_to_the_disk_at_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "_sync", synced.append)
    with Syncing(tmp_path) as syncing:
        for _ in range(3):
            syncing.wrote(atomic.SYNCED_AT_ONCE // 2)
        syncing._thread.submit(int).result()  # what was asked for before is done
        assert synced == [tmp_path]
        syncing.start()
    assert synced == [tmp_path] * 2


@pytest.mark.parametrize("code, expected", [(errno.EIO, OSError), (errno.ENOSPC, Resumable)])
def test_what_cannot_be_brought_to_the_disk_is_not_named(tmp_path, monkeypatch, code, expected):
    failed = []

    def once(path: Path) -> None:
        """As the system does: it says so to the first who asks, and to nobody after that."""
        if not failed:
            failed.append(path)
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "_sync", once)
    with pytest.raises(expected), staged(tmp_path / "m.gguf") as partial, Syncing(partial) as syncing:
        partial.write_text("new")
        syncing.start()
        syncing.start()
    assert failed and contents(tmp_path) == {}
    with pytest.raises(expected), Syncing(tmp_path) as syncing:
        failed.clear()
        syncing.start()
        syncing._thread.submit(int).result()
        syncing.wrote(atomic.SYNCED_AT_ONCE)
        raise AssertionError("it is said at once")


def test_space_is_required_before_it_is_used(tmp_path):
    require_space(tmp_path / "not" / "yet" / "m.gguf", 1)
    free = free_bytes(tmp_path)
    with pytest.raises(Resumable, match=r"[\d,]+ bytes are needed and [\d,]+ are free; free [\d,]+ bytes"):
        require_space(tmp_path / "m.gguf", free + (1 << 50))


WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
from quantkit.errors import Resumable
from quantkit.files.atomic import staged
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with staged(sys.argv[1]) as partial:
        with open(partial, "wb") as file:
            file.write(bytes(100_000))
except Resumable as error:
    print(error)
"""

WRITE_AND_WAIT = """
import sys, time
from quantkit.files.atomic import staged
with staged(sys.argv[1]) as partial:
    partial.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def python(code: str, path: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(path)]

    def heeding() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would this process

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, cwd=root, preexec_fn=heeding)


def test_a_limit_the_system_sets_is_met_for_real(tmp_path):
    out, errors = python(WRITE_TOO_MUCH, tmp_path / "m.gguf").communicate(timeout=30)
    assert "no more room to write (File too large" in out, errors
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_under_the_final_name(tmp_path, kill):
    final = tmp_path / "m.gguf"
    final.write_text("old")
    with python(WRITE_AND_WAIT, final) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(kill)
        assert process.wait(timeout=30) != 0
    assert final.read_text() == "old"
    left = [name for name in contents(tmp_path) if name != "m.gguf"]
    assert all(name.startswith(".m.gguf.partial-") for name in left)
    assert kill != signal.SIGINT or left == []
