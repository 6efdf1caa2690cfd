"""Grids of tests: a share of their cells in `make test`, all of them in `make test-all`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

WHOLE = bool(os.environ.get("PATCHBAY_EVERYWHERE"))


def by_turns(*axes: Iterable[Any], of: int, start: int = 0) -> list[Any]:
    """One in `of` of the cells of a grid, on its diagonals, so that every entry of every axis that is long enough has its turn.

    A single axis gives its entries, several give tuples. `start`: which entry is the first, so that two files take others.
    """
    cells = [list(zip(*cell, strict=True)) for cell in itertools.product(*(enumerate(axis) for axis in axes))]
    taken = [values for places, values in cells if WHOLE or sum(places) % of == start % of]
    return [values[0] for values in taken] if len(axes) == 1 else taken
