"""A server under load: sixteen clients with sixteen knobs, the first token of one more, and memory over many requests.

"clients" is 32 greedy tokens for 16 prompts of 16 tokens: one static batch of plain Hugging Face against 16 clients at once, each with a
connection of its own for every request and a knob of its own (heads, neurons, vectors of many layers), over HTTP with everything that stands before the
model. The target of 1.25 in time is 0.8 in tokens per second. "first" is the time to the first token of a stream with a prompt of 128 tokens (told with
its log-probability, also where its text is empty): alone, against while 15 other texts run. "memory" is the process's resident memory after 500 requests, against after the number in the row; clients
and server share one process and its interpreter lock.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import patchbay as pb
from bench.clock import Comparison, compare
from bench.report import Row, timed
from bench.shapes import prompts, save_shapes
from patchbay.serve import listen
from patchbay.serve.api import Api
from patchbay.serve.engine import Engine, Room
from patchbay.serve.guard import Guard, Keys
from patchbay.serve.joined import joins
from patchbay.serve.named import Named

PARTS = ("clients", "first", "memory")
NEW_TOKENS, N_CLIENTS, MANY = 32, 16, 10_000
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    tokenizer = pb.load("tiny").tokenizer
    models = {name: pb.load(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval(), tokenizer)
              for name, path in save_shapes(folder, dtype).items()}  # fmt: skip
    for name, model in [*models.items(), ("tiny", pb.load("tiny", device=device, dtype=dtype))]:
        model.hf.generation_config.eos_token_id = None  # both sides make all the tokens
        with served(model) as ask:
            if "clients" in parts:
                yield _clients(name, model, ask, device, seconds)
            if "first" in parts and name != "tiny":
                yield _first(name, model, ask, seconds)
            if "memory" in parts and name == "tiny":
                yield _memory(name, ask)


def knobs(model: pb.Model) -> dict[str, pb.Knob]:
    """Sixteen, at layers from the first to the last."""
    layers, made = list(model.layers), {}
    for i in range(N_CLIENTS):
        at = layers[i % len(layers)]
        vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(i))
        kinds = [
            pb.scale(at.heads[i % len(at.heads)].z, 0.5),
            pb.add(at.resid_out, vector),
            pb.scale(at.mlp.neurons[i].act, 2.0),
        ]
        made[f"k{i}"] = pb.Knob(f"k{i}", [kinds[i % 3]], 1.5)
    return made


@contextmanager
def served(model: pb.Model) -> Iterator[Any]:
    """A server of the model in this process; `ask(body)` returns a response."""
    joins(model)
    engine, keys = Engine(model, Room()).start(), Keys()
    at = listen.bound("127.0.0.1", 0)
    server = listen.server(Guard(Api(engine, Named(model, "m", knobs(model))).router(), keys))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=_quietly, args=(server, at), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    head = {"authorization": f"Bearer {keys.token}"}

    def ask(body: dict[str, Any]) -> http.client.HTTPResponse:
        line = http.client.HTTPConnection("127.0.0.1", at.getsockname()[1])  # one that rests for 5 s is closed
        line.request("POST", "/v1/completions", json.dumps({"model": "m", "temperature": 0} | body), head)
        found = line.getresponse()
        assert found.status == 200, found.read()
        return found

    try:
        yield ask
    finally:
        server.should_exit = True  # forced, the lifespan is cut off, and says so
        thread.join()
        engine.close()


def _quietly(server: Any, at: Any) -> None:
    import asyncio

    asyncio.run(server._serve([at]))  # without its handlers of signals, which are the main thread's


def _clients(name: str, model: pb.Model, ask: Any, device: str, seconds: float) -> Row:
    ids = prompts(N_CLIENTS, 16, model.vocab_size, device)
    bodies = [{"model": f"m+k{i}", "prompt": row, "max_tokens": NEW_TOKENS} for i, row in enumerate(ids.tolist())]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        found = compare(
            lambda: model.hf.generate(ids, attention_mask=torch.ones_like(ids), **options),
            lambda: list(pool.map(lambda body: ask(body).read(), bodies)),
            seconds=seconds, least=3, warm=1,
        )  # fmt: skip
    rate = N_CLIENTS * NEW_TOKENS / min(found.ours)
    return timed(
        "16 clients, 16 knobs",
        name,
        "16x16",
        found,
        1.25,
        f"{rate:.0f} tokens/s, {1 / found.best:.2f} of the static batch",
    )


def _first(name: str, model: pb.Model, ask: Any, seconds: float) -> Row:
    long = prompts(1, 128, model.vocab_size, "cpu").tolist()[0]
    stop = threading.Event()

    def one() -> float:
        begun = time.perf_counter()
        answer = ask({"prompt": long, "max_tokens": 2, "stream": True, "logprobs": 0})
        assert b'"token_logprobs"' in answer.readline()
        taken = time.perf_counter() - begun
        answer.read()
        return taken

    def other(i: int) -> None:
        while not stop.is_set():
            ask({"model": f"m+k{i}", "prompt": [5 + i] * 16, "max_tokens": 20 + 3 * i}).read()

    one()
    alone = [one() for _ in range(9)]
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        others = [pool.submit(other, i) for i in range(N_CLIENTS - 1)]
        time.sleep(1.5)
        loaded = [one() for _ in range(9)]
        stop.set()
        for each in others:
            each.result()
    return timed("first token, alone and beside 15 texts", name, "1x128", Comparison(tuple(alone), tuple(loaded)), 2.0)


def _memory(name: str, ask: Any) -> Row:
    def some(n: int) -> float:
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda i: ask(
                        {"model": f"m+k{i % N_CLIENTS}", "prompt": [5 + i % 50] * (1 + i % 30), "max_tokens": 2}
                    ).read(),
                    range(n),
                )
            )
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 1e6

    before, after = some(500), some(MANY)
    verdict = "met" if after < 1.02 * before + 5 else "missed"
    return Row(
        "resident memory",
        name,
        f"{MANY} requests",
        f"{before:.1f} MB",
        f"{after:.1f} MB",
        f"{after / before:.3f}",
        "",
        "1",
        "flat",
        verdict,
    )
