"""Models by their Hub name: `user/repo`, `user/repo:Q4_K_M`, `hf://user/repo@revision/file.gguf`.

Everything goes through huggingface_hub: its cache, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold here. Only what a
model is read from is downloaded. Left out are weights other than GGUF and safetensors: a pickle is a program.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from quantkit.errors import BadInput, QuantkitError, Resumable

ADDRESS = re.compile(
    r"(?P<scheme>hf://)?(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@:/]+))?(?::(?P<quant>[^/:]+)|/(?P<file>.+))?",
    re.ASCII,
)
# what `from_folder` reads of a repository
FOLDER = re.compile(
    r"model[^/]*\.safetensors(\.index\.json)?|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map)"
    r"\.json|chat_template\.jinja"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
NO_MODEL = re.compile(r"(^|/)mmproj|imatrix", re.IGNORECASE)  # GGUFs of another kind
QUANT = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32))\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Pulled:
    """What was found: the file or folder in the cache, the repository, and the commit that it is of."""

    path: Path
    repo: str
    commit: str


def pull(source: str) -> Pulled | None:
    """The model that a Hub name means, downloaded where it is not cached; None for what is no Hub name.

    Raises BadInput for what the Hub does not have or does not give, Resumable where it cannot be reached.
    """
    address = ADDRESS.fullmatch(source)
    if not address or (not address["scheme"] and (address["file"] or address["repo"].endswith(".gguf"))):
        return None
    repo, revision = address["repo"], unquote(address["revision"] or "main")
    present, folder = _listing(source, repo, revision)
    names = chosen(present, address["quant"], address["file"], source)
    folder = folder or _downloaded(source, repo, revision, names)
    return Pulled(folder / names[0] if names[0].endswith(".gguf") else folder, repo, folder.name)


def chosen(names: Sequence[str], quant: str | None, file: str | None, source: str) -> list[str]:
    """The files to read: a GGUF (all shards of a set, in order), or those of an HF folder; BadInput where in doubt.

    >>> chosen(["a-Q4_0.gguf", "a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"], "q8_0", None, "user/repo")
    ['a-Q8_0-00001-of-00002.gguf', 'a-Q8_0-00002-of-00002.gguf']
    """
    sets: dict[str, list[str]] = {}
    for name in sorted(n for n in names if n.endswith(".gguf") and not NO_MODEL.search(n)):
        sets.setdefault(SHARD.sub("", name), []).append(name)
    if file:
        if file not in names or not file.endswith(".gguf"):
            raise BadInput(f"the repository has no GGUF {file}", where=source, hint=_those(sets))
        return sets.get(SHARD.sub("", file), [file])
    if not quant and "config.json" in names and any(FOLDER.fullmatch(n) and ".safetensors" in n for n in names):
        return ["config.json", *sorted(n for n in names if FOLDER.fullmatch(n) and n != "config.json")]
    if quant:
        ending = re.compile(rf"(^|[-._/]){re.escape(quant)}(/[^/]*)?\.gguf$", re.IGNORECASE)
        found = [s for s in sets if ending.search(s) or quant.lower() in s.lower().split("/")[:-1]]
    else:
        found = list(sets)
    if not sets:
        raise BadInput("the repository holds no GGUF and no safetensors", where=source, hint="name another repository")
    if not found:
        raise BadInput(f"the repository has no {quant}", where=source, hint=_those(sets))
    if len(found) > 1:
        raise BadInput(f"{len(found)} files of the repository fit", where=source, hint=_those(found))
    return sets[found[0]]


def _those(sets: Sequence[str] | dict[str, Any]) -> str:
    """The quants by name, or where a name says too little, the files."""
    labels = [match[1] if (match := QUANT.search(s)) else s for s in sets]
    if len({label.lower() for label in labels}) < len(labels):
        return f"name one of: {', '.join(sets)}, as hf://user/repo/FILE"
    return f"name one of: {', '.join(labels)}, as user/repo:{labels[0]}" if labels else "it has none"


def _listing(source: str, repo: str, revision: str) -> tuple[list[str], Path | None]:
    """The files of a repository; where the Hub is not to be had, those in the cache and the folder they lie in."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return [s.rfilename for s in HfApi().model_info(repo, revision=revision).siblings or ()], None
    except HfHubHTTPError as e:
        raise _said(e, source) from e
    except Exception as e:  # offline, by choice or not: whatever the HTTP client under the library raises
        if folder := _cached(repo, revision):
            return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()), folder
        raise _said(e, source) from e


def _cached(repo: str, revision: str) -> Path | None:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = [r for r in scan_cache_dir().repos if r.repo_id == repo and r.repo_type == "model"]
    except CacheNotFound:
        return None
    kept = {name: r.snapshot_path for each in found for r in each.revisions for name in (*r.refs, r.commit_hash)}
    return kept.get(revision)


def _downloaded(source: str, repo: str, revision: str, names: Sequence[str]) -> Path:
    """The cache's folder of the revision, named after its commit, with these files in it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(name) for name in names]))
    except Exception as e:  # of the library, or of the HTTP client under it
        raise _said(e, source) from e


def _said(error: BaseException, source: str) -> QuantkitError:
    """The library's error, or the cause under it that says more, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = [error]
    while causes[-1].__cause__ and len(causes) < 8:
        causes.append(causes[-1].__cause__)
    known: list[tuple[type[BaseException], str, str]] = [
        (GatedRepoError, "the repository is gated", "accept its terms on the Hub, then set HF_TOKEN"),
        (RevisionNotFoundError, "the repository has no such revision", "check what follows the @"),
        (
            RepositoryNotFoundError,
            "no such file here, and no such repository on the Hub",
            "check the name; for a private repository, set HF_TOKEN",
        ),
        (OfflineModeIsEnabled, "not in the cache, and HF_HUB_OFFLINE is set", "unset it to download"),
    ]
    for kind, what, hint in known:
        if any(isinstance(cause, kind) for cause in causes):
            return BadInput(what, where=source, hint=hint)
    status = next((c.response.status_code for c in causes if isinstance(c, HfHubHTTPError)), None)
    what = f"the Hub answers {status}" if status else f"the Hub cannot be reached ({type(causes[-1]).__name__})"
    return Resumable(what, where=source, hint="try again later, or give a local file")
