"""quantkit takes a quantized GGUF back to fp16 and on to GPTQ, AWQ and other GGUF types, and measures every output.

The functions below are the public API; `quantkit convert` and `quantkit perplexity` are built on nothing else.
"""

import os

# torch's worker threads spin while they wait, and spinning threads starve one another as soon as another program wants
# a core: a loop of small operations then runs a hundred times slower. OpenMP reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from quantkit.codecs import decode, encode
from quantkit.convert import convert
from quantkit.corpus import calibration_batch, evaluation_chunks
from quantkit.errors import BadInput, FormatError, QuantkitError, Resumable, Unsupported, UsageError, VerifyError
from quantkit.evaluate import Score, predict, score
from quantkit.forward import device_of, network
from quantkit.model import Model, open_model
from quantkit.plan import Plan, make_plan
from quantkit.recipe import Recipe, load_recipe
from quantkit.sizing import Sized, sized
from quantkit.texts import load_text

__all__ = [
    "BadInput",
    "FormatError",
    "Model",
    "Plan",
    "QuantkitError",
    "Recipe",
    "Resumable",
    "Score",
    "Sized",
    "Unsupported",
    "UsageError",
    "VerifyError",
    "calibration_batch",
    "convert",
    "decode",
    "device_of",
    "encode",
    "evaluation_chunks",
    "load_recipe",
    "load_text",
    "make_plan",
    "network",
    "open_model",
    "predict",
    "score",
    "sized",
]
