"""What `why` tells: sections, each a table with sentences and the numbers behind them, heard as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Values = dict[str, tuple[Any, tuple[str, ...], str]]
SHOWN = 12  # rows of a table


@dataclass
class Section:
    """One table of the answer; `values` and `coords` are what it adds to the Result."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    values: Values = field(default_factory=dict)
    coords: dict[str, Sequence[Any]] = field(default_factory=dict)


Listener = Callable[[Section], None]
HEARD: ContextVar[Listener] = ContextVar("listener of why", default=lambda section: None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, `listener` is given each section of `why` as soon as it is made."""
    token = HEARD.set(listener)
    try:
        yield
    finally:
        HEARD.reset(token)


def strongest(sizes: Tensor) -> list[int]:
    """Places from the largest on; NaN last."""
    return sizes.double().nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
