"""A model served until it is stopped: what `patchbay serve` does once the model is loaded."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchbay.model.model import Model
from patchbay.serve.api import Api
from patchbay.serve.engine import Engine, Room
from patchbay.serve.guard import Guard, Keys, Limits
from patchbay.serve.joined import joins
from patchbay.serve.listen import address, bound, loopback, server
from patchbay.serve.named import Named, knobs_of

TOKEN = (
    "PATCHBAY_TOKEN"  # the variable that holds a token of one's own; an option would show it to all who list processes
)
PUBLIC = ("/healthz",)


@dataclass(frozen=True)
class Settings:
    """How a model is served. `hosts`: names beside this machine's own that clients call it by."""

    name: str
    knobs: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    unsafe: bool = False
    hosts: Sequence[str] = ()
    room: Room = field(default_factory=Room)
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False


def application(model: Model, settings: Settings, keys: Keys) -> tuple[Guard, Engine, Named]:
    """The application behind its door, its engine (not yet started) and what it offers."""
    named = Named(model, settings.name, knobs_of(settings.knobs, model) if settings.knobs else {})
    engine = Engine(model, settings.room)
    joins(model)  # asked now, not by the first request
    hosts = settings.hosts if loopback(settings.host) else (*settings.hosts, settings.host)
    guard = Guard(Api(engine, named, log_prompts=settings.log_prompts).router(), keys, hosts, settings.limits, PUBLIC)
    return guard, engine, named


def run(model: Model, settings: Settings, say: Callable[[str], Any] = print) -> None:
    """Serve until SIGINT or SIGTERM; running requests end, new ones are refused with 503, a second signal ends them too."""
    keys = Keys(os.environ.get(TOKEN) or None)
    with bound(settings.host, settings.port, unsafe=settings.unsafe) as listening:
        guard, engine, named = application(model, settings, keys)
        logged()
        say("\n".join(started(named, address(listening, "/v1"), keys)))
        engine.start()
        try:
            server(guard, drain=engine.drain, idle=lambda: engine.idle).run([listening])
        finally:
            engine.close()


def started(named: Named, where: str, keys: Keys) -> list[str]:
    """What is told at the start: what is served, and the two variables that OpenAI's clients read."""
    knobs = f" with the knobs {', '.join(named.knobs)}" if named.knobs else ""
    way = {"": "; its texts run one by one", "whole": "", "chunks": ""}[joins(named.model)]
    lines = [f"{named.name}{knobs}{way}", f"export OPENAI_BASE_URL={where} OPENAI_API_KEY={keys.token}"]
    return [
        *lines,
        f"such as model={named.name + ''.join(f'+{name}' for name in list(named.knobs)[:1])!r}; Ctrl-C ends",
    ]


def logged() -> None:
    """The log, one line for each request, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    log = logging.getLogger("patchbay")
    if not log.handlers:
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def name_of(source: str) -> str:
    """The name under which a model is served where none is said: the last part of where it came from."""
    return re.sub(r"[^\w.-]", "-", Path(source).name) or "model"
