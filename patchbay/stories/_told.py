"""What the story of talking heads knows so far, from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import patchbay as pb
from patchbay.model.model import Model
from patchbay.results.result import Result
from patchbay.signal.channel import Channel
from patchbay.signal.port import Part
from patchbay.stories._lists import Lists
from patchbay.stories._turns import Search, Turn


@dataclass
class Told:
    """What is known so far."""

    model: Model
    lists: Lists
    seed: int
    n_found: int  # prompts that heads are found on, and looked at
    dev_right: Tensor = field(default_factory=lambda: torch.zeros(0))
    test_right: Tensor = field(default_factory=lambda: torch.zeros(0))
    movers: list[Part] = field(default_factory=list)
    inhibiting: list[Part] = field(default_factory=list)
    candidates: list[Channel] = field(default_factory=list)
    search: Search | None = None
    gate: Result | None = None
    knob: pb.Knob | None = None
    works: bool = False
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def turn(self) -> Turn:
        assert self.search is not None
        return self.search.turns[self.search.best]
