"""The layers of docs/architecture.md, held against the imports as they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "quantkit"

# What each part may import of the others, besides itself. `errors` and `later` are open to all.
ALLOWED = {
    "errors": set(),
    "later": set(),
    "resources": set(),
    "codecs": set(),
    "gram": set(),
    "stats": {"codecs", "gram"},
    "arch": set(),
    "files": {"codecs"},
    "chat": set(),
    "corpus": {"arch", "chat"},
    "texts": {"corpus", "resources"},
    "overlap": {"corpus"},
    "solvers": {"codecs", "stats"},
    "model": {"arch", "chat", "codecs", "files"},
    "attention": {"hardware"},
    "forward": {"attention", "codecs", "model", "hardware", "stats"},
    "activations": {"model", "stats"},
    "evaluate": {"forward"},
    "cache": {"files", "model"},
    "llamacpp": set(),
    "scoring": {"arch", "cache", "corpus", "evaluate", "files", "forward", "llamacpp", "model", "texts"},
    "compare": {"evaluate", "model"},
    "tasks": {"forward", "model", "scoring"},
    "plots": {"compare", "files"},
    "page": {"compare", "files", "plots"},
    "prefix": {"activations", "codecs", "forward", "model", "solvers", "stats"},
    "targets": {"model", "arch", "codecs", "files", "solvers", "stats"},
    "recipe": {"hardware", "resources", "codecs", "targets"},
    "importance": {"activations", "files", "forward", "model", "stats", "targets", "walk"},
    "plan": {"activations", "codecs", "targets", "model", "recipe", "evaluate", "forward", "prefix", "solvers"}
    | {"sensitivity", "stats"},
    "journal": {"cache", "files", "model", "targets"},
    "verify": {"targets", "model", "codecs", "files"},
    "walk": {"activations", "codecs", "forward", "model", "prefix", "stats", "targets"},
    "seal": {"targets", "model", "codecs", "files", "verify"},
    "events": {"evaluate", "targets"},
    "product": {"events", "files", "forward", "journal", "model", "prefix", "seal", "targets", "verify", "walk"},
    "convert": {"plan", "targets", "model", "files", "forward", "evaluate", "stats", "corpus", "events", "importance"}
    | {"journal", "prefix", "product", "sensitivity", "walk"},
    "selfcal": {"cache", "forward", "model", "corpus", "files"},
    "hardware": set(),
    "memory": {"model", "targets"},
    "advise": {"hardware", "memory", "model"},
    "sensitivity": {"activations", "forward", "stats"},
    "fit": {"forward", "sensitivity"},
    "fit_plots": {"fit", "plots"},
    "fit_types": {"codecs", "files", "fit", "forward", "model", "sensitivity", "solvers", "targets"},
    "sizing": {"events", "fit", "fit_types", "forward", "model", "recipe", "sensitivity", "targets"},
    "report": {"cache", "corpus", "events", "evaluate", "model", "recipe", "targets"},
}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """The parts of quantkit that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" if node.module == "quantkit" else node.module for a in node.names]
        found |= {part(n) for n in names if n.split(".")[0] == "quantkit"}
    return found - {""}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in ("cli", "__init__", "__main__"):  # the top: they may import everything
        return
    assert imports(path) <= ALLOWED[own] | {own, "errors", "later"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_slow_to_import_waits_until_it_is_used(path):
    if path.name == "later.py":  # where torch comes from
        return
    nodes = ast.parse(path.read_text()).body
    named = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    named |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    assert not {name.split(".")[0] for name in named} & {"torch", "transformers", "matplotlib"}


def test_only_the_command_line_prints():
    for path in PACKAGE.rglob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printing = any(isinstance(f, ast.Name) and f.id == "print" for f in calls)
        assert not printing or path.parent.name == "cli", path
