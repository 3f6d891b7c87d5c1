"""`open_model`: a GGUF, a split GGUF, or an HF folder (dense, GPTQ or AWQ) as one record with one way to read weights.

Nothing is read but headers until a tensor's `read()` is called. Tensors carry HF names, since the forward pass is
transformers' own; a GGUF's names, row orders and configuration are turned round here by the architecture's table.
"""

from __future__ import annotations

import re
from pathlib import Path

from quantkit.errors import BadInput
from quantkit.model.from_folder import open_hf_folder
from quantkit.model.from_gguf import open_gguf
from quantkit.model.record import Model, Ref, transformers_config

__all__ = ["Model", "Ref", "open_model", "transformers_config"]


def open_model(path: str | Path) -> Model:
    """Open whatever model lies at `path`.

    Raises BadInput where nothing is found, FormatError for a damaged file, Unsupported for a family, a tensor type or a
    tokenizer that quantkit has no entry for. An unknown or a missing tensor is an error, never a random initialization.
    """
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        return open_gguf(_only_gguf(path))
    if path.is_dir():
        return open_hf_folder(path)
    if not path.exists():
        raise BadInput("no such file or folder", where=path, hint="give a GGUF file or an HF model folder")
    return open_gguf(path)


def _only_gguf(path: Path) -> Path:
    found = sorted(p for p in path.glob("*.gguf") if not re.search(r"-(?!00001)\d{5}-of-\d{5}$", p.stem))
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{len(found)} GGUF files in this folder", where=path, hint=f"name one, such as {found[0].name}")
    raise BadInput("no model in this folder", where=path, hint="it needs a .gguf file, or config.json and safetensors")
