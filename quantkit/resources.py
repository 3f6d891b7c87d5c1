"""The data folders that ship with quantkit, `recipes/` and `calibration/`, found in a checkout and in an install alike.

In the repository they lie at the top level, beside the package; the wheel carries them inside it, as `quantkit/_data/`
(the force-include table of pyproject.toml). A package called `recipes` may well lie beside an installed quantkit, so
the inner place is looked at first, and the outer one only where there is no inner one.
"""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import QuantkitError

PACKAGE = Path(__file__).resolve().parent


def resource(kind: str, *parts: str) -> Path:
    """The path of a shipped folder, or of a file in it: `resource("calibration", "eval", "demo.txt")`.

    `kind` is "recipes" or "calibration". Raises QuantkitError where nothing is there: the installation is incomplete.
    """
    installed = PACKAGE / "_data"
    path = (installed if installed.is_dir() else PACKAGE.parent).joinpath(kind, *parts)
    if not path.exists():
        raise QuantkitError(
            "this file should have come with quantkit and is not there",
            where=path,
            hint="reinstall: pip install --force-reinstall gguf-quantkit",
        )
    return path
