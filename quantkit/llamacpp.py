"""llama.cpp itself as an engine (extra `llamacpp`): a GGUF tokenized and run as llama.cpp runs it.

The shared object of the `xllamacpp` wheel exports the functions of llama.h, which are called by ctypes. Its parameter
structs are opaque bytes, passed back as llama.cpp filled them, but for the three counts that open
`llama_context_params`; a struct comes last in every call used here, so a buffer larger than it is harmless.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import BadInput, QuantkitError, UsageError
from quantkit.later import Tensor, torch

DEFAULT_COUNTS = (512, 2048, 512)  # n_ctx, n_batch, n_ubatch: where these stand, the struct is the one we know


class _Params(c.Structure):
    _fields_ = (("counts", c.c_uint32 * 3), ("rest", c.c_uint8 * 1012))


class _Batch(c.Structure):
    """struct llama_batch."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


_SILENT = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)  # as long as the library may call it
_SIGNATURES: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("llama_backend_init", None, ()),
    ("llama_log_set", None, (c.c_void_p, c.c_void_p)),
    ("llama_model_default_params", _Params, ()),
    ("llama_context_default_params", _Params, ()),
    ("llama_model_load_from_file", c.c_void_p, (c.c_char_p, _Params)),
    ("llama_init_from_model", c.c_void_p, (c.c_void_p, _Params)),
    ("llama_set_n_threads", None, (c.c_void_p, c.c_int32, c.c_int32)),
    ("llama_model_get_vocab", c.c_void_p, (c.c_void_p,)),
    ("llama_vocab_n_tokens", c.c_int32, (c.c_void_p,)),
    (
        "llama_tokenize",
        c.c_int32,
        (c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool),
    ),
    ("llama_batch_init", _Batch, (c.c_int32, c.c_int32, c.c_int32)),
    ("llama_batch_free", None, (_Batch,)),
    ("llama_decode", c.c_int32, (c.c_void_p, _Batch)),
    ("llama_get_logits_ith", c.POINTER(c.c_float), (c.c_void_p, c.c_int32)),
    ("llama_get_memory", c.c_void_p, (c.c_void_p,)),
    ("llama_memory_clear", None, (c.c_void_p, c.c_bool)),
    ("llama_free", None, (c.c_void_p,)),
    ("llama_model_free", None, (c.c_void_p,)),
)


@functools.cache
def _library() -> c.PyDLL:
    """The shared object, silent; PyDLL because it is a Python module and leans on the interpreter."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        hint = 'pip install "gguf-quantkit[llamacpp]"'
        raise UsageError("running llama.cpp needs xllamacpp, which is not installed", where="--engine", hint=hint)
    lib = c.PyDLL(str(next(Path(spec.origin).parent.glob("*.so"))))
    for name, result, arguments in _SIGNATURES:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if tuple(lib.llama_context_default_params().counts) != DEFAULT_COUNTS:
        raise QuantkitError("this xllamacpp has other parameters than are known", hint="install xllamacpp 2026.10")
    lib.llama_log_set(c.cast(_SILENT, c.c_void_p), None)
    lib.llama_backend_init()
    return lib


@dataclass(frozen=True)
class Runtime:
    """A GGUF opened by llama.cpp: its tokenizer, and logits of chunks of at most `ctx` tokens."""

    lib: Any
    model: int
    context: int
    vocabulary: int

    def tokenize(self, text: str) -> list[int]:
        """The ids of plain text, nothing added."""
        raw = text.encode()
        ids = (c.c_int32 * (len(raw) + 16))()
        vocab = self.lib.llama_model_get_vocab(self.model)
        return list(ids[: self.lib.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, False)])

    def logits(self, ids: list[int], last: int) -> Tensor:
        """Logits (last, vocab) of the last positions of a chunk but its very last, which predicts nothing known."""
        lib, n = self.lib, len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, n - 1 - last <= i < n - 1
            if code := lib.llama_decode(self.context, batch):
                raise QuantkitError(f"llama_decode returned {code}", hint="try a shorter --ctx")
            first = lib.llama_get_logits_ith(self.context, n - 1 - last)  # those asked for lie one after the other
            size = last * self.vocabulary
            return (
                torch.frombuffer((c.c_float * size).from_address(c.addressof(first.contents)), dtype=torch.float32)
                .view(last, -1)
                .clone()
            )
        finally:
            lib.llama_batch_free(batch)


@contextmanager
def opened(path: str | os.PathLike[str], ctx: int) -> Iterator[Runtime]:
    """Open a GGUF for chunks of `ctx` tokens; BadInput where llama.cpp does not take it."""
    lib = _library()
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    if not model:
        raise BadInput("llama.cpp does not open this file", where=path, hint="--engine llama.cpp runs GGUF files")
    context = None
    try:
        params = lib.llama_context_default_params()
        params.counts[:] = (ctx, max(ctx, DEFAULT_COUNTS[1]), DEFAULT_COUNTS[2])
        context = lib.llama_init_from_model(model, params)
        if not context:
            raise BadInput("llama.cpp makes no context for this file", where=path, hint="try a shorter --ctx")
        lib.llama_set_n_threads(context, os.cpu_count() or 1, os.cpu_count() or 1)
        yield Runtime(lib, model, context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
    finally:
        if context:
            lib.llama_free(context)
        lib.llama_model_free(model)


@dataclass
class RuntimePredictions:
    """What llama.cpp predicts about chunks (n, length): each is run when its logits are asked for, in any order."""

    runtime: Runtime
    chunks: Tensor
    each: int  # scored positions a chunk
    _at: int = field(default=-1, init=False)
    _logits: Tensor = field(default_factory=lambda: torch.empty(0), init=False)

    @property
    def counts(self) -> tuple[int, int]:
        """Chunks, and scored positions in each."""
        return len(self.chunks), self.each

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        return self.runtime.vocabulary

    def logits(self, rows: slice) -> Tensor:
        """Logits of scored positions `rows` (flattened, of one chunk), float32 (rows, vocab)."""
        chunk = rows.start // self.each
        if chunk != self._at:
            self._logits, self._at = self.runtime.logits(self.chunks[chunk].tolist(), self.each), chunk
        return self._logits[rows.start - chunk * self.each : rows.stop - chunk * self.each]
