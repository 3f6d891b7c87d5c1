"""The target `gguf`: no mixture of llama.cpp's, but a type for every tensor, as a recipe's `layers` have it.

`--target-size` and `--target-bpw` find such types (`quantkit.fit`) and write them as a recipe. In the file's metadata
it is the mixture of the type that holds most of its bytes, which is all that llama.cpp has a number for.
"""

from __future__ import annotations

import re
from collections import Counter
from math import prod

from quantkit.errors import UsageError
from quantkit.files.gguf_writer import tensor_nbytes
from quantkit.model import Model
from quantkit.targets.gguf import plan_mixture
from quantkit.targets.gguf_tensors import held
from quantkit.targets.layers import first_rule
from quantkit.targets.mixture_rules import MIXTURES
from quantkit.targets.mixtures import quantizable
from quantkit.targets.target import Calibration, Choices, Family, Output


def plan(match: re.Match[str], model: Model, calibration: Calibration | None, choices: Choices) -> Output:
    """A GGUF whose types are all given; UsageError naming the first tensor that has none."""
    held_as: Counter[str] = Counter()
    weights = 0
    for t in held(model):
        weights += prod(t.shape)
        if not quantizable(t.name, t.shape):
            continue
        if (rule := first_rule(choices.layers, t.name)) is None:
            hint = "ask for --target-size or --target-bpw, or take a mixture such as Q4_K_M as the target"
            raise UsageError("the target gguf needs a type for it", where=t.name, hint=hint)
        held_as[rule.type] += tensor_nbytes(t.name, t.shape, rule.type)
    label = f"{8 * held_as.total() / weights:.2f}bpw"
    most = held_as.most_common(1)[0][0]
    mixture = next(name for name, mix in MIXTURES.items() if mix.base == most)
    return plan_mixture(mixture, label, model, calibration, choices, target=match[0])


FAMILY = Family("gguf (types chosen for --target-size)", re.compile("gguf"), plan)
