"""The page's server: the built front end, the folder of results as data, forms, runs and looks. It computes nothing.

What a request asks for is read from its address or a small JSON body; what cannot be met is a 4xx with one sentence. Results are read
in threads, so that a large one holds nobody up; models run in a process of their own (`runs.py`).
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from io import BytesIO
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from patchbay import __version__
from patchbay.app import feed, forms
from patchbay.app.folder import Results
from patchbay.app.runs import Runs
from patchbay.app.saved_page import STATIC
from patchbay.draw.screen import plain
from patchbay.errors import PatchbayError
from patchbay.serve.guard import Refusal, noted, read_json

FILES = {
    "index.html": "text/html; charset=utf-8",
    "patchbay.js": "text/javascript; charset=utf-8",
    "patchbay.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
FIGURES = {"svg": "image/svg+xml", "png": "image/png", "pdf": "application/pdf"}
LOOKS = ("prompt", "pattern", "heads", "dictionaries", "active", "feature", "knobs", "turned", "patching", "cell")
LISTS = ("knobs", "names", "texts")
QUIET = 15.0  # seconds after which a stream says that it is alive

Answer = Callable[[Request], Awaitable[Response]]


class Pages:
    """What is answered; one for a server."""

    def __init__(self, results: Results, runs: Runs, papers: feed.Papers) -> None:
        self.results, self.runs, self.papers = results, runs, papers

    async def page(self, request: Request) -> Response:
        return _file("index.html")

    async def static(self, request: Request) -> Response:
        return _file(request.path_params["name"])

    async def about(self, request: Request) -> Response:
        made = {
            "version": __version__,
            "folder": str(self.results.folder),
            "rooms": forms.about(),
            "tasks": forms.tasks(),
        }
        return JSONResponse(made)

    async def events(self, request: Request) -> Response:
        """What all tabs know, as it changes."""
        return StreamingResponse(_stream(self.runs), media_type="text/event-stream")

    async def listed(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.results.listed))

    async def result(self, request: Request) -> Response:
        made = await asyncio.to_thread(self.results.document, _one(request, "name"))
        return JSONResponse(made)

    async def slice(self, request: Request) -> Response:
        """Two axes of an array, as bytes."""
        fixed = [int(step) for step in request.query_params.get("fixed", "").split(",") if step.isdecimal()]
        data = await asyncio.to_thread(self._slice, _one(request, "name"), _one(request, "variable"), fixed)
        return Response(data, media_type="application/octet-stream")

    def _slice(self, name: str, variable: str, fixed: list[int]) -> bytes:
        from patchbay.app.document import slice_of

        return slice_of(_a_result(self.results.read(name)), variable, fixed)[0]

    async def figure(self, request: Request) -> Response:
        """The figure of `Result.plot`."""
        kind = _one(request, "format")
        if kind not in FIGURES:
            raise PatchbayError(f"a figure is one of {', '.join(FIGURES)}, got {kind!r}")
        name = _one(request, "name")
        return _download(await asyncio.to_thread(self._figure, name, kind), f"{name}.{kind}", FIGURES[kind])

    def _figure(self, name: str, kind: str) -> bytes:
        made = BytesIO()
        _a_result(self.results.read(name)).plot().savefig(made, format=kind, dpi=200)
        return made.getvalue()

    async def saved(self, request: Request) -> Response:
        """One file of HTML that holds everything."""
        from patchbay.app.saved_page import saved_page

        name = _one(request, "name")
        text = await asyncio.to_thread(lambda: saved_page(self.results.read(name), name=name))
        return _download(text.encode(), f"{name}.html", "text/html; charset=utf-8")

    async def method(self, request: Request) -> Response:
        return JSONResponse(forms.form(_one(request, "room"), _one(request, "name")))

    async def run(self, request: Request) -> Response:
        """Put a run in the queue."""
        asked = await _body(request, {"room": str, "method": str, "given": dict, "name": str})
        return JSONResponse(
            plain(self.runs.start(asked["room"], asked["method"], asked["given"], asked["name"]).told())
        )

    async def cancel(self, request: Request) -> Response:
        return JSONResponse(plain(self.runs.cancel(request.path_params["id"]).told()))

    async def partial(self, request: Request) -> Response:
        """What the sweep of a run has found so far; null where there is no map of it."""
        return JSONResponse(plain(self.runs.run(_one(request, "id")).partial))

    async def look(self, request: Request) -> Response:
        """Ask the model something: its answer, or, where it is told in pieces, a line of JSON for each and one for the answer."""
        known = {"what": str, "text": str, "other": str, "layer": int, "head": int, "position": int, "new": int}
        asked = await _body(request, known | {"place": str, "part": str} | dict.fromkeys(LISTS, list), needed=("what",))
        if asked["what"] not in LOOKS:
            raise PatchbayError(f"one looks at {', '.join(LOOKS)}; got {asked['what']!r}")
        heard = self.runs.looking(asked["what"], asked)
        first = await anext(heard)
        if "answer" in first:
            return JSONResponse(first["answer"])
        return StreamingResponse(_lines(first, heard), media_type="application/x-ndjson")

    async def difference(self, request: Request) -> Response:
        """One Result less another, cell by cell."""
        made = await asyncio.to_thread(self._difference, _one(request, "a"), _one(request, "b"))
        return JSONResponse(made)

    def _difference(self, a: str, b: str) -> dict[str, Any]:
        from patchbay.app.document import document
        from patchbay.results.replay import diff

        return document(diff(_a_result(self.results.read(a)), _a_result(self.results.read(b))), name=f"{a} less {b}")

    async def keep_knob(self, request: Request) -> Response:
        """Save a knob again at another strength."""
        asked = await _body(request, {"name": str, "strength": float, "saved": str})
        return JSONResponse(
            {"name": await asyncio.to_thread(self.results.turned, asked["name"], asked["strength"], asked["saved"])}
        )

    async def papers_(self, request: Request) -> Response:
        return JSONResponse(plain(await self.papers.ask(feed.listed, dict(request.query_params))))

    async def paper(self, request: Request) -> Response:
        return JSONResponse(plain(await self.papers.ask(feed.one, _one(request, "name"))))

    async def mark(self, request: Request) -> Response:
        asked = await _body(request, {"name": str, "marked": int})
        return JSONResponse(await self.papers.mark(asked["name"], bool(asked["marked"])))

    async def check(self, request: Request) -> Response:
        """Put the check of a paper's claim in the queue."""
        asked = await _body(request, {"key": str})
        return JSONResponse(plain(self.runs.check(asked["key"]).told()))

    async def model(self, request: Request) -> Response:
        return JSONResponse(await self.runs.look("model", {}))

    async def part(self, request: Request) -> Response:
        return JSONResponse(await self.runs.look("part", {"part": _one(request, "part")}))


def application(results: Results, runs: Runs, papers: feed.Papers | None = None) -> Starlette:
    """The ASGI application; it is to stand behind a `Guard`. `papers`: this user's, without."""
    pages = Pages(results, runs, papers or feed.Papers())
    runs.judged = pages.papers.judge

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await runs.open()
        warming = asyncio.create_task(_warm(runs))
        yield
        warming.cancel()
        await runs.close()
        pages.papers.close()

    get = {
        "/": pages.page, "/static/{name}": pages.static, "/api/about": pages.about, "/api/events": pages.events,
        "/api/results": pages.listed, "/api/result": pages.result, "/api/slice": pages.slice, "/api/figure": pages.figure,
        "/api/saved": pages.saved, "/api/method": pages.method, "/api/model": pages.model, "/api/part": pages.part,
        "/api/papers": pages.papers_, "/api/paper": pages.paper, "/api/difference": pages.difference, "/api/partial": pages.partial,
    }  # fmt: skip
    post = {
        "/api/runs": pages.run, "/api/runs/{id}/cancel": pages.cancel, "/api/look": pages.look, "/api/knob": pages.keep_knob,
        "/api/papers/mark": pages.mark, "/api/papers/check": pages.check,
    }  # fmt: skip
    routes = [Route(path, _refusing(answer), methods=["GET"]) for path, answer in get.items()]
    routes += [Route(path, _refusing(answer), methods=["POST"]) for path, answer in post.items()]
    return Starlette(routes=routes, lifespan=lifespan)


async def _warm(runs: Runs) -> None:
    """Import what reads Results once the model is there, so that the first one that is opened does not wait for it."""
    await runs.settled()
    await asyncio.to_thread(importlib.import_module, "patchbay.results.replay")


def _refusing(answer: Answer) -> Answer:
    """The same, with what cannot be met said in one sentence, and an error of our own by its id in the log."""

    async def answered(request: Request) -> Response:
        try:
            return await answer(request)
        except PatchbayError as error:
            refusal = Refusal(400, str(error))
        except Refusal as error:
            refusal = error
        except Exception as error:
            id = noted(error)
            refusal = Refusal(500, f"an error of the server's own; in its log under {id}", code=id)
        return Response(refusal.body, status_code=refusal.status, media_type="application/json")

    return answered


def _one(request: Request, name: str) -> str:
    found = request.query_params.getlist(name)
    if len(found) != 1 or not found[0]:
        raise PatchbayError(f"{request.url.path} needs {name}, once; got {len(found)}")
    return str(found[0])


async def _body(request: Request, known: dict[str, type], needed: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The JSON object of a body: its fields are those that are known, each of its type."""
    said = read_json(await request.body())
    if not isinstance(said, dict) or set(said) - set(known):
        extra = sorted(set(said) - set(known)) if isinstance(said, dict) else "no object"
        raise PatchbayError(f"{request.url.path} takes {', '.join(known)}; got {extra}")
    for name, kind in known.items():
        if name not in said and name in (known if needed is None else needed):
            raise PatchbayError(f"{request.url.path} needs {name}")
        held = (float, int) if kind is float else kind
        if name in said and (not isinstance(said[name], held) or isinstance(said[name], bool)):
            raise PatchbayError(f"{request.url.path}: {name} is {said[name]!r}, not {kind.__name__}")
    return said


async def _lines(first: Mapping[str, Any], rest: AsyncGenerator[Mapping[str, Any], None]) -> AsyncIterator[str]:
    """What is heard of a look, a line each; the last is its answer, or why there is none."""
    async with aclosing(rest):
        yield json.dumps(plain({"piece": first["piece"]})) + "\n"
        try:
            async for said in rest:
                yield json.dumps(plain({key: said[key] for key in ("piece", "answer") if key in said})) + "\n"
        except PatchbayError as error:
            yield json.dumps({"error": {"message": str(error)}}) + "\n"


async def _stream(runs: Runs) -> AsyncIterator[str]:
    """Server-sent events: the state when it changes, a comment where it is quiet."""
    changes = runs.changes()
    waiting = asyncio.ensure_future(anext(changes))
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=QUIET)
            if not done:
                yield ": alive\n\n"
                continue
            try:
                told = waiting.result()
            except StopAsyncIteration:
                return
            yield f"data: {json.dumps(plain(told))}\n\n"
            waiting = asyncio.ensure_future(anext(changes))
    finally:
        waiting.cancel()


def _file(name: str) -> Response:
    if name not in FILES:
        raise PatchbayError(f"there is no file {name!r}")
    return Response((STATIC / name).read_bytes(), media_type=FILES[name])


def _a_result(read: Any) -> Any:
    if not hasattr(read, "ranked"):
        raise PatchbayError("this is a knob: figures and arrays are of Results")
    return read


def _download(data: bytes, name: str, kind: str) -> Response:
    called = quote(name.replace("/", "-"))
    return Response(data, media_type=kind, headers={"content-disposition": f"attachment; filename*=UTF-8''{called}"})
