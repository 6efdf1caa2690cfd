"""Where a server listens and how it ends: this machine alone unless told otherwise, and not longer for slow clients than is said.

uvicorn serves. It has no patience of its own with heads that trickle in and with answers that nobody reads: `Patient` ends such
connections. A first SIGINT or SIGTERM lets running requests end while new ones are refused; a second one ends them too.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from patchbay.errors import PatchbayError
from patchbay.serve.guard import LOOPBACK, TICKET, Keys

HEAD_SECONDS = 10.0  # from the first byte of a request, or from the connection, to the end of its headers
STALLED_SECONDS = 30.0  # that an answer waits to be read
HEAD_BYTES = 16_384
CONNECTIONS = 256


class Patient(H11Protocol):
    """uvicorn's HTTP protocol, with an end to its patience."""

    head_seconds, stalled_seconds = HEAD_SECONDS, STALLED_SECONDS
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def on_response_complete(self) -> None:
        self._head = _cancelled(self._head)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stalled = _cancelled(self._head), _cancelled(self._stalled)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer, in the place of one that is over."""
    if timer is not None:
        timer.cancel()
    return None


class Server(uvicorn.Server):
    """uvicorn's server, that ends in two steps. `drain`: told to take no more; `idle`: whether nothing runs any longer."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None], idle: Callable[[], bool]) -> None:
        super().__init__(config)
        self.drain, self.idle, self.ending = drain, idle, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.ending:
            self.should_exit = self.force_exit = True
        self.ending = True
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.ending and self.idle():
            self.should_exit = True
        return await super().on_tick(counter)


def bound(host: str, port: int, *, unsafe: bool = False) -> socket.socket:
    """A socket that listens at an address of this machine; others are refused unless `unsafe`. Port 0 takes a free one."""
    if not unsafe and not loopback(host):
        raise PatchbayError(
            f"host {host!r} lets other machines in: anybody who has the token may run this model, unencrypted; "
            "say --unsafe-listen if that is meant, or tunnel (ssh -L) to 127.0.0.1"
        )
    listening = None
    try:
        [(family, kind, _, _, place), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(128)
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        why = "the port is taken; say another, or 0 for a free one" if taken else str(error)
        raise PatchbayError(f"{host}:{port} cannot be listened at: {why}") from error
    return listening


def loopback(host: str) -> bool:
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(listening: socket.socket, path: str = "/", keys: Keys | None = None) -> str:
    """The address to give to a browser or a client; with `keys` a start address, with a ticket that lets one browser in."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}{path}" + (f"?{TICKET}={keys.ticket()}" if keys is not None else "")


def server(
    app: Any,
    *,
    drain: Callable[[], None] = lambda: None,
    idle: Callable[[], bool] = lambda: True,
    connections: int = CONNECTIONS,
) -> Server:
    """What runs an application: `server(app).run([bound("127.0.0.1", 0)])`."""
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=5,
    )
    return Server(config, drain, idle)
