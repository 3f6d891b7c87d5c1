"""llama.cpp as an oracle with nothing to compile: tokens, logits and its GGUF parser, out of the `xllamacpp` wheel.

    oracle = Oracle("model.gguf")
    ids = oracle.tokenize("some text", special=True)
    logits = oracle.logits(ids)  # (len(ids), n_vocab) float32

Only functions of llama.h and gguf.h are called. Parameter structs of llama.h are opaque bytes, passed back as llama.cpp
filled them: they come last in every call used here, so a buffer larger than the struct is harmless on x86-64 and arm64.
The defaults are what is wanted: 512 tokens of context, logits where asked, an f16 cache, or an f32 one for `exact`.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import os
import struct
from pathlib import Path

import numpy as np


class Opaque(c.Structure):
    _fields_ = (("bytes", c.c_uint8 * 1024),)


class Batch(c.Structure):
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


class GGUFInit(c.Structure):
    """struct gguf_init_params."""

    _fields_ = (("no_alloc", c.c_bool), ("ctx", c.c_void_p))


class ChatMessage(c.Structure):
    """struct llama_chat_message."""

    _fields_ = (("role", c.c_char_p), ("content", c.c_char_p))


QUIET = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)  # lives as long as the library may call it
SIGNATURES = (
    ("llama_backend_init", None, ()),
    ("llama_log_set", None, (c.c_void_p, c.c_void_p)),
    ("llama_model_default_params", Opaque, ()),
    ("llama_context_default_params", Opaque, ()),
    ("llama_model_load_from_file", c.c_void_p, (c.c_char_p, Opaque)),
    ("llama_init_from_model", c.c_void_p, (c.c_void_p, Opaque)),
    ("llama_model_get_vocab", c.c_void_p, (c.c_void_p,)),
    ("llama_vocab_n_tokens", c.c_int32, (c.c_void_p,)),
    (
        "llama_tokenize",
        c.c_int32,
        (c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool),
    ),
    ("llama_batch_init", Batch, (c.c_int32, c.c_int32, c.c_int32)),
    ("llama_batch_free", None, (Batch,)),
    ("llama_decode", c.c_int32, (c.c_void_p, Batch)),
    ("llama_get_logits_ith", c.POINTER(c.c_float), (c.c_void_p, c.c_int32)),
    ("llama_get_memory", c.c_void_p, (c.c_void_p,)),
    ("llama_memory_clear", None, (c.c_void_p, c.c_bool)),
    ("llama_free", None, (c.c_void_p,)),
    ("llama_model_free", None, (c.c_void_p,)),
    (
        "llama_chat_apply_template",
        c.c_int32,
        (c.c_char_p, c.POINTER(ChatMessage), c.c_size_t, c.c_bool, c.c_char_p, c.c_int32),
    ),
    ("gguf_init_from_buffer", c.c_void_p, (c.c_char_p, c.c_size_t, GGUFInit)),
    ("gguf_free", None, (c.c_void_p,)),
)


@functools.cache
def library() -> c.PyDLL:
    """The shared object of xllamacpp, silent; PyDLL because it is a Python module and leans on the interpreter."""
    spec = importlib.util.find_spec("xllamacpp")
    lib = c.PyDLL(str(next(Path(spec.origin).parent.glob("*.so"))))
    for name, result, arguments in SIGNATURES:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(c.cast(QUIET, c.c_void_p), None)
    lib.llama_backend_init()
    return lib


def parses(raw: bytes) -> bool:
    """Whether llama.cpp's parser takes `raw` for a GGUF."""
    context = library().gguf_init_from_buffer(raw, len(raw), GGUFInit(True, None))
    if context:
        library().gguf_free(context)
    return bool(context)


def chat(template: str, messages: list[dict[str, str]], add_assistant: bool) -> str:
    """A dialogue as llama.cpp's built-in template of that name writes it, without BOS."""
    them = (ChatMessage * len(messages))(*((m["role"].encode(), m["content"].encode()) for m in messages))
    out = c.create_string_buffer(4096)
    n = library().llama_chat_apply_template(template.encode(), them, len(them), add_assistant, out, len(out))
    if not 0 <= n <= len(out):
        raise RuntimeError(f"llama_chat_apply_template returned {n}")
    return out.raw[:n].decode()


class Oracle:
    """One model opened by llama.cpp; ValueError where it does not open. Without `context`, only its vocabulary.

    `exact` keeps keys and values in float32 and does without flash attention, which rounds to f16 whatever the cache.
    By default logits move by some 1e-3 for that, differently on each processor, and near ties turn on it.
    """

    def __init__(self, path: str | os.PathLike[str], context: bool = True, exact: bool = False) -> None:
        self.lib = lib = library()
        self.model = self.context = None
        params = lib.llama_model_default_params()
        if not context:
            # vocab_only opens the row of bools behind the pointers; the third, use_extra_bufts, is the only true one
            params.bytes[bytes(params.bytes).index(1, 40) - 2] = True
        self.model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ValueError(f"llama.cpp does not open {path}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)
        if context:
            params = lib.llama_context_default_params()
            if exact:
                raw = bytes(params.bytes)
                # type_k and type_v are the first two neighbours that are both 1, GGML_TYPE_F16; F32 is 0
                struct.pack_into("<2i", params.bytes, raw.index(struct.pack("<2i", 1, 1)), 0, 0)
                # flash_attn_type is the last of four that are -1, to be chosen; 0 is off
                struct.pack_into("<i", params.bytes, raw.index(struct.pack("<4i", -1, -1, -1, -1)) + 12, 0)
            self.context = lib.llama_init_from_model(self.model, params)

    def close(self) -> None:
        """Free the model; to be called once."""
        if self.context:
            self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = False, add_special: bool = False) -> list[int]:
        raw = text.encode()
        out = (c.c_int32 * (len(raw) + 16))()
        n = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, len(out), add_special, special)
        if n < 0:
            raise RuntimeError(f"llama_tokenize returned {n}")
        return list(out[:n])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits (len(ids), n_vocab) of one chunk of at most 512 ids, each attending to those before it."""
        lib, n = self.lib, len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        code = lib.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.n_vocab,)) for i in range(n)]
        out = np.stack(rows)
        lib.llama_batch_free(batch)
        return out
