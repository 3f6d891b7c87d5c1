"""`open_model`: a GGUF, a split one, an HF folder or a Hub name as one record with one way to read weights.

Nothing is read but headers until a tensor's `read()` is called. Tensors carry HF names, since the forward pass is
transformers' own; a GGUF's names, row orders and configuration are turned round here by the architecture's table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.chat import ChatTemplate, load_template
from quantkit.errors import BadInput
from quantkit.model.from_folder import open_hf_folder
from quantkit.model.from_gguf import open_gguf
from quantkit.model.hub import pull
from quantkit.model.record import Model, Ref, in_rows, refused, transformers_config

__all__ = ["Model", "Ref", "in_rows", "open_model", "refused", "transformers_config"]


def open_model(source: str | Path, overrides: Sequence[str] = (), chat_template: str | None = None) -> Model:
    """Open a model: a GGUF, any shard of a split one, an HF folder, or a Hub name (see `hub`); a local path goes first.

    `overrides` are facts stated over the source's own, each `KEY=VALUE` by its name in config.json; `chat_template` is
    a file or a built-in name. Raises BadInput where nothing is found, FormatError for a damaged file, Unsupported for a
    family, a tensor type or a tokenizer that quantkit has no entry for, UsageError for a fact that the family has not.
    An unknown or a missing tensor is an error, never a random initialization.
    """
    template = load_template(chat_template) if chat_template else None
    path = Path(source)
    if path.exists():
        return _open_local(path, overrides, template)
    if found := pull(str(source)):
        model = _open_local(found.path, overrides, template)
        name = model.name if model.gguf else found.repo.partition("/")[2]
        return replace(model, name=name, hub=found)
    raise BadInput("no such file or folder", where=source, hint="give a GGUF, an HF model folder or a Hub name")


def _open_local(path: Path, overrides: Sequence[str], template: ChatTemplate | None) -> Model:
    if path.is_dir() and (path / "config.json").is_file():
        return open_hf_folder(path, overrides, template)
    return open_gguf(_only_gguf(path) if path.is_dir() else path, overrides, template)


def _only_gguf(path: Path) -> Path:
    later_shard = re.compile(r"-(?!00001)\d{5}-of-\d{5}$")
    found = sorted(p for p in path.glob("*.gguf") if p.name != "imatrix.gguf" and not later_shard.search(p.stem))
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{len(found)} GGUF files in this folder", where=path, hint=f"name one, such as {found[0].name}")
    raise BadInput("no model in this folder", where=path, hint="it needs a .gguf file, or config.json and safetensors")
