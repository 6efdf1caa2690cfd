"""`python -m patchbay` is the command `patchbay`."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    try:
        from patchbay.cli import main as run
    except KeyboardInterrupt:  # before there is a command to answer it
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
