"""`quantkit`, and `python -m quantkit`. To import the command line takes long enough to be interrupted."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from quantkit.cli import main as run
    except KeyboardInterrupt:
        sys.exit("quantkit: interrupted; nothing had begun")
    run()


if __name__ == "__main__":
    main()
