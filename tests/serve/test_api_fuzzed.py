"""Hostile and malformed bodies: no 500, no crash, and a plain request says afterwards what it said before."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import patchbay as pb
from patchbay.serve.api import Api
from patchbay.serve.engine import Engine, Room
from patchbay.serve.guard import Guard, Keys
from patchbay.serve.named import Named

N = 10_000 if os.environ.get("PATCHBAY_EVERYWHERE") else 200
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


def body(rng: random.Random) -> bytes:
    """A good request with some fields replaced by anything, or bytes that are damaged."""
    made: dict[str, Any] = {"model": "tiny", "prompt": "The capital", "max_tokens": rng.randint(0, 4)}
    for _ in range(rng.randint(0, 4)):
        made[rng.choice(FIELDS)] = rng.choice(VALUES)
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
