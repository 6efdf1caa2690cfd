"""A model, a task and a method small enough to see through."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch

from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part


class Model:
    """One linear layer behind the attributes that a method's record reads."""

    def __init__(self, seed: int = 0, source: str = "fake") -> None:
        self.hf = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout())
        with torch.no_grad():
            self.hf[0].weight.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)))
        self.hf.eval()
        self.source, self.family, self.tokenizer = source, SimpleNamespace(name="linear"), None

    @property
    def fingerprint(self) -> str:
        return f"{self.hf[0].weight.sum().item():.9f}"


class Task:
    def __init__(self, size: int) -> None:
        self.size = size

    def to_json(self) -> dict:
        return {"name": "ones", "options": {"size": self.size}, "seed": 7}

    @classmethod
    def from_json(cls, record: dict) -> Task:
        return cls(record["options"]["size"])


def weights(
    model: Model, task: Task, *, scale: float = 1.0, parts: Sequence[Part | str] | None = None, seed: int = 0
) -> Result:
    """Weights times the task's size, plus seeded noise."""
    noise = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed))
    values = model.hf[0].weight * task.size * scale + noise
    return Result(values, unit="logits", notes=[type(part).__name__ for part in parts or ()])


@pytest.fixture
def installed(monkeypatch):
    """`weights` as the method find.weights of the package, and fakes for what a replay loads."""

    def install(function=weights, name="weights"):
        function = method(paper="nobody2020")(function) if function is weights else function
        module = ModuleType(f"patchbay.find.{name}")
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return function

    monkeypatch.setattr(weights, "__module__", "patchbay.find.weights")
    return install
