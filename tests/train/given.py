"""What tests of trainings are given: a trainer that trains nothing, for tests of what stands around it."""

from __future__ import annotations

from typing import Any

from patchbay.model.model import Model
from patchbay.train._plan import Plan
from patchbay.train._trainer import Trained


def untrained(model: Model, rows: Any, arm: Any, plan: Plan, place: Any, *, keep: bool, watch: Any = None) -> Trained:
    """In place of `train._trainer.trained`: the losses of no step, and what is watched as often as it would be."""
    seen = [] if watch is None else [watch[1](model)] * -(-plan.steps // watch[0])
    return Trained([0.0] * plan.steps, seen, 0)
