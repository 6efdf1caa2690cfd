"""What waits for the model: a run of a method, from its form to its Result, and a look, which somebody waits for."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OPEN = ("queued", "running", "stopping")  # states of a run that has not ended
TOLD = (
    "id",
    "room",
    "method",
    "name",
    "state",
    "done",
    "total",
    "estimate",
    "message",
    "command",
    "given",
    "result",
    "drawn",
)


@dataclass
class Run:
    """One call of a method, or of a paper's claim (room "papers")."""

    room: str
    method: str
    given: dict[str, Any]
    words: list[str]
    name: str
    command: str
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    state: str = "queued"  # running, stopping, done, failed, cancelled
    done: int = 0
    total: int = 0
    estimate: str = ""
    message: str = ""
    result: str | None = None
    partial: dict[str, Any] | None = None  # what its sweep has found so far, as a map; `drawn` counts its states
    drawn: int = 0
    began: float | None = None
    ended: float | None = None

    def told(self) -> dict[str, Any]:
        end = time.monotonic() if self.ended is None else self.ended
        seconds = 0.0 if self.began is None else round(end - self.began, 1)
        return {key: getattr(self, key) for key in TOLD} | {"seconds": seconds}


@dataclass
class Look:
    """A question about the model. What is heard of it: pieces as they come, then its answer or why there is none."""

    what: str
    asked: Mapping[str, Any]
    heard: asyncio.Queue[Mapping[str, Any]] = field(default_factory=asyncio.Queue)
    id: str = field(default_factory=lambda: secrets.token_hex(6))
