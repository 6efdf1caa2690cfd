"""The routes of `patchbay serve`, and what each request leaves in the log: counts, times and names, no words unless they are asked for."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import secrets
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router

from patchbay.errors import PatchbayError
from patchbay.serve import asking
from patchbay.serve.answers import Answer
from patchbay.serve.asking import Asked
from patchbay.serve.engine import Engine
from patchbay.serve.guard import Refusal, noted, read_json
from patchbay.serve.named import Named
from patchbay.serve.work import Event, Work

CHAT_TOKENS = 256  # new ones of a chat that says none, where they fit
log = logging.getLogger("patchbay.requests")


class Api:
    """OpenAI's protocol over one engine."""

    def __init__(self, engine: Engine, named: Named, *, log_prompts: bool = False) -> None:
        self.engine, self.named, self.log_prompts = engine, named, log_prompts
        self.tokenizer = copy.deepcopy(engine.tokenizer)  # fast tokenizers are not to be used by two threads at once
        self.reader = ThreadPoolExecutor(1, "patchbay-reader")
        self.answered: dict[tuple[str, int], int] = {}

    def router(self) -> Router:
        return Router(
            [
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/metrics", self.metrics),
                Route("/healthz", self.healthz),
            ]
        )

    # ---- what there is ----

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.named.listed()})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.named.asked(name)
        known = {row["id"]: row for row in self.named.listed()}
        return JSONResponse(known.get(name) or known[self.named.name] | {"id": name, "parent": self.named.name})

    async def healthz(self, request: Request) -> Response:
        ending = self.engine.draining or self.engine.closed
        return JSONResponse({"status": "ending" if ending else "ok"}, 503 if ending else 200)

    async def metrics(self, request: Request) -> Response:
        engine, counts = self.engine, self.engine.counts
        rows: list[tuple[str, str, float]] = [
            ("prompt_tokens_total", "counter", counts.prompt_tokens),
            ("generated_tokens_total", "counter", counts.new_tokens),
            ("steps_total", "counter", counts.steps),
            ("failures_total", "counter", counts.failures),
            ("first_token_seconds_sum", "counter", counts.first_seconds),
            ("first_token_seconds_count", "counter", counts.firsts),
            ("running_texts", "gauge", len(engine.lines) + len(engine.apart)),
            ("running_prompts", "gauge", len(engine.started)),
            ("waiting_prompts", "gauge", len(engine.waiting)),
        ]
        lines = [f"# TYPE patchbay_{name} {kind}\npatchbay_{name} {value:g}" for name, kind, value in rows]
        lines.append("# TYPE patchbay_requests_total counter")
        lines += [
            f'patchbay_requests_total{{path="{path}",status="{status}"}} {n}'
            for (path, status), n in sorted(self.answered.items())
        ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # ---- what is asked ----

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, asking.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, asking.chat)

    async def _answer(self, request: Request, read: Callable[[Any], Asked]) -> Response:
        story = _Story(self, request.url.path)
        try:
            asked = read(read_json(await request.body()))
            works, about = await asyncio.get_running_loop().run_in_executor(self.reader, self._works, asked)
            story.asked, story.works, story.about = asked, works, about
            answer = Answer(asked, works, self.tokenizer, about)
            box = _Box(works)
            self.engine.submit(works)
            if not asked.stream:
                return await self._whole(request, answer, box, story)
            first = await self._first(request, box)
        except Refusal as refusal:
            story.end(refusal.status, refusal.code)
            raise
        except BaseException:
            story.end(500, "error")
            raise
        return StreamingResponse(self._streamed(answer, box, first, story), media_type="text/event-stream")

    def _works(self, asked: Asked) -> tuple[list[Work], dict[str, Any]]:
        """The prompts of a request, read and checked; and what is told of it beside the answer."""
        turned = self.named.asked(asked.model, asked.knobs)
        try:
            edits, notes = self.named.edits(turned)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                ids = self._read(asked)
        except PatchbayError as error:
            raise Refusal(400, str(error), about="messages" if asked.chat else "prompt", code="refused") from None
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        works = [self._work(asked, one, edits, seed) for one in ids]
        notes = (*notes, *dict.fromkeys(str(one.message) for one in said))
        knobs = [{"name": name, "strength": strength} for name, strength in turned]
        return works, {"knobs": knobs, "seed": seed, "notes": list(notes), "fingerprint": self.engine.model.fingerprint}

    def _read(self, asked: Asked) -> list[list[int]]:
        if not asked.chat:
            return [self.engine.model.encode([one])[0] for one in asked.prompts]
        try:
            return self.engine.model.encode(asked.prompts[0])
        except PatchbayError:
            raise
        except Exception as error:  # whatever a template raises, in its own words
            raise PatchbayError(f"the chat template does not take these messages: {str(error)[:200]}") from None

    def _work(self, asked: Asked, ids: list[int], edits: Any, seed: int) -> Work:
        n_new = asked.n_new
        if n_new is None:
            longest = self.engine.model.longest_prompt or self.engine.room.batch_tokens
            n_new = max(1, min(CHAT_TOKENS, longest - len(ids), self.engine.room.batch_tokens // asked.n - len(ids)))
        more: dict[str, Any] = {"logprobs": asked.logprobs, "echo": asked.echo, "whole": not asked.stream}
        return Work(ids, edits, asked.n, n_new, asked.sampling, seed, asked.stop, **more)

    # ---- what is answered ----

    async def _whole(self, request: Request, answer: Answer, box: _Box, story: _Story) -> Response:
        gone = asyncio.create_task(_left(request))
        try:
            while not answer.over:
                place, event = await box.next(gone)
                if isinstance(event, Refusal):
                    raise event
                answer.hear(place, event)
        finally:
            gone.cancel()
            if not answer.over:
                self.engine.cancel(box.works)
        story.end(200, None, answer.n_new)
        return JSONResponse(answer.whole())

    async def _first(self, request: Request, box: _Box) -> tuple[int, Event]:
        """The first event of a stream: what is refused before anything was said is refused with its status."""
        gone = asyncio.create_task(_left(request))
        try:
            found = await box.next(gone)
            if isinstance(found[1], Refusal):
                raise found[1]
        except BaseException:
            self.engine.cancel(box.works)
            raise
        finally:
            gone.cancel()
        return found

    async def _streamed(
        self, answer: Answer, box: _Box, first: tuple[int, Event], story: _Story
    ) -> AsyncIterator[bytes]:
        status, reason = 499, "left"
        try:
            for chunk in answer.begin():
                yield _event(chunk)
            place, event = first
            while True:
                if isinstance(event, Refusal):
                    status, reason = event.status, event.code or "error"
                    yield b"data: " + event.body + b"\n\n"
                    break
                for chunk in answer.pieces(place, event):
                    yield _event(chunk)
                if answer.over:
                    status, reason = 200, ""
                    for chunk in answer.last():
                        yield _event(chunk)
                    break
                place, event = await box.next()
            yield b"data: [DONE]\n\n"
        except Exception as error:
            id = noted(error)
            status, reason = 500, id
            yield (
                b"data: " + Refusal(500, f"an error of the server's own; in its log under {id}", code=id).body + b"\n\n"
            )
        finally:
            if not answer.over:
                self.engine.cancel(box.works)
            story.end(status, reason or None, answer.n_new)


class _Box:
    """Events of a request's works, on their way from the engine's thread to the loop of the server."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works, self.loop = list(works), asyncio.get_running_loop()
        self.events: deque[tuple[int, Event]] = deque()
        self.rung, self.due = asyncio.Event(), False  # `due`: the loop is to be rung, and will look at all events then
        for place, work in enumerate(works):
            work.tell = lambda event, place=place: self._put(place, event)  # type: ignore[misc]

    def _put(self, place: int, event: Event) -> None:
        """In the engine's thread. One event after another costs one bell."""
        self.events.append((place, event))
        if not self.due and not self.loop.is_closed():
            self.due = True
            self.loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        self.due = False
        self.rung.set()

    async def next(self, gone: asyncio.Task[None] | None = None) -> tuple[int, Event]:
        """The next event. Raises Refusal once `gone` says that the client has left."""
        while not self.events:
            self.rung.clear()
            if gone is None:
                await self.rung.wait()
                continue
            ringing = asyncio.ensure_future(self.rung.wait())
            await asyncio.wait([ringing, gone], return_when=asyncio.FIRST_COMPLETED)
            if not ringing.done():
                ringing.cancel()
                raise Refusal(499, "the client left")
        return self.events.popleft()


class _Story:
    """One line of the log for each request, when it is over."""

    def __init__(self, api: Api, path: str) -> None:
        self.api, self.path, self.begun = api, path, time.monotonic()
        self.asked: Asked | None = None
        self.works: list[Work] = []
        self.about: dict[str, Any] = {}

    @property
    def first(self) -> float:
        """Seconds to the first token, 0 where none came."""
        return min((work.first - self.begun for work in self.works if work.first), default=0.0)

    def end(self, status: int, reason: str | None, n_new: int = 0) -> None:
        key = (self.path, status)
        self.api.answered[key] = self.api.answered.get(key, 0) + 1
        said: dict[str, Any] = {"path": self.path, "status": status, "reason": reason}
        said |= {"seconds": round(time.monotonic() - self.begun, 4), "first_token_seconds": round(self.first, 4)}
        said |= {"prompt_tokens": sum(len(work.ids) for work in self.works), "new_tokens": n_new}
        said |= {"knobs": self.about.get("knobs", [])}
        if self.api.log_prompts and self.asked is not None:
            said["prompts"] = self.asked.prompts
        log.info("%s", json.dumps(said, ensure_ascii=False))


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
