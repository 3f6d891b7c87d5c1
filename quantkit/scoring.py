"""Scoring models on texts: several texts in one pass over a model, and a reference that runs once for a whole ladder.

Tokens are cut with the first model's tokenizer. What a reference predicted is kept under a hash of its weights and the
tokens, as its final hidden states: hidden x 4 bytes a position, exact, where 16-bit logits would take vocabulary x 2.
What was measured at every position of a model is kept likewise, so nothing that was scored is ever run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from quantkit import cache, llamacpp
from quantkit.arch.tokenizer import Tokenizer
from quantkit.corpus import Text, evaluation_chunks
from quantkit.errors import BadInput, UsageError
from quantkit.evaluate import (
    Positions,
    Predictions,
    Predictor,
    Reference,
    Score,
    by_text,
    measure,
    predict,
    softcap,
    summary,
)
from quantkit.files.logprobs import LogProbs
from quantkit.forward import network
from quantkit.later import Tensor, torch
from quantkit.model import Model
from quantkit.texts import load_text

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # torch's names
COMPUTED_BY = ("gguf-quantkit", "torch", "transformers")  # another version of these scores anew


@dataclass(frozen=True)
class Passages:
    """Texts as one tensor of chunks (n, length): text i has `lengths[i]` of them."""

    texts: tuple[Text, ...]
    lengths: tuple[int, ...]
    rows: Tensor
    stride: int | None = None

    def scores(self, positions: Positions) -> tuple[Score, list[Score]]:
        """Of all texts together, and of each."""
        n, length = self.rows.shape
        each = len(positions.nll) // n
        parts = by_text(positions, self.lengths, each)
        return summary(positions, n, length), [summary(p, k, length) for p, k in zip(parts, self.lengths, strict=True)]


@dataclass(frozen=True)
class Setting:
    """How models are run: where, and in which type."""

    device: torch.device
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)

    @classmethod
    def of(cls, device: torch.device, dtype: str) -> Setting:
        """With a type by its name; UsageError for a name that is none."""
        if dtype not in DTYPES:
            raise UsageError(f"unknown type {dtype!r}", where="--dtype", hint=f"known: {', '.join(DTYPES)}")
        return cls(device, getattr(torch, DTYPES[dtype]))


Step = Callable[[str, int, int], None]  # a stage, steps done, steps in all


def passages(
    names: Sequence[str], tokenizer: Tokenizer, ctx: int, chunks: int | None = None, stride: int | None = None
) -> Passages:
    """Texts by name or path, cut in chunks; `chunks` keeps the first so many of each."""
    texts = tuple(load_text(name) for name in names)
    rows = [evaluation_chunks(tokenizer.encode(t.plain()), ctx, tokenizer, chunks, stride) for t in texts]
    return Passages(texts, tuple(map(len, rows)), torch.cat(rows), stride)


def same_tokens(model: Model, tokenizer: Tokenizer, text: Passages) -> None:
    """BadInput where `model` cuts the texts into other tokens: nothing measured beside another model would count."""
    own = model.tokenizer()
    for t in text.texts:
        sample = t.plain()[:20000]
        if own.encode(sample) != tokenizer.encode(sample):
            raise BadInput(
                f"tokenizes {t.name} differently from the others", where=model.path, hint="KL needs equal tokens"
            )


def same_chunks(reference: LogProbs, text: Passages, tokenizer: Tokenizer) -> None:
    """BadInput where a file of log-probabilities is about other chunks, UsageError where an option mends it."""
    chunks, ctx = reference.tokens.shape
    n, length = text.rows.shape
    if text.stride is not None or length != ctx:
        raise UsageError(f"holds chunks of {ctx} tokens", where=reference.path, hint=f"score with --ctx {ctx}")
    if n > chunks:
        raise UsageError(f"holds {chunks} chunks, the text has {n}", where=reference.path, hint=f"--chunks {chunks}")
    first = int(tokenizer.add_bos)  # of a chunk, where BOS has replaced what the file still holds
    if not torch.equal(reference.tokens[:n, first:], text.rows[:, first:]):
        hint = "--text FILE: the text it was made from, cut by the same tokenizer"
        raise BadInput("is about other tokens than these", where=reference.path, hint=hint)


def run(model: Model, text: Passages, setting: Setting, step: Step) -> Predictions:
    """Run a model over all chunks, block by block."""
    net = network(model, setting.device, setting.dtype)
    for done in predict(net, text.rows, text.stride):
        if isinstance(done, Predictions):
            return done
        step(f"scoring {model.name}", done + 1, model.layers)
    raise AssertionError("a network predicts")


def reference_predictions(model: Model, text: Passages, setting: Setting, step: Step) -> Predictions:
    """What a reference predicts: read from the cache where it ran over these tokens before."""
    name = _name("reference", model, None, text, setting)
    if (kept := cache.load(name)) is not None:
        net = network(model, setting.device, setting.dtype)
        return Predictions(kept["hidden"], net.head(), softcap(net))
    predictions = run(model, text, setting, step)
    cache.keep(name, {"hidden": predictions.hidden})
    return predictions


class Ladder:
    """Models scored against one reference (or none) on the same tokens; the reference runs when it is first needed."""

    def __init__(self, text: Passages, reference: Model | LogProbs | None, setting: Setting, step: Step) -> None:
        self.text, self.reference, self.setting, self.step = text, reference, setting, step
        self._predictions: Reference | None = None

    def positions(self, model: Model) -> Positions:
        """What `model` measures on the texts, run or read from the cache."""
        name = _name("positions", model, self.reference, self.text, self.setting)
        if (kept := cache.load(name)) is not None:
            return Positions(**kept)
        # the reference first: its states wait on the disk while a model runs, and only then comes a second head
        theirs = self._of_reference()
        predictions = run(model, self.text, self.setting, self.step)
        if theirs and theirs.vocabulary != predictions.vocabulary:
            what = f"has {predictions.vocabulary} logits a position, the reference {theirs.vocabulary}"
            raise BadInput(what, where=model.path, hint="KL needs one vocabulary")
        found = measure(predictions, self.text.rows, theirs)
        cache.keep(name, found.tensors())
        return found

    def remember(self, model: Model, positions: Positions) -> None:
        """Keep what was measured elsewhere on these very tokens."""
        cache.keep(_name("positions", model, self.reference, self.text, self.setting), positions.tensors())

    def against(self, predictions: Predictor) -> Positions:
        """What given predictions measure against the reference."""
        return measure(predictions, self.text.rows, self._of_reference())

    def _of_reference(self) -> Reference | None:
        if self.reference is None or isinstance(self.reference, LogProbs):
            return self.reference
        if self._predictions is None:
            self._predictions = reference_predictions(self.reference, self.text, self.setting, self.step)
        return self._predictions


@dataclass(frozen=True)
class AsRun:
    """A GGUF as llama.cpp runs it: against the reference, and against the same weights dequantized (runtime error)."""

    positions: Positions
    runtime: Positions
    tokenizer: dict[str, Any]  # how its token ids compare with ours


def as_run_by_llama_cpp(model: Model, ladder: Ladder) -> AsRun:
    """Run a GGUF by llama.cpp on the ladder's very tokens; BadInput for what is no GGUF."""
    if model.gguf is None:
        raise BadInput("llama.cpp runs GGUF files only", where=model.path, hint="convert it to a GGUF type first")
    rows, text = ladder.text.rows, ladder.text
    weights = reference_predictions(model, text, ladder.setting, ladder.step)
    with llamacpp.opened(model.gguf.paths[0], rows.shape[1]) as runtime:
        predictions = llamacpp.RuntimePredictions(runtime, rows, weights.counts[1])
        tokenizer = _token_differences(model, text, runtime)
        if runtime.vocabulary != weights.vocabulary:
            what = f"has {runtime.vocabulary} logits in llama.cpp and {weights.vocabulary} here"
            raise BadInput(what, where=model.path)
        added = measure(predictions, rows, weights)
        return AsRun(ladder.against(predictions) if ladder.reference else added.alone(), added, tokenizer)


def _token_differences(model: Model, text: Passages, runtime: llamacpp.Runtime) -> dict[str, Any]:
    ours, theirs = [], []
    for t in text.texts:
        ours += model.tokenizer().encode(t.plain())
        theirs += runtime.tokenize(t.plain())
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    return {
        "tokens": len(ours),
        "llama_cpp_tokens": len(theirs),
        "equal": ours == theirs,
        "first_difference": first if ours != theirs else None,
    }


def _name(kind: str, model: Model, reference: Model | LogProbs | None, text: Passages, setting: Setting) -> str:
    what = [_identity(m) for m in (model, reference) if m]
    how = [setting.device.type, str(setting.dtype), *map(version, COMPUTED_BY)]
    return cache.key(kind, what, cache.hash_of(text.rows), text.stride, how)


def _identity(scored: Model | LogProbs) -> Any:
    if isinstance(scored, LogProbs):
        return cache.file_hash(scored.path)
    return cache.fingerprint(scored), scored.config
