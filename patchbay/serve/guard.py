"""Who may ask, and how much: the one door of everything that answers over HTTP, the page as well as the server.

A `Guard` stands around an ASGI application. Before the application hears of a request:

    host      the Host header names this machine, so that no name of a stranger's that resolves to 127.0.0.1 gets through (DNS rebinding)
    origin    a page of another origin is refused, also where it opens a websocket; one that a cookie let in has to say its origin
    token     `Authorization: Bearer TOKEN`; or a cookie (HttpOnly, SameSite=Strict), given for a ticket that stands in the start
              address, works once, and is taken out of the address by a redirect
    body      read whole here, so that its size and the time that it may take are bounded

Every answer has a strict Content-Security-Policy, without inline scripts. An error of the application is a 500 with an id; what
happened stands under that id in the log, without the words of the error, which may hold a prompt. Refusals have the form of OpenAI's.

The port is not compared: a tunnel to this machine has another, and rebinding is about the name.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.exceptions import HTTPException

from patchbay.errors import PatchbayError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TICKET = "ticket"  # the parameter of a start address
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""What every answer has; an application that says one of them itself is left its own, but for the policy."""
SAFE = ("GET", "HEAD")
log = logging.getLogger("patchbay.serve")


@dataclass(frozen=True)
class Limits:
    """What one request may cost before it is understood. Sizes in bytes, times in seconds."""

    body: int = 1 << 20
    body_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.body < 1 or self.body_seconds <= 0:
            raise PatchbayError(f"{self}: each is above 0")


class Keys:
    """What lets a client in: a token that it sends itself, a cookie for a browser, and tickets for a browser's first look.

    A cookie is no token: what a browser keeps opens nothing after this process has ended. Cookies know no ports, so that its
    name is of this process.
    """

    def __init__(self, token: str | None = None) -> None:
        if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
            raise PatchbayError("a token of your own has 16 or more characters of ASCII, without spaces")
        self.token = token or secrets.token_urlsafe(24)
        self.cookie = secrets.token_urlsafe(24)
        self.cookie_name = f"patchbay-{secrets.token_hex(4)}"
        self._tickets: set[str] = set()

    def ticket(self) -> str:
        """A new ticket for one start address."""
        ticket = secrets.token_urlsafe(24)
        self._tickets.add(_digest(ticket))
        return ticket

    def redeem(self, ticket: str) -> bool:
        """Whether this is a ticket that nobody has used; it is used now."""
        known = _digest(ticket) in self._tickets
        self._tickets.discard(_digest(ticket))
        return known

    def bearer(self, header: str | None) -> bool:
        kind, _, given = (header or "").partition(" ")
        return kind.lower() == "bearer" and _same(given.strip(), self.token)

    def cookies(self, headers: Iterable[str]) -> bool:
        for header in headers:
            try:
                found = SimpleCookie(header).get(self.cookie_name)
            except CookieError:
                continue
            if found is not None and _same(found.value, self.cookie):
                return True
        return False

    def set_cookie(self) -> str:
        return f"{self.cookie_name}={self.cookie}; HttpOnly; SameSite=Strict; Path=/"


class Refusal(Exception):  # noqa: N818  no error of ours: it is what the client is told
    """A request that is answered with a status and a reason. `about`: the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        about: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.about, self.code, self.headers = status, message, about, code, headers or {}

    @property
    def body(self) -> bytes:
        """The answer, in the form that OpenAI's clients read."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        said = {"message": self.message, "type": kind, "param": self.about, "code": self.code}
        return json.dumps({"error": said}).encode()


@dataclass
class Guard:
    """The door around `app`, such as `Router(routes)`: Starlette's own application would answer errors before they come here.
    `hosts`: names beside this machine's own that it may be called by; `public`: paths that need no key."""

    app: App
    keys: Keys
    hosts: Iterable[str] = ()
    limits: Limits = field(default_factory=Limits)
    public: Iterable[str] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, message = True, {**message, "headers": _secured(message.get("headers", ()))}
            await send(message)

        try:
            head = _Head(scope)
            self._check_place(head)
            if await self._start(scope, head, sent):
                return
            if scope["path"] not in self.public:
                self._check_key(head, scope["method"])
            scope["app"] = self.app  # a path or method that is not there is raised, not answered
            await self.app(scope, await self._read(head, receive), sent)
        except (
            asyncio.CancelledError
        ):  # the server ends and waits no longer: no error of its own, and no trace in its log
            if not begun:
                await _answer(sent, Refusal(503, "the server ended", code="ending"))
        except Refusal as refusal:
            if not begun:
                await _answer(sent, refusal)
        except HTTPException as error:
            if not begun:
                await _answer(sent, Refusal(error.status_code, error.detail, headers=dict(error.headers or {})))
        except Exception as error:
            id = noted(error)
            if not begun:
                await _answer(sent, Refusal(500, f"an error of the server's own; in its log under {id}", code=id))

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            head = _Head(scope)
            self._check_place(head)
            self._check_key(head, "WEBSOCKET")
        except Refusal:
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
            return
        await self.app(scope, receive, send)

    # ---- checks ----

    def _check_place(self, head: _Head) -> None:
        """That this machine was meant, and that no page of another origin asks."""
        known = {*LOOPBACK, *(name.lower() for name in self.hosts)}
        if head.name not in known:
            raise Refusal(
                421, f"this is not {head.host!r}: it answers as {', '.join(sorted(known))}", code="wrong_host"
            )
        if head.origin is not None and head.origin not in (f"http://{head.host}", f"https://{head.host}"):
            raise Refusal(403, f"a page of {head.origin!r} may not ask here", code="wrong_origin")
        if head.one("sec-fetch-site") in ("cross-site", "same-site") and head.one("sec-fetch-mode") != "navigate":
            raise Refusal(403, "a page of another origin may not ask here", code="wrong_origin")

    def _check_key(self, head: _Head, method: str) -> None:
        if self.keys.bearer(head.one("authorization")):
            return
        if not self.keys.cookies(head.all("cookie")):
            message = "no valid key: send `Authorization: Bearer TOKEN` (OpenAI's clients: api_key), the token that was printed at the start"
            raise Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if method not in SAFE and head.origin is None:
            raise Refusal(403, "a browser that changes something says its origin", code="wrong_origin")

    async def _start(self, scope: Scope, head: _Head, send: Send) -> bool:
        """Whether this was a start address: its ticket is taken, a cookie given, and the browser sent on to the address without it."""
        query = scope.get("query_string", b"").decode("latin-1")
        if scope["method"] != "GET" or f"{TICKET}=" not in query:
            return False
        given = parse_qsl(query, keep_blank_values=True)
        ticket = next((value for name, value in given if name == TICKET), None)
        if ticket is None:
            return False
        rest = urlencode([pair for pair in given if pair[0] != TICKET])
        path = "/" + scope["path"].lstrip("/\\")  # "//host" would be another place
        there = {"location": urlencode({"": path}, safe="/")[1:] + (f"?{rest}" if rest else "")}
        if self.keys.redeem(ticket):
            there["set-cookie"] = self.keys.set_cookie()
        elif not self.keys.cookies(head.all("cookie")):
            message = "this start address was used, and works once: go on in the browser that used it, or start again for a new one"
            raise Refusal(401, message, code="used_ticket")
        await _send(send, 303, b"", there)
        return True

    async def _read(self, head: _Head, receive: Receive) -> Receive:
        """The body, read within its bounds; the application receives it in one piece, and later whether the client has left."""
        said = head.one("content-length") or ""
        if said.isdecimal() and (len(said) > 18 or int(said) > self.limits.body):
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._collect(receive), self.limits.body_seconds)
        except TimeoutError:
            message = f"the body did not arrive within {self.limits.body_seconds:g} s"
            raise Refusal(408, message, code="slow_request", headers={"connection": "close"}) from None
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    async def _collect(self, receive: Receive) -> bytes:
        found = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client left before its body had arrived")
            found += message.get("body", b"")
            if len(found) > self.limits.body:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(found)

    def _too_large(self) -> Refusal:
        message = f"the body is longer than {self.limits.body} bytes"
        return Refusal(413, message, code="body_too_large", headers={"connection": "close"})


class _Head:
    """Headers of a request. One that may come once and comes twice is refused: two readers could take different ones."""

    def __init__(self, scope: Scope) -> None:
        self.headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        self.host = (self.one("host") or "").lower()
        self.origin = self.one("origin")
        try:
            self.name = urlsplit(f"//{self.host}").hostname or ""
        except ValueError:
            self.name = ""
        if any(letter in self.host for letter in "@/\\?# "):
            self.name = ""

    def all(self, name: str) -> list[str]:
        return [value for found, value in self.headers if found == name]

    def one(self, name: str) -> str | None:
        found = self.all(name)
        if len(found) > 1:
            raise Refusal(400, f"the header {name} stands twice", code="bad_request")
        return found[0] if found else None


def read_json(body: bytes) -> Any:
    """A body as JSON: UTF-8, no number that is none (NaN), no half letter, no name twice, no deeper than Python reads. Raises Refusal."""
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        if b"\\ud" in body.lower():  # half a letter, written as \\ud83d without its other half, is no text
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {str(error)[:200]}", code="bad_json") from None


def inside(folder: str | Path, name: str) -> Path:
    """The path `name` in a folder. Raises PatchbayError for one that leads out of it, also by a link."""
    root = Path(folder).resolve()
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ":" in name:
        raise PatchbayError(f"{name!r} is no path inside {root}")
    found = (root / name).resolve()
    if found != root and root not in found.parents:
        raise PatchbayError(f"{name!r} leads out of {root}")
    return found


def noted(error: BaseException) -> str:
    """Log where an error came from, under a new id, which is returned; its words, which may hold a prompt, are left out."""
    id = secrets.token_hex(6)
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("error %s: %s\n%s", id, type(error).__name__, where)
    return id


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), known.encode())


def _secured(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-security-policy", b"server")]
    has = {name.lower().decode("latin-1") for name, _ in kept}
    return kept + [(name.encode(), value.encode()) for name, value in HEADERS.items() if name not in has]


async def _answer(send: Send, refusal: Refusal) -> None:
    await _send(send, refusal.status, refusal.body, {"content-type": "application/json"} | refusal.headers)


async def _send(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    lines = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    lines.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
