"""Objectives: what a document becomes, and what is minimised. One file is one objective; its name is the file's.

An objective is written as text, `NAME` or `NAME:key=value,key=value`; the keys are the fields of its class. One table lists them.
A document is a list of units, each a list of token ids; most objectives read the units one after another.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from patchbay.signal.port import PatchbayError, suggest
from patchbay.train._objectives import (
    cloned,
    impossible,
    infill,
    inverse_rl,
    langsamp,
    multi_exit,
    ntp,
    self_evolution,
    spt,
    transfer,
    translico,
)
from patchbay.train._objectives._objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    file.__name__.rpartition(".")[2].replace("_", "-"): file.OBJECTIVE
    for file in (
        cloned,
        impossible,
        infill,
        inverse_rl,
        langsamp,
        multi_exit,
        ntp,
        self_evolution,
        spt,
        transfer,
        translico,
    )
}


def names() -> list[str]:
    """The objectives that there are, as they are written."""
    return sorted(OBJECTIVES)


def objective(text: str) -> Objective:
    """The objective that a text names, with its settings."""
    name, _, rest = text.partition(":")
    name = name.strip().replace("_", "-")
    if name not in names():
        raise PatchbayError(f"no objective {name!r}; objectives are {', '.join(names())}{suggest(name, names())}")
    made = OBJECTIVES[name]
    known: dict[str, Any] = {field.name: type(field.default) for field in fields(made)}
    given = {}
    for piece in filter(None, rest.split(",")):
        key, _, value = piece.partition("=")
        if key.strip() not in known:
            has = ", ".join(known) or "none"
            raise PatchbayError(f"objective {name} has no setting {key!r}; its settings are {has}")
        kind = known[key.strip()]
        try:
            given[key.strip()] = kind(value.strip())
        except ValueError:
            raise PatchbayError(f"objective {name}: {piece!r}; {key} is written as {kind.__name__}") from None
    found = made(**given)
    found.check()
    return found
