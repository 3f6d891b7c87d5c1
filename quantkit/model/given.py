"""What the user states of a source, laid over what the source says: facts (`--override`) and a chat template.

Both go over a GGUF's metadata, or over a folder's configuration and files, before anything is made of these: what is
written from them then says the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gguf.constants import GGUFValueType as T

from quantkit import arch as families
from quantkit.arch.facts import TOKENIZER, facts_of, stated
from quantkit.chat import ChatTemplate
from quantkit.files.gguf import GGUF, Value
from quantkit.files.gguf_values import SCALARS


def laid_over(gguf: GGUF, overrides: Sequence[str], template: ChatTemplate | None) -> tuple[GGUF, dict[str, Any]]:
    """The GGUF as it is to be read, and the facts by HF key."""
    known = facts_of(families.sharing(str(gguf.get("general.architecture")))) | TOKENIZER
    facts = stated(overrides, known)
    changed = dict(gguf.metadata)
    for key, value in facts.items():
        changed |= {name: Value(SCALARS[known[key].type], None, value) for name in known[key].gguf}
    if template:
        changed["tokenizer.chat_template"] = Value(T.STRING, None, template.text)
    return replace(gguf, metadata=changed), facts


def stated_config(config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with facts laid over it."""
    out = dict(config)
    for key, value in facts.items():
        outer, _, inner = key.partition(".")
        out[outer] = {**(out.get(outer) or {}), inner: value} if inner else value
    return out


def with_template(files: Mapping[str, str], template: ChatTemplate) -> dict[str, str]:
    """A folder's tokenizer files with this chat template and no other."""
    out = dict(files)
    if config := json.loads(files.get("tokenizer_config.json", "{}")):
        config.pop("chat_template", None)
        out["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    return out | {"chat_template.jinja": template.text}
