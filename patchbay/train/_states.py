"""States of optimisers: in float32 where weights are narrower, and the same bits again after a checkpoint, whatever dtype weights have."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's state, counts of steps aside."""
    states = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    ]
    return sum(value.numel() * value.element_size() for value in states)


def wide(x: Tensor) -> Tensor:
    """In float32 where it is narrower."""
    return x if x.element_size() >= 4 else x.float()


class Resumed(torch.optim.Optimizer):
    """An optimiser whose loaded state has the dtypes that it was saved with; torch's own gives it those of the weights, which loses bits of half precision. What a step does is `move`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; the loss of a closure, which is asked first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move()
        return loss

    def move(self) -> None:
        """Move the parameters by their gradients."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and then each tensor as it was saved."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, own, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().clone().to(self.state[p][name].device)
