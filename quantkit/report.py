"""The report of a conversion: what was made, from what, how, and how good it is. `report.json` holds it all.

The JSON's keys are a contract (README, "The report"). It holds all that a second run needs: the recipe, the hashes of
source and texts, the versions of what computed it.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from importlib.metadata import version
from math import prod
from threading import Thread
from typing import Any

from quantkit.cache import fingerprint
from quantkit.corpus import Text
from quantkit.evaluate import Score
from quantkit.events import TensorDone, VariantDone
from quantkit.later import Tensor
from quantkit.model import Model
from quantkit.recipe import Recipe
from quantkit.targets import Row
from quantkit.targets.mixtures import PLAIN

_LOG = ("loss_rounded", "loss", "damp", "order", "fallback", "block_left")
LAYER_COLUMNS = ("target", "tensor", "solver", *_LOG, "seconds")
LIBRARIES = ("torch", "transformers", "tokenizers", "gguf", "libggml-python", "numpy", "safetensors")


def describe(model: Model) -> dict[str, Any]:
    """What `inspect` shows of a model; reads headers only."""
    get = model.gguf.get if model.gguf else lambda key, default=None: default
    template = model.chat_template
    return {
        "name": model.name,
        "path": str(model.path),
        "repo": model.hub.repo if model.hub else None,
        "revision": model.hub.commit if model.hub else None,
        "format": model.format,
        "architecture": model.arch.gguf,
        "parameters": model.parameters,
        "bytes": model.disk_bytes,
        "bits_per_weight": round(8 * model.nbytes / model.parameters, 4),
        "types": dict(Counter(t.type for t in model.tensors.values()).most_common()),
        "layers": model.layers,
        "hidden_size": model.config["hidden_size"],
        "heads": model.config["num_attention_heads"],
        "kv_heads": model.config["num_key_value_heads"],
        "context": model.config["max_position_embeddings"],
        "vocabulary": model.config["vocab_size"],
        "tokenizer": get("tokenizer.ggml.model"),
        "pre_tokenizer": get("tokenizer.ggml.pre"),
        "chat_template": template_origin(model),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "overrides": dict(model.facts),
        "license": get("general.license"),
    }


def template_origin(model: Model) -> str:
    """Where the chat template comes from; nothing is put in the place of one that is missing."""
    if model.template:
        return model.template.source
    return "none" if model.chat_template is None else "the source's own"


def fingerprinting(model: Model) -> Future[dict[str, str]]:
    """`fingerprint`, which reads the whole source, beside other work; the thread does not outlive the program."""
    future: Future[dict[str, str]] = Future()

    def work() -> None:
        try:
            future.set_result(fingerprint(model))
        except BaseException as e:
            future.set_exception(e)

    Thread(target=work, daemon=True).start()
    return future


def lineage(model: Model) -> dict[str, Any]:
    """The lowest-bit type among the source's matrices, and what it means for everything made of it."""
    matrices = [r for r in model.tensors.values() if len(r.shape) > 1]
    lowest = min(matrices, key=lambda r: r.nbytes / prod(r.shape))
    low = [r for r in matrices if r.type == lowest.type]
    bits = round(8 * lowest.nbytes / prod(lowest.shape), 4)
    note = f"The source holds {len(low)} of its {len(matrices)} matrices as {lowest.type} ({bits:g} bits a weight). "
    if lowest.type in PLAIN:
        note += "What an earlier conversion may have lost cannot be seen in it."
    else:
        note += (
            "What was lost of the original when they were quantized cannot be recovered: "
            "all errors and scores here are against the source, not against the original."
        )
    return {"lowest_type": lowest.type, "bits_per_weight": bits, "tensors": len(low), "note": note}


def upcasts(model: Model, done: Iterable[TensorDone]) -> list[str]:
    """A warning for every pair of types by which tensors of an output grew and lost, with the error measured."""
    grown: dict[tuple[str, str, str], list[TensorDone]] = {}
    for t in (t for t in done if t.row.solver == "ggml"):
        ref = model.tensors[t.row.source]
        if ref.type not in PLAIN and t.row.nbytes > stored(model, t.row):
            grown.setdefault((t.target, ref.type, t.row.type), []).append(t)
    return [_upcast(model, *types, tensors) for types, tensors in grown.items()]


def fallbacks(done: Iterable[TensorDone]) -> list[str]:
    """A warning for every output some of whose matrices were rounded and no more, with the first and the reason."""
    rounded: dict[str, list[TensorDone]] = {}
    for t in (t for t in done if t.log.get("fallback")):
        rounded.setdefault(t.target, []).append(t)
    return [
        f"{target}: {len(ts)} matrices are rounded and no more, {ts[0].row.source} among them: {ts[0].log['fallback']}"
        for target, ts in rounded.items()
    ]


def stored(model: Model, row: Row) -> int:
    """Bytes of what a row of a GGUF is made of, in the source; of all experts of a stack."""
    ref = model.tensors[row.source]
    return ref.nbytes * (prod(row.shape) // prod(ref.shape))


def _upcast(model: Model, target: str, before: str, after: str, tensors: list[TensorDone]) -> str:
    size = sum(t.row.nbytes for t in tensors) / sum(stored(model, t.row) for t in tensors) - 1
    worst = max(tensors, key=lambda t: t.loss)
    mean = sum(t.loss for t in tensors) / len(tensors)
    error = f"worse than the source, by {mean:.2g} of its energy on average and {worst.loss:.2g} in {worst.row.name}"
    return (
        f"{target}: {before} to {after} in {len(tensors)} of the source's tensors "
        f"ends {error if worst.loss else 'no better than the source'}; costs {size:+.0%} size for nothing"
    )


def text_record(text: Text | None, ids: Tensor | None) -> dict[str, Any] | None:
    """What a text was, and the rows of tokens that were taken from it; None where there was none."""
    if text is None or ids is None:
        return None
    return {
        "name": text.name,
        "source": text.source,
        "sha256": text.sha256,
        "rows": ids.shape[0],
        "seqlen": ids.shape[1],
        "tokens": ids.numel(),
    }


def variant_record(done: VariantDone, tensors: list[TensorDone], parameters: int) -> dict[str, Any]:
    """One variant of the report. Scores are null where nothing was scored."""
    score = done.score.record() if done.score else {}
    return {
        "target": done.output.target,
        "format": done.output.format,
        "path": done.output.path,
        "bytes": done.output.nbytes,
        "bits_per_weight": round(8 * sum(r.nbytes for r in done.output.rows) / parameters, 4),
        "perplexity": score.get("perplexity"),
        "stderr": score.get("stderr"),
        "delta_ln_ppl": score.get("delta_ln_ppl"),
        "kl_divergence": score.get("kl_divergence"),
        "same_top": score.get("same_top"),
        "verified": True,
        "seconds": round(done.seconds, 2),
        "note": done.output.note,
        "tensors": [
            {
                "name": t.row.name,
                "source_type": t.row.source_type,
                "type": t.row.type,
                "solver": t.row.solver,
                "bytes": t.row.nbytes,
                "loss": t.loss,
                "seconds": round(t.seconds, 4),
                **t.log,
            }
            for t in tensors
        ],
    }


def layers_csv(variants: Iterable[dict[str, Any]]) -> str:
    """How each layer was solved, as a table: one line for every tensor with a solver's log; "" without any."""
    lines = []
    for v in variants:
        for t in (t for t in v["tensors"] if "loss_rounded" in t):
            cells = {"target": v["target"], "tensor": t["name"]} | t
            lines.append(",".join("" if cells.get(c) is None else str(cells[c]) for c in LAYER_COLUMNS))
    return "\n".join([",".join(LAYER_COLUMNS), *lines]) + "\n" if lines else ""


def report(
    model: Model,
    recipe: Recipe,
    source_score: Score | None,
    variants: list[dict[str, Any]],
    calibration: dict[str, Any] | None,
    evaluation: dict[str, Any] | None,
    device: str,
    warnings: list[str],
    sha256: dict[str, str],
) -> dict[str, Any]:
    """The whole report; `sha256` is the source's `fingerprint`."""
    scored = source_score.record() if source_score else {}
    return {
        "source": describe(model)
        | {"sha256": sha256, "perplexity": scored.get("perplexity"), "stderr": scored.get("stderr")},
        "variants": variants,
        "calibration": calibration,
        "evaluation": evaluation,
        "recipe": recipe.model_dump(mode="json"),
        "lineage": lineage(model),
        "warnings": warnings,
        "device": device,
        "versions": {"quantkit": version("gguf-quantkit"), "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
    }
