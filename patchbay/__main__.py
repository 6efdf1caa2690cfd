"""`python -m patchbay` is the command `patchbay`."""

from patchbay.cli import main

main()
