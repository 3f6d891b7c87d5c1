"""`Recipe`: everything a conversion is told, as one checked record; from YAML, from options, or from both.

Every mistake of a file is reported at once. A report holds the recipe it was made with, so it can be run again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from quantkit.codecs import CODECS
from quantkit.errors import BadInput, UsageError
from quantkit.hardware import parse_size
from quantkit.resources import resource
from quantkit.targets import Choices, LayerRule


def _type(name: str) -> str:
    if name.upper() not in CODECS:
        raise ValueError(f"no tensor type {name!r}; known: {', '.join(CODECS)}")
    return name.upper()


def _rule(rule: str) -> str:
    pattern, sign, kind = rule.rpartition("=")
    if not pattern or not sign:
        raise ValueError(f"{rule!r} is not REGEX=TYPE, such as attn_v=Q6_K")
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{pattern!r} is no regular expression ({e})") from None
    return f"{pattern}={_type(kind)}"


def _fact(text: str) -> str:
    key, sign, _ = text.partition("=")
    if not key or not sign:
        raise ValueError(f"{text!r} is not KEY=VALUE, such as rope_theta=1000000")
    return text


def _size(text: str) -> str:
    if not re.fullmatch(r"0*[1-9]\d{0,8}[MG]", text, re.ASCII):
        raise ValueError(f"{text!r} is no size such as 2G or 500M")
    return text


def _target_size(text: str) -> str:
    target_bytes(text)
    return text


def target_bytes(text: str) -> int:
    """Bytes of a size such as 22GiB, 500MB or 96MiB; ValueError where it is none."""
    try:
        found = parse_size(text, "")
    except UsageError:
        found = 0
    if found <= 0:
        raise ValueError(f"{text!r} is no size such as 22GiB, 4.5GB or 500MB")
    return found


TensorType = Annotated[str, AfterValidator(_type)]


GGUF = "gguf"  # the target whose types are those of `layers`, or are chosen for a size


class Layer(BaseModel):
    """What is asked of the layers that a pattern names: a type of GGUF targets, or bits of GPTQ's and the like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: TensorType | None = None
    bits: Literal[2, 3, 4, 8] | None = None

    @classmethod
    def of_bits(cls, bits: int) -> Layer:
        """So many bits."""
        return cls.model_validate({"bits": bits})

    @model_validator(mode="after")
    def _one_of_two(self) -> Layer:
        if (self.type is None) == (self.bits is None):
            raise ValueError("give a type (of GGUF targets) or bits (of GPTQ and compressed-tensors targets)")
        return self


class Recipe(BaseModel):
    """What to make and how to measure it. Field names are those of the command line's options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: Annotated[tuple[str, ...], Field(min_length=1)]
    calibration: str | None = "default"  # a built-in text, `self`, or a file; None: no activations are looked at
    samples: Annotated[int, Field(ge=1)] = 64
    seqlen: Annotated[int, Field(ge=8)] = 512
    seed: int = 0
    eval_text: str | None = "demo"  # a built-in text or a file; None scores nothing
    eval_chunks: Annotated[int, Field(ge=1)] | None = None  # None: all the text gives
    ctx: Annotated[int, Field(ge=8)] = 512
    device: str = "auto"
    vram: Annotated[str, AfterValidator(_target_size)] | None = None  # the most to allocate on a CUDA device
    inputs: Literal["quantized", "source"] = "quantized"  # GPTQ: what its layers are calibrated on
    # of the source: facts stated over its own, and a chat template (a file or a built-in name)
    override: tuple[Annotated[str, AfterValidator(_fact)], ...] = ()
    chat_template: str | None = None
    # of GGUF targets, as `llama-quantize` and `llama-gguf-split` mean them (targets/mixtures.py)
    output_type: TensorType | None = None
    token_embedding_type: TensorType | None = None
    tensor_type: tuple[Annotated[str, AfterValidator(_rule)], ...] = ()
    pure: bool = False
    leave_output: bool = False
    split_max_size: Annotated[str, AfterValidator(_size)] | None = None
    imatrix: str | None = None  # a file, used in place of calibrating
    target_size: Annotated[str, AfterValidator(_target_size)] | None = None  # types that make the target `gguf` so big
    target_bpw: Annotated[float, Field(gt=0, le=32)] | None = None  # or so many bits a weight
    solver: Literal["gptq", "awq+gptq", "learned"] | None = None  # for more than a target's own
    layers: dict[str, Layer] = {}  # by pattern of names, `"*.ffn_down": {type: Q6_K}`; the first that matches counts

    def choices(self) -> Choices:
        """What this asks of the targets beside their names."""
        rules = [rule.rpartition("=") for rule in self.tensor_type]
        size = self.split_max_size
        return Choices(
            self.output_type,
            self.token_embedding_type,
            tuple((re.compile(pattern, re.IGNORECASE), kind) for pattern, _, kind in rules),
            self.pure,
            self.leave_output,
            int(size[:-1]) * {"M": 10**6, "G": 10**9}[size[-1]] if size else None,
            Path(self.imatrix) if self.imatrix else None,
            tuple(LayerRule(pattern, type=layer.type) for pattern, layer in self.layers.items() if layer.type),
            tuple(LayerRule(pattern, bits=layer.bits) for pattern, layer in self.layers.items() if layer.bits),
            self.solver,
            self.inputs,
        )


def load_recipe(name: str | None, options: Mapping[str, Any]) -> Recipe:
    """A recipe from a file or a name in `recipes/` (or from nothing), with `options` that are not None laid over it.

    Raises BadInput where there is no such file, UsageError listing every mistake in one line.
    """
    values: Any = {} if name is None else _read(name)
    if not isinstance(values, dict):
        raise UsageError("a recipe is a mapping of options", where=name, hint="see recipes/demo.yaml")
    for name_of_list in ("to", "tensor_type", "override"):
        if isinstance(values.get(name_of_list), str):
            values[name_of_list] = [values[name_of_list]]
    merged = values | {k: v for k, v in options.items() if v is not None}
    if merged.get("target_size") is not None or merged.get("target_bpw") is not None:
        merged.setdefault("to", [GGUF])
    try:
        recipe = Recipe(**merged)
    except ValidationError as e:
        unknown = any(f["type"] == "extra_forbidden" for f in e.errors())
        hint = f"known: {', '.join(Recipe.model_fields)}" if unknown else "see quantkit convert --help"
        raise UsageError("; ".join(_said(f, name) for f in e.errors()), where=name, hint=hint) from None
    return recipe


def _said(fault: ErrorDetails, recipe: str | None) -> str:
    """A fault in words, under its name in the recipe or on the command line.

    pydantic's own begin with a capital, ours come with a label.
    """
    ours = fault["msg"].removeprefix("Value error, ")
    said = ours if fault["type"] == "value_error" else ours.lower()
    option = "--" + str(fault["loc"][0]).replace("_", "-")
    return f"{'.'.join(map(str, fault['loc'])) if recipe else option}: {said}"


def _read(name: str) -> Any:
    path = Path(name)
    if not path.is_file() and "/" not in name:
        path = resource("recipes") / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in resource("recipes").glob("*.yaml")))
        raise BadInput("no such recipe", where=name, hint=f"give a YAML file or one of: {known}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        reason = str(e).replace("\n", " ")
        raise UsageError(f"not readable as YAML ({reason})", where=path, hint="see recipes/demo.yaml") from None
