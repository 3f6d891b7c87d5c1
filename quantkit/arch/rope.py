"""Scaled rotary embeddings: HF's `rope_scaling` next to what a GGUF says of it, each way round.

`linear` and `yarn` are keys in a GGUF (llama.cpp `conversion/base.py`, `set_gguf_parameters`). `llama3` is a tensor:
`rope_freqs.weight` holds the number each frequency is divided by (`conversion/llama.py`, `generate_extra_tensors`), and
is turned back into HF's four numbers here. Left out, and refused, is what llama.cpp and transformers compute
differently: longrope, dynamic scaling, yarn with an attention factor or betas of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import BadInput, FormatError, Unsupported

Array = NDArray[Any]

FREQS = "rope_freqs.weight"
PREFIX = "rope.scaling."
TOLERANCE = 1e-6  # relative; a float32 holds 6e-8

# GGUF key under `rope.scaling.` -> key of HF's `rope_scaling`, its type, and the GGUF key that stands in for it: a
# scaling is nothing without those that have one. Old converters wrote `scale_linear`; n_ctx_orig_yarn begins as
# n_ctx_train.
LINEAR = (("factor", "factor", float, "rope.scale_linear"),)
YARN = (
    *LINEAR,
    ("original_context_length", "original_max_position_embeddings", int, "context_length"),
    ("yarn_beta_fast", "beta_fast", float, None),
    ("yarn_beta_slow", "beta_slow", float, None),
)
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp has no others: of our families it reads no such key
KINDS = {"linear": LINEAR, "yarn": YARN}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NUMBERS = ("rope_theta", *LLAMA3, "beta_fast", "beta_slow", "attention_factor")
FIELDS = {"rope_type": (PREFIX + "type", str), **{hf: (PREFIX + key, number) for key, hf, number, _ in YARN}}
# Keys that change the result in one of the two programs only, and the values with which they do not.
INERT = {"yarn_ext_factor": (None, 1.0), "yarn_attn_factor": (None, 1.0), "attn_factor": (None, 1.0)}


def scaling_from_gguf(
    get: Callable[[str], Any], freqs: Array | None, config: Mapping[str, Any], known: tuple[str, ...]
) -> dict[str, Any] | None:
    """HF's `rope_scaling`, or None. `get` knows the keys without the architecture's name; `freqs` is the tensor."""
    for key, inert in INERT.items():
        if get(PREFIX + key) not in inert:
            raise Unsupported(f"the value {get(PREFIX + key)} is not supported", where=PREFIX + key)
    kind = get(PREFIX + "type")
    if kind is None:  # llama.cpp takes a factor without a type for a linear one (`llama-model.cpp`, load_hparams)
        scaled = (get(PREFIX + "factor") or get("rope.scale_linear") or 1.0) != 1.0
        kind = "linear" if scaled else "none"
    if freqs is not None:
        if kind != "none" or "llama3" not in known:
            raise Unsupported("this scaling of rotary embeddings is not supported", where=FREQS)
        return llama3_of(freqs, config)
    if kind == "none":
        return None
    if kind not in known or kind not in KINDS:
        raise Unsupported(f"{kind!r} is not supported", where=PREFIX + "type", hint=f"known: {', '.join(known)}")
    scaling: dict[str, Any] = {"rope_type": kind}
    for key, hf, number, other in KINDS[kind]:
        value = get(PREFIX + key) or (get(other) if other else None)
        if value is None and other:
            raise BadInput("the file lacks this required key", where=PREFIX + key)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise FormatError(f"{value!r} is not a number", where=PREFIX + key, hint="the file is damaged")
        if value is not None:
            scaling[hf] = number(value)
    return scaling


def scaling_to_gguf(config: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """The keys under the architecture's name that say `config["rope_scaling"]`; the inverse of `scaling_from_gguf`."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return {}
    kind = scaling.get("rope_type", scaling.get("type"))
    fields = {"rope_type", "type", *(hf for _, hf, _, _ in KINDS.get(kind, ()))}
    if kind == "llama3":
        fields |= set(LLAMA3)
    odd = sorted(k for k, v in scaling.items() if v is not None and (k not in fields or BETAS.get(k, v) != v))
    if kind not in known or odd:
        what = f"{kind} scaling with {odd[0]}" if kind in known else f"{kind} scaling"
        raise Unsupported(f"a GGUF of this family has no {what}", where="rope_scaling", hint="choose an HF target")
    if kind == "llama3":
        llama3_of(_divisors(config), config)  # they are all that the file will say of it
        return {}
    keys: dict[str, Any] = {PREFIX + "type": kind}
    keys |= {PREFIX + key: number(scaling[hf]) for key, hf, number, _ in KINDS[kind] if scaling.get(hf) is not None}
    return keys


def llama3_freqs(config: Mapping[str, Any]) -> Array | None:
    """`rope_freqs.weight` of a model whose `rope_scaling` is llama3's; the inverse of `llama3_of`."""
    s = config.get("rope_scaling") or {}
    if s.get("rope_type", s.get("type")) != "llama3":
        return None
    return _divisors(config)


def _divisors(config: Mapping[str, Any]) -> Array:
    s = config["rope_scaling"]
    low, high, length = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
    waves = _wavelengths(config)
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / s["factor"] + smooth)
    out = np.where(waves < length / high, 1.0, np.where(waves > length / low, float(s["factor"]), between))
    return out.astype(np.float32)


def llama3_of(freqs: Array, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """HF's four numbers from the divisors of the frequencies, as short as they give those divisors back.

    Between its ends a divisor is 1 / ((1-s)/factor + s), with s linear in the frequency: slope and intercept are
    length/(high-low) and -low/(high-low). Only two of the three follow, since a common factor cancels; every published
    model has low = 1, and so has the result.
    """
    f = freqs.astype(np.float64)
    factor = float(f.max())
    if factor == 1.0:
        return None
    waves = _wavelengths(config)
    if len(f) != len(waves):
        raise FormatError(f"{len(f)} divisors for {len(waves)} frequencies", where=FREQS)
    between = (f > 1 + 1e-5) & (f < factor * (1 - 1e-5))
    high, length = _ends(1 / waves[between], (1 / f[between] - 1 / factor) / (1 - 1 / factor), waves, f)
    for digits in range(7):
        scaling: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": round(factor, digits),
            "low_freq_factor": 1.0,
            "high_freq_factor": round(high, digits),
            "original_max_position_embeddings": round(length),
        }
        if scaling["factor"] > 1 and scaling["high_freq_factor"] > 1:
            again = _divisors({**config, "rope_scaling": scaling})
            if bool((np.abs(again - f) <= TOLERANCE * f).all()):
                return scaling
    raise Unsupported("these are not the divisors of llama3's scaling", where=FREQS, hint="known: llama3")


def _ends(x: Array, s: Array, waves: Array, divisors: Array) -> tuple[float, float]:
    """The high factor and the length that place divisors between the ends, `s` at the frequencies `x`.

    Small heads may have one or none there: then high is 4, as it always is, or both are taken from where the ends lie.
    """
    if len(x) >= 2:
        slope, intercept = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), s)[0].tolist()
        high = 1 - 1 / intercept
        return high, slope * (high - 1)
    if len(x) == 1:
        return 4.0, (1 + 3 * s[0]) / x[0]
    whole: Array = divisors == 1
    if not whole.any():
        return 0.0, 0.0  # no length is so short
    length = math.ceil(waves[~whole].min()) - 1
    return (1 + length / waves[whole].max()) / 2, length


def _wavelengths(config: Mapping[str, Any]) -> Array:
    """Tokens in a turn of each rotary pair, float64."""
    exponents = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
    return 2 * math.pi * float(config["rope_theta"]) ** exponents


def flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5 as the flat keys that 4.x writes and both read."""
    local = parameters.get("sliding_attention")
    full = dict(parameters.get("full_attention", parameters))
    _require_numbers(full)
    _require_numbers(local or {})
    out: dict[str, Any] = {"rope_theta": float(full.pop("rope_theta", 10000.0))}
    if (part := full.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise Unsupported(f"a partial_rotary_factor of {part} is not supported", where="rope_parameters")
    if full.get("rope_type", "default") != "default":
        out["rope_scaling"] = full
    if local is not None:
        out["rope_local_base_freq"] = float(local.get("rope_theta", 10000.0))
        if local.get("rope_type", "default") != "default":
            raise Unsupported("scaling inside the sliding window is not supported", where="rope_parameters")
    return out


def _require_numbers(parameters: Mapping[str, Any]) -> None:
    """BadInput for a value that is no positive number where one belongs, or a kind that is no name."""
    kind = parameters.get("rope_type", "default")
    needed = {"rope_theta"} & parameters.keys() | (set(LLAMA3) if kind == "llama3" else set())
    odd = [] if isinstance(kind, str) else ["rope_type"]
    for name in sorted(needed | set(NUMBERS) & {k for k, v in parameters.items() if v is not None}):
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            odd.append(name)
    if odd:
        what = f"{parameters.get(odd[0])!r} makes no sense here"
        raise BadInput(what, where=f"config.json: rope_parameters.{odd[0]}", hint="mend that value")
