"""Objectives: what a document becomes, and what is minimised. One file is one objective; its name is the file's.

An objective is written as text, `NAME` or `NAME:key=value,key=value`; the keys are the fields of its class. One table lists them.
A document is a list of units, each a list of token ids; most objectives read the units one after another.
"""

from __future__ import annotations

from patchbay.signal.port import PatchbayError, suggest
from patchbay.train._objectives import (
    bico,
    cloned,
    fine_grained,
    impossible,
    infill,
    inverse_rl,
    label_supervision,
    langsamp,
    multi_exit,
    ntp,
    pinto,
    sami,
    self_evolution,
    spt,
    supernet,
    transfer,
    translico,
)
from patchbay.train._objectives._objective import Objective
from patchbay.train._written import made

OBJECTIVES: dict[str, type[Objective]] = {
    file.__name__.rpartition(".")[2].replace("_", "-"): file.OBJECTIVE
    for file in (
        bico,
        cloned,
        fine_grained,
        impossible,
        infill,
        inverse_rl,
        label_supervision,
        langsamp,
        multi_exit,
        ntp,
        pinto,
        sami,
        self_evolution,
        spt,
        supernet,
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
    return made("objective", f"{name}:{rest}", OBJECTIVES[name])
