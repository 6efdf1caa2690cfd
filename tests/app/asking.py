"""An ASGI application asked directly, without a socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlencode

BEARER = "a-token-of-the-tests"


def ask(
    app: Any, path: str, *, body: Any = None, method: str | None = None, key: bool = True, **query: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request."""
    return asyncio.run(asked(app, path, body=body, method=method, key=key, **query))


async def asked(
    app: Any, path: str, *, body: Any = None, method: str | None = None, key: bool = True, **query: str
) -> tuple[int, dict[str, str], bytes]:
    sent: list[dict[str, Any]] = []
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [(b"host", b"127.0.0.1"), (b"content-length", str(len(data)).encode())]
    headers += [(b"authorization", f"Bearer {BEARER}".encode())] if key else []
    scope = {
        "type": "http", "http_version": "1.1", "method": method or ("GET" if body is None else "POST"), "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": urlencode(query).encode(), "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": "",
    }  # fmt: skip
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            await asyncio.sleep(60)
        given = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = sent[0]
    head = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
    return start["status"], head, b"".join(message.get("body", b"") for message in sent[1:])
