"""ggml's own encoders and decoders by ctypes: the CPU engine, so that our bytes are llama.cpp's bytes.

The shared object comes with the `libggml-python` wheel; the environment variable QUANTKIT_LIBGGML names another one
(the file, or a folder that holds it), for instance llama-cpp-python's. Two entry points carry all the work:

    ggml_get_type_traits(type)->to_float(src, dst, n)
    ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)

Both are pure functions of rows of blocks and ctypes drops the interpreter's lock around them, so rows are shared out to
threads and the bytes are those of one single call. ggml aborts the process where an argument is wrong; whatever could
trip it is checked in `quantkit.codecs` before.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy._core._multiarray_umath import __cpu_features__ as _features

from quantkit.codecs.codec import Bytes, Codec, Floats
from quantkit.codecs.sharing import share_out, slabs
from quantkit.errors import BadInput

ENVIRONMENT = "QUANTKIT_LIBGGML"
_PATTERNS = ("libggml-base.so*", "libggml-base*.dylib", "ggml-base*.dll")
_FOLDERS = (".", "lib64", "lib", "bin")  # where the wheel keeps it on Linux, macOS and Windows
_init_lock = threading.Lock()

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h, up to the last member read here."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
    )


def _search(folder: Path) -> Path | None:
    found = (path for sub in _FOLDERS for pattern in _PATTERNS for path in sorted((folder / sub).glob(pattern)))
    return next(found, None)


def find() -> Path | None:
    """The shared object to load: the one QUANTKIT_LIBGGML names, else the wheel's, else None."""
    return _found(os.environ.get(ENVIRONMENT))


@functools.cache
def _found(chosen: str | None) -> Path | None:
    if chosen:
        path = Path(chosen)
        return _search(path) or path if path.is_dir() else path
    spec = importlib.util.find_spec("libggml")
    homes = spec.submodule_search_locations if spec else None
    found = (_search(Path(home)) for home in homes or ())
    return next(filter(None, found), None)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    hint = f"reinstall libggml-python, or point {ENVIRONMENT} at a libggml-base of ggml 0.9 or newer"
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_version.restype = ctypes.c_char_p  # since 0.9, which knows every type up to MXFP4
        library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
        library.ggml_get_type_traits.argtypes = [ctypes.c_int]
        library.ggml_quantize_init.restype = None
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    except (OSError, AttributeError) as error:
        raise BadInput(f"cannot use libggml ({error})", where=path, hint=hint) from error
    return library


def _library() -> ctypes.CDLL:
    path = find()
    if path is None:
        raise BadInput("libggml is not installed", hint=f"pip install libggml-python, or set {ENVIRONMENT}")
    return _load(path)


def version() -> str:
    """The version of the loaded ggml, such as "0.20.2"."""
    return _library().ggml_version().decode()


@functools.cache
def _traits(codec: Codec, library: ctypes.CDLL) -> tuple[int, _TypeTraits]:
    """The type's number and traits, once they are known to be those of our struct."""
    number = gguf.GGMLQuantizationType[codec.name].value
    # ggml_get_type_traits does not check its argument, so ask first for a symbol that comes and goes with the type.
    if hasattr(library, f"dequantize_row_{codec.name.lower().replace('_k', '_K')}"):
        traits = library.ggml_get_type_traits(number).contents
        theirs = (traits.type_name.decode().upper(), traits.blck_size, traits.type_size)
        if theirs == (codec.name, codec.block, codec.nbytes):
            return number, traits
    raise BadInput(f"libggml {version()} has no {codec.name} as we know it", where=find(), hint="use a newer one")


def decode(codec: Codec, raw: Bytes, out: Floats | None = None) -> Floats:
    """Bytes of n blocks, uint8 of any shape -> (n, block) float32, in `out` where it is given."""
    raw = np.ascontiguousarray(raw)
    blocks = raw.size // codec.nbytes
    made = np.empty((blocks, codec.block), np.float32) if out is None else out
    to_float = _casts(codec.name)[0] if codec.block == 1 else _traits(codec, _library())[1].to_float
    src, dst = raw.ctypes.data, made.ctypes.data

    def work(part: slice) -> None:
        skipped, count = part.start, part.stop - part.start
        to_float(src + skipped * codec.nbytes, dst + skipped * codec.block * made.itemsize, count * codec.block)

    share_out(work, slabs(blocks, codec.block))
    return made


def encode(codec: Codec, weight: Floats, importance: Floats | None, out: Bytes | None = None) -> Bytes:
    """Weight (rows, width) and importance (width,), both finite float32 -> (rows, row_bytes) uint8, in `out` if given.

    What is given as `out` lies in one piece.
    """
    rows, width = weight.shape
    weight = np.ascontiguousarray(weight)
    importance = None if importance is None else np.ascontiguousarray(importance)
    made = np.empty((rows, codec.row_bytes(width)), np.uint8) if out is None else out
    src, dst = weight.ctypes.data, made.ctypes.data
    if codec.block == 1:
        _casts(codec.name)[1](src, dst, rows * width)
        return made
    library = _library()
    number = _traits(codec, library)[0]
    with _init_lock:  # the IQ types build their codebooks here, before any thread reads them
        library.ggml_quantize_init(number)
    imatrix = None if importance is None else importance.ctypes.data

    def work(part: slice) -> None:
        library.ggml_quantize_chunk(number, src, dst, part.start * width, part.stop - part.start, width, imatrix)

    share_out(work, slabs(rows, width))
    return made


Cast = Callable[[int, int, int], None]  # from an address to another, so many numbers


@functools.cache
def _casts(name: str) -> tuple[Cast, Cast]:
    """Plain floats of a type to float32, and back.

    For half precision ggml has two: one for any processor, and one in libggml-cpu that takes a thirtieth of the time
    on a processor that has instructions for it.
    """
    if name == "F32":
        return _copied, _copied
    base = _library()
    if name == "BF16":
        return _cast(base.ggml_bf16_to_fp32_row), _cast(base.ggml_fp32_to_bf16_row_ref)
    if (_features.get("F16C") and _features.get("AVX2")) or _features.get("NEON_FP16"):
        for path in _beside(find()):
            try:
                fast = ctypes.CDLL(str(path))
                fast.ggml_cpu_init()  # fills the table from which the last numbers of an odd count are read
                return _cast(fast.ggml_cpu_fp16_to_fp32), _cast(fast.ggml_cpu_fp32_to_fp16)
            except (OSError, AttributeError):
                continue
    return _cast(base.ggml_fp16_to_fp32_row), _cast(base.ggml_fp32_to_fp16_row)


def _cast(function: Any) -> Cast:
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function


def _copied(src: int, dst: int, count: int) -> None:
    ctypes.memmove(dst, src, 4 * count)


def _beside(base: Path | None) -> list[Path]:
    """The libggml-cpu of the same build."""
    return [] if base is None else sorted(base.parent.glob(base.name.replace("-base", "-cpu")))
