"""The page's server: what it answers, behind its door, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.app.feed import Papers
from patchbay.app.folder import Results
from patchbay.app.jobs import Run
from patchbay.app.pages import application
from patchbay.app.runs import Runs
from patchbay.errors import PatchbayError
from patchbay.papers.feed import opened
from patchbay.papers.feed.listed import Listed
from patchbay.results.result import Result
from patchbay.serve.guard import POLICY, Guard, Keys
from tests.app.asking import BEARER, ask, asked


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("results")
    Result(
        torch.arange(24.0).reshape(2, 3, 4), ("layer", "query", "key"), "attention", provenance={"method": "find.made"}
    ).save(folder / "deep" / "one")
    (folder / "cut").mkdir()
    (folder / "cut" / "result.json").write_text("{}")
    results, store = Results(folder), tmp_path_factory.mktemp("papers") / "papers.sqlite"
    with opened.opened(store, make=True) as held:
        held.add([Listed("Of <i>zebras</i>", arxiv="2501.00001", published=date(2025, 1, 1), likes=3)], "test")
    papers = Papers(store)
    yield Guard(application(results, Runs(None, results), papers), Keys(BEARER))
    papers.close()


def told(answer: tuple[int, dict[str, str], bytes]) -> Any:
    status, _, body = answer
    assert status == 200, body
    return json.loads(body)


def test_the_page_and_its_files_have_a_strict_policy(app: Any) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/static/patchbay.js", "text/javascript"),
        ("/static/patchbay.css", "text/css"),
    ):
        status, head, body = ask(app, path)
        assert (status, head["content-security-policy"]) == (200, POLICY)
        assert head["content-type"].startswith(kind)
        assert b"<script>" not in body
        assert b" style=" not in body or path != "/"


def test_results_are_listed_read_and_sliced(app: Any) -> None:
    assert {one["name"]: one["kind"] for one in told(ask(app, "/api/results"))} == {
        "deep/one": "result",
        "cut": "damaged",
    }
    assert told(ask(app, "/api/result", name="deep/one"))["main"] == "score"
    status, _, body = ask(app, "/api/slice", name="deep/one", variable="score", fixed="1")
    assert status == 200
    assert body == torch.arange(12.0, 24.0).numpy().tobytes()


def test_a_figure_and_a_file_are_downloads(app: Any) -> None:
    status, head, body = ask(app, "/api/saved", name="deep/one")
    assert status == 200
    assert head["content-disposition"] == "attachment; filename*=UTF-8''deep-one.html"
    assert body.startswith(b"<!doctype html>")
    assert ask(app, "/api/figure", name="deep/one", format="svg")[0] == 400, "three axes have no drawing"


@pytest.mark.parametrize(
    ("path", "query", "said"),
    [
        ("/api/result", {"name": "cut"}, "cut"),
        ("/api/result", {"name": "../../etc"}, "leads out"),
        ("/api/result", {"name": "nothing"}, "is not in"),
        ("/api/result", {}, "needs name"),
        ("/api/slice", {"name": "deep/one", "variable": "none", "fixed": ""}, "no variable"),
        ("/api/slice", {"name": "deep/one", "variable": "score", "fixed": "9"}, "step 9"),
        ("/api/figure", {"name": "deep/one", "format": "exe"}, "a figure is one of"),
        ("/api/method", {"room": "find", "name": "nothing"}, "no method"),
        ("/static/pages.py", {}, "no file"),
        ("/static/..%2fpages.py", {}, "no file"),
        ("/api/model", {}, "no model is open"),
        ("/api/papers", {"view": "year"}, "no view"),
        ("/api/paper", {"name": "nothing"}, "no paper"),
        ("/api/difference", {"a": "deep/one"}, "needs b"),
        ("/api/difference", {"a": "deep/one", "b": "cut"}, "cut"),
    ],
)
def test_what_cannot_be_met_is_one_sentence(app: Any, path: str, query: dict[str, str], said: str) -> None:
    status, _, body = ask(app, path, **query)
    assert status == 400
    message = json.loads(body)["error"]["message"]
    assert said in message
    assert "Traceback" not in message


@pytest.mark.parametrize("body", [[], {}, {"room": "find"}, {"room": 1, "method": "x", "given": {}, "name": ""}, {"room": "find", "method": "x", "given": [], "name": ""},
                                  {"room": "find", "method": "x", "given": {}, "name": "", "more": 1}, b"{", b"\xff", b'{"room": NaN}'])  # fmt: skip
def test_bodies_that_are_none_are_refused(app: Any, body: Any) -> None:
    assert ask(app, "/api/runs", body=body)[0] == 400
    assert ask(app, "/api/look", body=body)[0] == 400
    assert ask(app, "/api/knob", body=body)[0] == 400
    assert ask(app, "/api/papers/mark", body=body)[0] == 400
    assert ask(app, "/api/papers/check", body=body)[0] == 400


def test_an_error_of_our_own_is_an_id(
    app: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    word = "".join(["sec", "ret"])

    def fail(*_: Any) -> None:
        raise RuntimeError(f"the prompt: {word}")

    monkeypatch.setattr(Results, "listed", fail)
    status, _, body = ask(app, "/api/results")
    assert status == 500
    id = json.loads(body)["error"]["code"]
    assert len(id) == 12
    assert id in caplog.text
    assert word not in body.decode() + caplog.text


def test_nothing_is_answered_without_a_key(app: Any) -> None:
    for path in ("/", "/static/patchbay.js", "/api/about", "/api/events", "/api/results", "/api/figure", "/api/saved"):
        assert ask(app, path, key=False)[0] == 401, path
    assert ask(app, "/api/runs", body={}, key=False)[0] == 401
    assert ask(app, "/api/runs")[0] == 405
    assert ask(app, "/nothing")[0] == 404


def test_the_stream_begins_with_the_state(app: Any) -> None:
    async def first() -> bytes:
        sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": "/api/events", "query_string": b"",
                 "headers": [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {BEARER}".encode())], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": ""}  # fmt: skip
        never = asyncio.Event()
        begun = False

        async def receive() -> dict[str, Any]:
            nonlocal begun
            if begun:
                await never.wait()
            begun = True
            return {"type": "http.request", "body": b"", "more_body": False}

        task = asyncio.ensure_future(app(scope, receive, sent.put))
        start, line = await sent.get(), await sent.get()
        task.cancel()
        assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
        return bytes(line["body"])

    line = asyncio.run(first())
    assert line.startswith(b"data: ")
    assert json.loads(line[6:])["model"] == {"source": None, "state": "none", "message": ""}


def test_about_names_every_method(app: Any) -> None:
    made = told(ask(app, "/api/about"))
    assert {room["name"] for room in made["rooms"]} >= {"find", "prove", "turn", "measure"}
    assert all(method["doc"] for room in made["rooms"] for method in room["methods"])
    assert asyncio.run(asked(app, "/api/method", room="find", name="logit_lens"))[0] == 200


def test_folder_of_the_results_is_made(tmp_path: Path) -> None:
    from patchbay.app.opened import _folder
    from patchbay.errors import PatchbayError

    assert _folder(tmp_path / "new" / "results").listed() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchbayError, match="is a file"):
        _folder(tmp_path / "file")


def test_papers_are_listed_told_and_marked(app: Any) -> None:
    assert told(ask(app, "/api/papers"))["papers"][0]["title"] == "Of <i>zebras</i>"
    assert told(ask(app, "/api/papers/mark", body={"name": "2501.00001", "marked": 1})) == {
        "name": "2501.00001",
        "marked": True,
    }
    assert told(ask(app, "/api/paper", name="2501.00001"))["marked"]
    status, _, body = ask(app, "/api/papers/check", body={"key": "olsson2022"})
    assert status == 400
    assert b"no model is open" in body


def test_two_results_are_subtracted(tmp_path: Path) -> None:
    for name, values in (("a", [3.0, 1.0]), ("b", [1.0, 2.0])):
        Result(values, ("layer",), "logits").save(tmp_path / name)
    Result([1.0], ("layer",), "logits").save(tmp_path / "short")
    app = application(Results(tmp_path), Runs(None, Results(tmp_path)), Papers(tmp_path / "none.sqlite"))
    made = told(ask(app, "/api/difference", a="a", b="b"))
    assert made["main"] == "difference"
    difference = next(one for one in made["variables"] if one["name"] == "difference")
    assert (difference["low"], difference["high"]) == (-1.0, 2.0)
    status, _, body = ask(app, "/api/difference", a="a", b="short")
    assert (status, b"cannot subtract" in body) == (400, True)


def test_a_knob_is_kept_at_another_strength_under_a_free_name(tmp_path: Path) -> None:
    pb.turn.scale("L1.H1", 0.0).save(tmp_path / "off.knob")
    Result([1.0], ("layer",), "logits").save(tmp_path / "result")
    app = application(Results(tmp_path), Runs(None, Results(tmp_path)), Papers(tmp_path / "none.sqlite"))
    made = told(ask(app, "/api/knob", body={"name": "off.knob", "strength": 0.5, "saved": ""}))
    assert made == {"name": "off-2.knob"}
    assert (pb.load_knob(tmp_path / "off-2.knob").strength, pb.load_knob(tmp_path / "off.knob").strength) == (0.5, 0.0)
    for body in ({"name": "result", "strength": 1, "saved": ""}, {"name": "../off.knob", "strength": 1, "saved": ""}, {"name": "off.knob", "strength": 1, "saved": "../x"},
                 {"name": "off.knob", "strength": True, "saved": ""}, {"name": "off.knob", "strength": 1, "saved": ".hidden"}):  # fmt: skip
        assert ask(app, "/api/knob", body=body)[0] == 400, body
    assert {path.name for path in tmp_path.iterdir()} == {"off.knob", "off-2.knob", "result"}


def test_the_map_of_a_run_is_null_where_there_is_none_and_a_run_that_is_not_is_said(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    runs = Runs(None, Results(tmp_path / "results"))
    site = Guard(application(runs.results, runs), Keys(BEARER))
    run = Run("find", "logit_lens", {}, [], "x", "patchbay find logit-lens")
    runs.runs[run.id] = run
    assert ask(site, "/api/partial", id=run.id)[::2] == (200, b"null")
    run.partial = {"values": [[1.0, None]]}
    assert json.loads(ask(site, "/api/partial", id=run.id)[2]) == {"values": [[1.0, None]]}
    status, _, said = ask(site, "/api/partial", id="none")
    assert (status, "no such run" in said.decode()) == (400, True)


def test_a_look_is_answered_in_lines_where_it_is_told_in_pieces(tmp_path: Path) -> None:
    runs = Runs(None, Results(tmp_path))

    async def looking(what: str, asked: Any) -> Any:
        yield {"piece": {"side": "before", "token": "a"}}
        if asked["text"] == "bad":
            raise PatchbayError("it failed")
        yield {"answer": {"kl": float("nan")}}

    runs.looking = looking  # type: ignore[method-assign, assignment]
    app = application(Results(tmp_path), runs, Papers(tmp_path / "none.sqlite"))
    status, head, body = ask(app, "/api/look", body={"what": "turned", "text": "x"})
    assert (status, head["content-type"]) == (200, "application/x-ndjson")
    assert [json.loads(line) for line in body.splitlines()] == [
        {"piece": {"side": "before", "token": "a"}},
        {"answer": {"kl": None}},
    ]
    _, _, body = ask(app, "/api/look", body={"what": "turned", "text": "bad"})
    assert json.loads(body.splitlines()[-1]) == {"error": {"message": "it failed"}}
    status, _, body = ask(app, "/api/look", body={"what": "eval", "text": "x"})
    assert (status, b"one looks at" in body) == (400, True)
