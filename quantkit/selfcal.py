"""`self`: calibration text that the model writes for itself - no network, no foreign text, the model's own register.

Sequences are sampled at temperature 1 from BOS or, for a tokenizer without it, from a token drawn at random (as in
LLM-QAT, Liu et al. 2023, arXiv:2305.17888). Seeded, and cached by model and settings: it costs a forward pass a token.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress

from quantkit import cache
from quantkit.corpus import Text
from quantkit.errors import QuantkitError, UsageError
from quantkit.files.atomic import staged
from quantkit.forward import generate, network
from quantkit.later import Tensor, torch
from quantkit.model import Model


def self_calibration(model: Model, samples: int, seqlen: int, seed: int, device: torch.device) -> tuple[Text, Tensor]:
    """The text and its token ids (samples, seqlen). UsageError where the whole model does not fit in memory."""
    name = hashlib.sha256(json.dumps([_identity(model), samples, seqlen, seed]).encode()).hexdigest()
    path = cache.folder() / "self" / f"{name[:32]}.json"
    if path.is_file():
        ids = torch.tensor(json.loads(path.read_text(encoding="utf-8")))
    else:
        ids = _write(model, samples, seqlen, seed, device)
        with suppress(OSError, QuantkitError), staged(cache.made(path), replace=True) as partial:
            partial.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    tokenizer = model.tokenizer()
    documents = tuple(tokenizer.decode(row) for row in ids.tolist())
    sha = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return Text("self", documents, sha, f"written by the model, seed {seed}"), ids


def _identity(model: Model) -> list[object]:
    tensors = [(n, r.type, list(r.shape)) for n, r in model.tensors.items()]
    norm = model.tensors["model.norm.weight"].read()
    return [model.config, tensors, hashlib.sha256(norm.numpy().tobytes()).hexdigest()]


def _write(model: Model, samples: int, seqlen: int, seed: int, device: torch.device) -> Tensor:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cpu" and (need := 4 * model.parameters) > free:
        raise UsageError(
            f"writing its own text needs the whole model in memory: {need:,} bytes, {free:,} are free",
            where="--calibration self",
            hint="use --calibration default",
        )
    tokenizer = model.tokenizer()
    drawn = torch.randint(model.config["vocab_size"], (samples, 1), generator=torch.Generator().manual_seed(seed))
    start = drawn if tokenizer.bos is None else torch.full((samples, 1), tokenizer.bos)
    return generate(network(model, device), start, seqlen, seed)
