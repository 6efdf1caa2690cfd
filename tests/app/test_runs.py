"""The queue: one run at a time, cancelled ones stop, a worker that dies or hangs is started again, and all tabs are told the same."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from patchbay.app import runs as runs_file
from patchbay.app.folder import Results
from patchbay.app.runs import UNFINISHED, Runs
from patchbay.errors import PatchbayError
from patchbay.papers import catalogue

FAKE = """
import json, os, signal, sys, time
name = sys.argv[1]
busy = telling = late = False
def say(**line):
    global telling, late
    telling = True
    os.write(1, (json.dumps(line) + "\\n").encode())
    telling = False
    if late:
        late = False
        stop()
if name == "broken": say(event="failed to load", message="no such model")
elif name == "dies": os._exit(3)
else: say(event="ready")
def stop(*_):
    global late
    if telling: late = True
    elif busy: raise KeyboardInterrupt
signal.signal(signal.SIGINT, signal.SIG_IGN if name == "deaf" else stop)
for line in sys.stdin:
    job = json.loads(line)
    if job.get("look") == "pieces":
        try:
            busy = True
            for i in range(3 if job["asked"].get("few") else 500): say(id=job["id"], event="piece", piece={"i": i}); time.sleep(0.01)
            busy = False
            say(id=job["id"], event="answer", answer={"n": 3})
        except KeyboardInterrupt:
            open(sys.argv[2] + "/stopped.txt", "a").write("stopped"); say(id=job["id"], event="cancelled")
        finally:
            busy = False
        continue
    if "look" in job: say(id=job["id"], event="answer", answer={"asked": job["asked"], "what": job["look"]}); continue
    words = " ".join(job["words"])
    try:
        busy = True
        open(sys.argv[2] + "/order.txt", "a").write(words + "\\\\n")
        os.makedirs(job["keep"], exist_ok=True)
        if "fall" in words: os._exit(4)
        if "babble" in words: os.write(1, b'{"event": {"event"' + bytes([10])); continue
        if "fail" in words: say(id=job["id"], event="failed", message="the method says why"); continue
        if job["room"] == "papers": say(id=job["id"], event="done", result=None, message="confirmed: so", verdict="confirmed", weights="aa"); continue
        say(id=job["id"], event="estimate", estimate="9 rows")
        say(id=job["id"], event="partial", map=None if "large" in words else {"values": [[1.0, None]]})
        for i in range(300 if "long" in words else 2):
            say(id=job["id"], event="progress", done=i + 1, total=300); time.sleep(0.01)
        busy = False
        os.makedirs(os.path.join(sys.argv[2], job["out"]))
        say(id=job["id"], event="done", result=job["out"])
    except KeyboardInterrupt:
        say(id=job["id"], event="cancelled")
    finally:
        busy = False
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`served(model, what)`: what is done with Runs whose worker is a small program that speaks as the real one does."""
    program = tmp_path / "fake.py"
    program.write_text(FAKE.replace("\\\\n", "\\n"))
    spawn = asyncio.create_subprocess_exec

    async def fake(*words: str, **options: Any) -> Any:
        assert words[:4] == (sys.executable, "-P", "-m", "patchbay.app.worker")
        return await spawn(sys.executable, str(program), *words[4:], **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fake)
    folder = tmp_path / "results"
    folder.mkdir()

    def run(model: str | None, what: Callable[[Runs], Awaitable[None]]) -> Path:
        async def whole() -> None:
            runs = Runs(model, Results(folder))
            await runs.open()
            try:
                async with asyncio.timeout(30):
                    await what(runs)
            finally:
                await runs.close()

        asyncio.run(whole())
        return folder

    return run


def begin(runs: Runs, task: str, name: str = "") -> Any:
    return runs.start("find", "logit_lens", {"task": task}, name)


async def until(runs: Runs, true: Callable[[], bool]) -> None:
    async for _ in runs.changes():
        if true():
            return


def test_runs_go_one_after_another_and_a_cancelled_one_stops(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        first, second, third = begin(runs, "long"), begin(runs, "b"), begin(runs, "c")
        assert {run.name for run in (first, second, third)} == {"logit_lens", "logit_lens-2", "logit_lens-3"}
        await until(runs, lambda: first.done > 2)
        assert (first.state, second.state, first.estimate, first.total) == ("running", "queued", "9 rows", 300)
        runs.cancel(third.id)
        runs.cancel(first.id)
        assert first.state == "stopping"
        await until(runs, lambda: second.state == "done")
        assert (first.state, third.state, first.result) == ("cancelled", "cancelled", None)
        assert second.result == "logit_lens-2"
        assert runs.told()["results"] == 1
        again = begin(runs, "long")
        await until(runs, lambda: again.done > 2)
        assert runs._kept(again) == runs._kept(first) != runs._kept(second)
        runs.cancel(again.id)
        await until(runs, lambda: again.state == "cancelled")

    folder = served("good", what)
    assert (folder / "order.txt").read_text().split() == ["--task=long", "--task=b", "--task=long"]
    assert len(list((folder / UNFINISHED).iterdir())) == 1, (
        "what a cancelled run had finished stays, that of a finished one goes"
    )


def test_a_failed_run_says_why_and_the_next_one_goes(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        failed, fell, babbled, good = (begin(runs, task) for task in ("fail", "fall", "babble", "good"))
        await until(runs, lambda: good.state == "done")
        assert (failed.state, failed.message) == ("failed", "the method says why")
        for ended in (fell, babbled):
            assert ended.state == "failed"
            assert "process that ran it ended" in ended.message
        assert "--task=fail" in failed.command
        assert failed.command.startswith("patchbay find logit-lens good ")

    served("good", what)


def test_looks_go_before_runs_that_have_not_begun(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        first, waiting = begin(runs, "long", "a"), begin(runs, "b")
        await until(runs, lambda: first.done > 2)
        look = asyncio.ensure_future(runs.look("prompt", {"text": "x"}))
        await until(runs, lambda: runs.told()["looking"] == 1)
        runs.cancel(first.id)
        assert await look == {"asked": {"text": "x"}, "what": "prompt"}
        assert waiting.state in ("queued", "running")

    served("good", what)


def test_a_worker_that_does_not_stop_is_ended(served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_file, "PATIENCE", 0.2)

    async def what(runs: Runs) -> None:
        deaf, good = begin(runs, "long"), begin(runs, "b")
        await until(runs, lambda: deaf.done > 2)
        runs.cancel(deaf.id)
        await until(runs, lambda: good.state == "done")
        assert deaf.state == "cancelled"

    served("deaf", what)


@pytest.mark.parametrize(("model", "why"), [("broken", "no such model"), ("dies", "process that loads dies ended")])
def test_a_model_that_does_not_load_is_said_and_tried_no_more(model: str, why: str, served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        waiting, look = begin(runs, "a"), asyncio.ensure_future(runs.look("model", {}))
        await until(runs, lambda: runs.model["state"] == "failed" and waiting.state == "failed")
        assert why in str(runs.model["message"])
        assert why in waiting.message
        with pytest.raises(PatchbayError, match=why):
            await look
        with pytest.raises(PatchbayError, match=why):
            begin(runs, "b")

    served(model, what)


def test_all_tabs_are_told_the_same(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        async def tab() -> dict[str, Any]:
            async for told in runs.changes():
                if told["runs"] and told["runs"][0]["state"] == "done":
                    return told
            return {}

        tabs = [asyncio.ensure_future(tab()) for _ in range(2)]
        await asyncio.sleep(0)
        begin(runs, "a")
        one, other = await asyncio.gather(*tabs)
        assert one == other
        assert one["runs"][0]["result"] == "logit_lens"

    served("good", what)


def test_what_cannot_be_is_refused(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        for name in ("../out", "/tmp/out", ".hidden", "a/.b", "a/", "x" * 201):
            with pytest.raises(PatchbayError):
                begin(runs, "a", name)
        with pytest.raises(PatchbayError, match="no such run"):
            runs.cancel("nothing")
        for _ in range(runs_file.MOST_WAITING):
            begin(runs, "a")
        with pytest.raises(PatchbayError, match="runs wait"):
            begin(runs, "a")

    served("good", what)

    async def without(runs: Runs) -> None:
        with pytest.raises(PatchbayError, match="no model is open"):
            begin(runs, "a")
        with pytest.raises(PatchbayError, match="no model is open"):
            await runs.look("model", {})

    served(None, without)


def test_a_look_is_heard_piece_by_piece_and_who_goes_away_stops_it(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        heard = [said async for said in runs.looking("pieces", {"few": True})]
        assert [one["piece"]["i"] for one in heard[:-1]] == [0, 1, 2]
        assert heard[-1]["answer"] == {"n": 3}
        long = runs.looking("pieces", {})
        await anext(long)
        await long.aclose()
        assert (await runs.look("prompt", {"text": "x"}))["what"] == "prompt", "the next one is answered at once"

    folder = served("model", what)
    assert (folder / "stopped.txt").read_text() == "stopped"


def test_a_claim_is_queued_as_its_command_says(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        run = runs.check("olsson2022")
        assert run.command == "patchbay papers run olsson2022 --model model"
        await until(runs, lambda: run.state == "done")
        with pytest.raises(PatchbayError, match="no claim that can be checked"):
            runs.check(next(entry["key"] for entry in catalogue.papers() if "claim" not in entry))
        with pytest.raises(PatchbayError, match="no paper 'nothing'"):
            runs.check("nothing")

    served("model", what)


def test_what_a_sweep_has_found_so_far_stays_with_a_run_that_was_stopped(served: Callable[..., Any]) -> None:
    async def what(runs: Runs) -> None:
        first, large = begin(runs, "long"), begin(runs, "large")
        await until(runs, lambda: first.done > 2)
        assert (runs.run(first.id).partial, first.told()["drawn"]) == ({"values": [[1.0, None]]}, 1)
        assert "partial" not in first.told(), "tabs ask for it"
        runs.cancel(first.id)
        await until(runs, lambda: large.state == "done")
        assert (first.state, first.partial) == ("cancelled", {"values": [[1.0, None]]})
        assert (large.partial, large.drawn) == (None, 0)

    served("tiny", what)


def test_a_verdict_is_handed_on_with_its_model(served: Callable[..., Any]) -> None:
    heard: list[tuple[str, ...]] = []

    async def what(runs: Runs) -> None:
        runs.judged = lambda *found: heard.append(found)
        run = runs.check("olsson2022")
        await until(runs, lambda: run.state == "done")
        assert heard == [("olsson2022", "tiny", "aa", "confirmed", "confirmed: so")]

    served("tiny", what)
