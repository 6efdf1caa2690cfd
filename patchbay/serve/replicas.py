"""The same application behind Ray Serve: as many copies of the model as are asked, on one machine or many.

Replicas, routing and restarts are Ray's. What differs from one process: the bounds (rows, waiting requests, `/metrics`) are each replica's,
and Ray's own proxy stands before the door, so that slow heads are its matter.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from patchbay.errors import PatchbayError
from patchbay.serve.guard import Keys
from patchbay.serve.listen import loopback
from patchbay.serve.run import TOKEN, Settings, application, logged


def ray_serve() -> Any:
    """Ray Serve. Raises PatchbayError where it, or what it needs, is not installed."""
    try:
        import ray.serve
    except ImportError as error:
        raise PatchbayError(
            f"--replicas runs behind Ray Serve, which is not whole here ({error}): pip install 'patchbay-lm[replicas]'; without --replicas "
            "one process serves"
        ) from error
    return ray.serve


class Replica:
    """One copy of the model, in a process of Ray's."""

    def __init__(self, source: str, options: Mapping[str, Any], settings: Settings, token: str) -> None:
        import patchbay as pb

        logged()
        self.guard, self.engine, _ = application(pb.load(source, **options), settings, Keys(token))
        self.engine.start()

    def __serve_build_asgi_app__(self) -> Any:
        return self.guard

    def __del__(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()


def run_replicas(
    source: str,
    options: Mapping[str, Any],
    settings: Settings,
    n: int,
    say: Callable[[str], Any] = print,
    *,
    wait: bool = True,
) -> Keys:
    """Serve `n` copies until stopped; returns at once without `wait`."""
    serve, keys = ray_serve(), Keys(os.environ.get(TOKEN) or None)
    if not settings.unsafe and not loopback(settings.host):
        raise PatchbayError(f"host {settings.host!r} lets other machines in; say --unsafe-listen if that is meant")
    serve.start(http_options={"host": settings.host, "port": settings.port})
    most = settings.room.rows + settings.room.queue
    deployed = serve.deployment(num_replicas=n, max_ongoing_requests=most)(serve.ingress()(Replica))
    serve.run(deployed.bind(source, dict(options), settings, keys.token), name="patchbay", route_prefix="/")
    say(f"export OPENAI_BASE_URL=http://{settings.host}:{settings.port}/v1 OPENAI_API_KEY={keys.token}")
    if wait:
        try:
            signal.pause()
        finally:
            serve.shutdown()
    return keys
