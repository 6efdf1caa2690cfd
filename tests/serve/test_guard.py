"""The door: each line of what it promises, asked of a real server over real sockets."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, Router

from patchbay.errors import PatchbayError
from patchbay.serve import listen
from patchbay.serve.guard import POLICY, Guard, Keys, Limits, Refusal, inside, read_json
from tests.serve.conftest import raw


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"got": len(await request.body()), "path": request.url.path, "query": str(request.url.query)})


async def fails(request: Request) -> None:
    raise RuntimeError(request.query_params["prompt"])


async def refuses(request: Request) -> None:
    raise Refusal(422, "not that", about="field")


async def endless(request: Request) -> StreamingResponse:
    async def many() -> Any:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0)

    return StreamingResponse(many())


async def loose(request: Request) -> PlainTextResponse:
    return PlainTextResponse("", headers={"content-security-policy": "default-src *", "cache-control": "max-age=5"})


ROUTES = [
    Route("/", echo, methods=["GET", "POST"]),
    Route("/fails", fails),
    Route("/refuses", refuses),
    Route("/endless", endless),
    Route("/loose", loose),
    Route("/open", echo),
]
KEYS = Keys()
BEARER = {"authorization": f"Bearer {KEYS.token}"}


@pytest.fixture(scope="module")
def door_of_all(listening: Callable[..., int]) -> Iterator[httpx.Client]:
    guarded = Guard(Router(ROUTES), KEYS, hosts=["model.lan"], limits=Limits(1000, 0.3), public=["/open"])
    with httpx.Client(base_url=f"http://127.0.0.1:{listening(guarded)}", trust_env=False) as client:
        yield client


@pytest.fixture
def door(door_of_all: httpx.Client) -> httpx.Client:
    door_of_all.cookies.clear()
    return door_of_all


def said(answer: httpx.Response) -> tuple[int, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def test_without_a_key_nothing_is_heard(door: httpx.Client) -> None:
    assert said(door.get("/")) == (401, "invalid_api_key")
    assert said(door.get("/", headers={"authorization": "Bearer wrong"})) == (401, "invalid_api_key")
    assert said(door.get("/", headers={"authorization": KEYS.token})) == (401, "invalid_api_key")
    assert said(door.get("/", headers={"cookie": f"{KEYS.cookie_name}={KEYS.token}"})) == (401, "invalid_api_key")
    assert said(door.get("/", headers={"authorization": f"Bearer {KEYS.cookie}"})) == (401, "invalid_api_key")
    assert door.get("/nowhere").status_code == 401  # what there is, is not told either
    assert door.get("/open").status_code == 200
    assert door.get("/", headers=BEARER).json()["path"] == "/"


def test_tokens_are_random_and_not_weak() -> None:
    assert len({Keys().token for _ in range(50)}) == 50
    assert len(Keys().token) >= 32
    for weak in ("short", "sixteen letters with space", "ü" * 20):
        with pytest.raises(PatchbayError, match="16 or more"):
            Keys(weak)


def test_a_start_address_lets_one_browser_in_once(door: httpx.Client) -> None:
    ticket = KEYS.ticket()
    answer = door.get(f"/?view=2&ticket={ticket}")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/?view=2"
    cookie = answer.headers["set-cookie"]
    assert re.fullmatch(rf"{KEYS.cookie_name}=[\w-]{{32}}; HttpOnly; SameSite=Strict; Path=/", cookie)
    assert KEYS.token not in str(answer.headers)
    assert ticket not in str(answer.headers)
    assert door.get("/").status_code == 200  # by the cookie, which the client keeps
    assert door.get(f"/?ticket={ticket}").status_code == 303  # it is in already
    door.cookies.clear()
    assert said(door.get(f"/?ticket={ticket}")) == (401, "used_ticket")
    assert said(door.get("/?ticket=guess")) == (401, "used_ticket")
    away = raw(
        int(door.base_url.port or 0),
        f"GET //evil.example/?ticket={KEYS.ticket()} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode(),
    )
    assert b"location: /evil.example/\r\n" in away


def test_a_browser_that_changes_something_says_its_origin(door: httpx.Client) -> None:
    door.get(f"/?ticket={KEYS.ticket()}")
    assert said(door.post("/", content="1")) == (403, "wrong_origin")
    assert door.post("/", content="1", headers={"origin": str(door.base_url).rstrip("/")}).json()["got"] == 1


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "a@127.0.0.1", "[::1", "localhost.", "127.0.0.1/x"]
)
def test_a_strange_host_is_refused(door: httpx.Client, host: str) -> None:
    head = f"GET / HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEYS.token}\r\nConnection: close\r\n\r\n"
    assert raw(int(door.base_url.port or 0), head.encode()).startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "[::1]:80", "127.0.0.1", "model.lan:8000"])
def test_own_names_are_known_through_any_port(door: httpx.Client, host: str) -> None:
    assert door.get("/", headers={**BEARER, "host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_a_page_of_another_origin_is_refused(door: httpx.Client, headers: dict[str, str]) -> None:
    assert said(door.get("/", headers=BEARER | headers)) == (403, "wrong_origin")


def test_a_websocket_has_the_same_door() -> None:
    """Asked without a socket: the server offers none, applications behind the door may."""
    opened: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        opened.append(scope["path"])

    def ask(**headers: str) -> list[Any]:
        sent: list[Any] = []
        lines = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "websocket", "path": "/", "headers": lines, "query_string": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(Guard(app, KEYS)(scope, None, send))
        return sent

    closed = [{"type": "websocket.close", "code": 1008}]
    mine = {"host": "127.0.0.1:1", "cookie": f"{KEYS.cookie_name}={KEYS.cookie}"}
    assert ask(host="127.0.0.1:1", origin="http://127.0.0.1:1") == closed
    assert ask(**mine, origin="http://evil.example") == closed
    assert ask(**mine) == closed
    assert opened == []
    assert ask(**mine, origin="http://127.0.0.1:1") == []
    assert ask(host="127.0.0.1:1", authorization=f"Bearer {KEYS.token}") == []
    assert opened == ["/", "/"]


def test_bodies_are_bounded_before_they_are_read(door: httpx.Client) -> None:
    assert door.post("/", headers=BEARER, content=b"x" * 1000).json()["got"] == 1000
    assert said(door.post("/", headers=BEARER, content=b"x" * 1001)) == (413, "body_too_large")
    chunks = (b"x" * 400 for _ in range(3))
    assert said(door.post("/", headers=BEARER, content=chunks)) == (413, "body_too_large")
    port, head = (
        int(door.base_url.port or 0),
        f"POST / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS.token}\r\n",
    )
    assert b" 413 " in raw(port, f"{head}Content-Length: {'9' * 15}\r\n\r\n".encode())[:40]


def test_a_slow_body_times_out(door: httpx.Client) -> None:
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS.token}\r\nContent-Length: 9\r\n\r\nabc"
    begun = time.monotonic()
    found = raw(int(door.base_url.port or 0), head.encode())
    assert found.startswith(b"HTTP/1.1 408")
    assert b"slow_request" in found
    assert 0.2 < time.monotonic() - begun < 3


def test_a_slow_head_times_out(listening: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen.Patient, "head_seconds", 0.2)
    port = listening(Guard(Router(ROUTES), KEYS, public=["/open"]))
    whole = b"GET /open HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for first, then in ((b"", b""), (b"GET / HT", b""), (whole, b"GET /op")):
        found = raw(port, first, 4.0, then)
        assert not found.endswith(b"<nothing more>"), first
        assert (b" 200 " in found) == (first == whole)


def test_a_client_that_does_not_read_is_let_go(listening: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(listen.Patient, "stalled_seconds", 0.2)
    port = listening(Guard(Router(ROUTES), KEYS))
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(f"GET /endless HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS.token}\r\n\r\n".encode())
        time.sleep(1.0)
        line.settimeout(5)
        end = time.monotonic() + 5
        try:
            while line.recv(1 << 20):
                assert time.monotonic() < end, "an answer that goes on for ever was not cut"
        except ConnectionResetError:
            pass


def test_an_error_shows_an_id_and_no_trace(door: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = door.get("/fails?prompt=secret", headers=BEARER)
    status, id = said(answer)
    assert status == 500
    assert re.fullmatch("[0-9a-f]{12}", id)
    assert id in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    assert id in caplog.text
    assert "RuntimeError" in caplog.text
    assert "test_guard.py" in caplog.text
    assert "secret" not in caplog.text
    assert said(door.get("/fails?prompt=secret", headers=BEARER))[1] != id


def test_a_refusal_of_the_application_has_openais_form(door: httpx.Client) -> None:
    answer = door.get("/refuses", headers=BEARER)
    assert answer.status_code == 422
    assert answer.json()["error"] == {
        "message": "not that",
        "type": "invalid_request_error",
        "param": "field",
        "code": None,
    }


def test_every_answer_has_the_headers(door: httpx.Client) -> None:
    for path, headers in [
        ("/", {}),
        ("/", BEARER),
        ("/fails?prompt=x", BEARER),
        ("/nowhere", BEARER),
        ("/loose", BEARER),
        ("/?ticket=x", {}),
    ]:
        answer = door.get(path, headers=headers)
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == ("max-age=5" if path == "/loose" else "no-store")
        assert "server" not in answer.headers
    assert "unsafe" not in POLICY
    assert "http" not in POLICY
    assert "default-src 'none'" in POLICY


def test_a_header_that_comes_twice_is_refused(door: httpx.Client) -> None:
    port = int(door.base_url.port or 0)
    head = "GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\nConnection: close\r\n\r\n"
    assert raw(port, head.encode()).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff{}",
        b'{"a":NaN}',
        b'{"a":1,"a":2}',
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"a":-Infinity}',
        b'{"a":"\\uD83D"}',
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal, match="no JSON"):
        read_json(body)


def test_json_is_read() -> None:
    assert read_json(b'"\\uD83D\\uDE00"') == "\U0001f600"
    assert read_json('{"a": [1, 2.5, "ü", null]}'.encode()) == json.loads('{"a": [1, 2.5, "\\u00fc", null]}')


def test_a_path_stays_in_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "results"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "far").symlink_to(tmp_path, target_is_directory=True)
    (root / "near").symlink_to(root / "deep")
    assert inside(root, "deep/new") == (root / "deep" / "new").resolve()
    assert inside(root, "near") == (root / "deep").resolve()
    for out in (
        "..",
        "../secret",
        "deep/../../secret",
        "link",
        "far/secret",
        str(tmp_path / "secret"),
        "",
        "a\0b",
        "..\\secret",
        "C:x",
    ):
        with pytest.raises(PatchbayError, match="no path inside|leads out"):
            inside(root, out)


def test_other_machines_are_let_in_only_when_told() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "model.lan"):
        with pytest.raises(PatchbayError, match="--unsafe-listen"):
            listen.bound(host, 0)
    with listen.bound("0.0.0.0", 0, unsafe=True) as at:
        assert at.getsockname()[0] == "0.0.0.0"
        assert listen.address(at).startswith("http://127.0.0.1:")
    with listen.bound("127.0.0.1", 0) as at:
        with pytest.raises(PatchbayError, match="the port is taken"):
            listen.bound("127.0.0.1", at.getsockname()[1])
        keys = Keys()
        start = listen.address(at, "/page", keys)
        assert keys.token not in start
        assert keys.redeem(start.partition("?ticket=")[2])


def test_what_the_end_of_the_server_cuts_off_is_told_so_and_leaves_no_trace() -> None:
    """uvicorn cancels what still runs when its patience is over: an answer that has not begun is a 503, and nothing is raised."""
    said: list[Any] = []

    async def forever(request: Request) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        guard = Guard(Router([Route("/", forever)]), KEYS)
        head = [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {KEYS.token}".encode())]
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": head,
            "query_string": b"",
            "server": ("127.0.0.1", 80),
            "root_path": "",
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            said.append(message)

        running = asyncio.ensure_future(guard(scope, receive, send))
        await asyncio.sleep(0.05)
        running.cancel()
        await running

    asyncio.run(main())
    assert said[0]["status"] == 503
    assert b"the server ended" in said[1]["body"]
