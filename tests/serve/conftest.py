"""Applications that listen on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from patchbay.serve import listen


@pytest.fixture(scope="module")
def listening() -> Iterator[Callable[..., int]]:
    """`listening(app)` runs an application until the file's tests end, and returns its port."""
    servers: list[tuple[listen.Server, threading.Thread]] = []

    def start(app: Any, **options: Any) -> int:
        at = listen.bound("127.0.0.1", 0)
        server = listen.server(app, **options)
        server.capture_signals = _nothing  # type: ignore[method-assign]  # signals are the main thread's
        thread = threading.Thread(target=server.run, args=([at],), daemon=True)
        thread.start()
        until = time.monotonic() + 20
        while not server.started and time.monotonic() < until:
            time.sleep(0.005)
        servers.append((server, thread))
        return int(at.getsockname()[1])

    yield start
    for server, thread in servers:
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def raw(port: int, sent: bytes, seconds: float = 5.0, then: bytes = b"") -> bytes:
    """What comes back to bytes (and to those of `then`, a little later), until the server closes the connection or nothing comes for `seconds`."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
        line.sendall(sent)
        found = b""
        if then:
            found += line.recv(65536)
            line.sendall(then)
        try:
            while part := line.recv(65536):
                found += part
        except TimeoutError:
            found += b"<nothing more>"
        except ConnectionResetError:
            found += b"<reset>"
        return found
