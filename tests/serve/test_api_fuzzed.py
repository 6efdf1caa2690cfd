"""Hostile and malformed bodies: no 500, no crash, no word of one request in another's answer, and a plain request says afterwards
what it said before. 200 over HTTP; 10,000, several at once, handed to the application itself, most of which never reach the model."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import patchbay as pb
from patchbay.serve.api import Api
from patchbay.serve.engine import Engine, Room
from patchbay.serve.guard import Guard, Keys
from patchbay.serve.named import Named

N, MANY, AT_ONCE = 200, 10_000, 8
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1e308, -1e308, 10**40, "", "x", "The capital of", "\x00", "🙂", "a" * 3000, [], {}, [[]], [None], [1, 2, 3], [0, 10**9],
    [-5], ["a", 1], {"a": 1}, [{"role": "user", "content": "x"}], [{"role": 3}], "tiny+text@2", "tiny+text@1e9", "tiny+text@-3+text@4", "tiny+", "tiny+text@1e-400",
    {"knobs": [{"name": "text", "strength": 3}]}, {"knobs": [{"name": "nobody"}]}, {"include_usage": True}, {"5": 3}, {"type": "text"}, ["stop"] * 3,
]  # fmt: skip
FIELDS = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stream", "stream_options", "logprobs", "echo", "stop",
          "seed", "logit_bias", "presence_penalty", "frequency_penalty", "best_of", "patchbay", "user", "tools", "response_format", "top_logprobs", "unknown"]  # fmt: skip
STATUSES = {200, 400, 404, 405, 408, 413, 421, 429}


@pytest.fixture(scope="module")
def asked(listening: Callable[..., int]) -> Iterator[tuple[Engine, httpx.Client]]:
    model = pb.load("tiny")
    engine, keys = Engine(model, Room(batch_tokens=512, rows=8)).start(), Keys()
    named = Named(model, "tiny", {"text": pb.turn.scale("L1.H1", 0.0)})
    port = listening(Guard(Api(engine, named).router(), keys))
    head = {"authorization": f"Bearer {keys.token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=head, trust_env=False, timeout=60) as client:
        yield engine, client
    engine.close()


def body(rng: random.Random, own: str = "x", least: int = 0) -> bytes:
    """A good request with `least` to 4 fields replaced by anything, `own` among it, or bytes that are damaged."""
    made: dict[str, Any] = {"model": "tiny", "prompt": "The capital", "max_tokens": rng.randint(0, 4)}
    for _ in range(rng.randint(least, 4)):
        made[rng.choice(FIELDS)] = rng.choice([*VALUES, own, own, [own], {own: own}])
    if rng.random() < 0.2:
        made.pop(rng.choice(list(made)))
    data = bytearray(json.dumps(made).encode())
    kind = rng.random()
    if kind < 0.15:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind < 0.2:
        del data[rng.randrange(len(data)) :]
    elif kind < 0.22:
        data = bytearray(b"[" * rng.randint(1, 5000))
    return bytes(data)


def test_fuzzed_requests(asked: tuple[Engine, httpx.Client]) -> None:
    engine, client = asked
    plain = {"model": "tiny", "prompt": "The capital of Lolavia is", "max_tokens": 4, "temperature": 0}
    before = client.post("/v1/completions", json=plain).json()["choices"]
    rng, seen = random.Random(0), dict[int, int]()
    for _ in range(N):
        path = rng.choice(["/v1/completions"] * 3 + ["/v1/chat/completions"])
        answer = client.post(
            path,
            content=body(rng),
            headers={"content-type": rng.choice(["application/json", "text/plain", "nonsense"])},
        )
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code in STATUSES, (answer.request.content, answer.text)
        assert "Traceback" not in answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        elif "data: " in answer.text:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "server_error" not in answer.text
    assert seen[200] > N // 20
    assert seen[400] > N // 5
    assert engine.counts.failures == 0
    assert engine.thread.is_alive()
    assert client.post("/v1/completions", json=plain).json()["choices"] == before


async def ask(app: Any, path: str, head: dict[str, str], sent: bytes) -> tuple[int, str]:
    """Status and text of one request, handed to an ASGI application."""
    pieces, found, status = [sent[: len(sent) // 2], sent[len(sent) // 2 :]], bytearray(), 0

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        found.extend(message.get("body", b""))

    lines = [(name.encode(), value.encode()) for name, value in head.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": lines, "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
    await app(scope, receive, send)
    return status, found.decode()


def resident() -> float:
    """Megabytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.slow
def test_ten_thousand_fuzzed_requests(caplog: pytest.LogCaptureFixture) -> None:
    """No 500 at all, so none without an id; no crash; no leak, of words or of memory."""
    caplog.set_level(logging.ERROR)  # a line for each request would be what grows
    engine, keys = Engine(pb.load("tiny"), Room(batch_tokens=512, rows=8)).start(), Keys()
    api = Api(engine, Named(engine.model, "tiny", {"text": pb.turn.scale("L1.H1", 0.0)}))
    app, head = Guard(api.router(), keys), {"authorization": f"Bearer {keys.token}", "host": "localhost"}
    rng, seen, sizes = random.Random(1), Counter[int](), list[tuple[float, int]]()

    async def plain() -> list[Any]:
        given = {"prompt": "The capital of Lolavia is", "max_tokens": 4, "temperature": 0}
        sent = [json.dumps(given | {"model": model}).encode() for model in ("tiny", "tiny+text")]
        answers = [await ask(app, "/v1/completions", head, one) for one in sent]
        return [json.loads(text)["choices"] for _, text in answers]

    async def one(i: int) -> None:
        path = rng.choice(["/v1/completions"] * 3 + ["/v1/chat/completions"])
        sent = body(rng, f"mark{i}mark", 0 if i % 5 else 1)
        status, text = await ask(app, path, head | {"content-type": rng.choice(["application/json", "nonsense"])}, sent)
        seen[status] += 1
        assert status in STATUSES, (sent, text)
        assert "server_error" not in text, (sent, text)
        assert "Traceback" not in text
        assert set(re.findall(r"mark(\d+)mark", text)) <= {str(i)}, "another's words"
        assert status == 200 or json.loads(text)["error"]["message"]

    async def all_of_them() -> None:
        before = await plain()
        for at in range(0, MANY, AT_ONCE):
            await asyncio.gather(*(one(i) for i in range(at, at + AT_ONCE)))
            if at % 2000 == 0:
                assert await plain() == before
                gc.collect()
                sizes.append((resident(), sum(isinstance(held, torch.Tensor) for held in gc.get_objects())))
        assert await plain() == before

    try:
        asyncio.run(all_of_them())
    finally:
        engine.close()
    print(f"\n{MANY} requests: {dict(seen)}; memory and tensors {sizes}")
    assert sum(seen.values()) == MANY
    assert seen[200] > MANY // 20
    assert seen[400] > MANY // 5
    assert engine.counts.failures == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert engine.idle
    assert not engine.joined.texts
    assert sizes[-1][0] < 1.05 * sizes[1][0] + 8, "memory grows with requests"
    assert sizes[-1][1] < sizes[1][1] + 60, "tensors stay"  # a few are those of the last answer
