"""Runs and looks of the page: one worker process with one model, a queue that is shown, cancelling, and what all tabs are told.

The server's own process never runs a model. A worker that dies is started again; the run at hand has then failed, the others wait on.
Looks stand in the same queue, before runs that have not begun.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from patchbay.app import forms
from patchbay.app.folder import Results, checked
from patchbay.app.jobs import OPEN, Look, Run
from patchbay.errors import PatchbayError
from patchbay.papers import catalogue

UNFINISHED = ".unfinished"  # in the folder of results: finished batches of runs that have not ended
PATIENCE = 8.0  # seconds that a worker has to stop a job before it is ended
EVERY = 0.1  # seconds between two words to the tabs
LINE = 256 << 20  # bytes of one answer of the worker
MOST_WAITING, MOST_ENDED = 32, 200
log = logging.getLogger("patchbay.app")


class Runs:
    """The worker, its queue, and what is told of both. `open` within a running event loop, `close` before it ends."""

    def __init__(
        self, model: str | None, results: Results, dictionaries: Sequence[str] = (), texts: str | None = None
    ) -> None:
        self.source, self.results = model, results
        self.extras = [*([] if texts is None else ["--texts", texts]), *dictionaries]  # words of the worker
        self.judged: Callable[..., None] = lambda *found: None  # told the verdict of each claim that was checked
        self.model = {"source": model, "state": "none" if model is None else "loading", "message": ""}
        self.runs: dict[str, Run] = {}
        self._looks: list[Look] = []
        self._at_hand: Run | Look | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._versions = itertools.count(1)
        self.version, self.made, self.ending = 0, 0, False

    # --- asked from outside ---------------------------------------------------------------------------

    async def open(self) -> None:
        if self.source is not None:
            self._keep(self._serve())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()

    def leave(self) -> None:
        """The server is about to end: streams are let go."""
        self.ending = True
        self._tell()

    def start(self, room: str, method: str, given: Mapping[str, Any], name: str) -> Run:
        """Put a call of a method in the queue; refuses what its form has not."""
        source = self._ready()
        words = forms.arguments(room, method, given, self.results.folder)
        target = self._free(name.strip() or method)
        return self._queue(
            Run(room, method, dict(given), words, target, forms.spoken(room, method, source, words, target))
        )

    def check(self, key: str) -> Run:
        """Put the check of a paper's claim in the queue; refuses a paper that has none."""
        source = self._ready()
        if "claim" not in catalogue.paper(key):
            raise PatchbayError(f"{key} has no claim that can be checked")
        command = shlex.join(["patchbay", "papers", "run", key, "--model", source])
        return self._queue(Run("papers", key, {}, [], key, command))

    def _ready(self) -> str:
        """The model's source, where another run may wait for it."""
        if self.source is None or self.model["state"] == "failed":
            raise PatchbayError(self.model["message"] or "no model is open: start `patchbay ui MODEL`")
        waiting = sum(run.state in OPEN for run in self.runs.values())
        if waiting >= MOST_WAITING:
            raise PatchbayError(f"{waiting} runs wait: wait for some, or cancel them")
        return self.source

    def _queue(self, run: Run) -> Run:
        self.runs[run.id] = run
        self._forget()
        self._tell()
        return run

    def _free(self, name: str) -> str:
        """A name that neither the folder nor a run that waits has."""
        taken = {run.name for run in self.runs.values() if run.state in OPEN}
        return self.results.free(checked(name), taken)

    def run(self, id: str) -> Run:
        """A run by its id."""
        if id not in self.runs:
            raise PatchbayError("there is no such run since the server started")
        return self.runs[id]

    def cancel(self, id: str) -> Run:
        """Take a run out of the queue, or stop it; what its sweep had finished stays."""
        run = self.run(id)
        if run.state == "queued":
            self._finish(run, "cancelled", "it had not begun")
        elif run.state == "running":
            run.state = "stopping"
            self._keep(self._stop(run))
        self._tell()
        return run

    async def look(self, what: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the model something; waits for its turn."""
        async with aclosing(self.looking(what, asked)) as heard:
            said = [one async for one in heard]
        return dict(said[-1]["answer"])

    async def looking(self, what: str, asked: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """The same as it is heard: `{"piece": ...}` any number of times, then `{"answer": ...}`. Who goes away stops it."""
        if self.source is None or self.model["state"] == "failed":
            raise PatchbayError(self.model["message"] or "no model is open: start `patchbay ui MODEL`")
        if len(self._looks) >= MOST_WAITING:
            raise PatchbayError(f"{len(self._looks)} questions wait already")
        look = Look(what, asked)
        self._looks.append(look)
        self._tell()
        try:
            while "answer" not in (said := await look.heard.get()):
                if said["event"] != "piece":
                    raise PatchbayError(str(said.get("message") or "it was cancelled"))
                yield said
            yield said
        finally:
            if look in self._looks:
                self._looks.remove(look)
            elif self._at_hand is look and self._process is not None and self._process.returncode is None:
                self._process.send_signal(signal.SIGINT)

    async def settled(self) -> None:
        """Wait until the model is there, or is known not to come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.model["state"] != "loading")

    def told(self) -> dict[str, Any]:
        """What the tabs know."""
        shown = [run.told() for run in self.runs.values()]
        return {"model": self.model, "runs": shown, "looking": len(self._looks), "results": self.made}

    async def changes(self) -> AsyncIterator[dict[str, Any]]:
        """What the tabs know, now and whenever it changes."""
        seen = -1
        while not self.ending:
            async with self._changed:
                await self._changed.wait_for(lambda known=seen: self.version != known)  # type: ignore[misc]
                seen = self.version
            yield self.told()
            await asyncio.sleep(EVERY)

    # --- the worker -----------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Keep a worker at work until the server closes."""
        while True:
            process = await self._spawn()
            try:
                await self._work(process)
            except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError, ValueError) as error:
                log.warning("the worker ended: %s", type(error).__name__)
            await self._end()
            if self.model["state"] == "loading":
                self.model |= {
                    "state": "failed",
                    "message": f"the process that loads {self.source} ended; its log says why",
                }
            self._broken()
            if self.model["state"] == "failed":
                return

    async def _spawn(self) -> asyncio.subprocess.Process:
        assert self.source is not None
        self.model |= {"state": "loading", "message": ""}
        self._tell()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "patchbay.app.worker", self.source, str(self.results.folder), *self.extras,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE, start_new_session=True,
        )  # fmt: skip
        return self._process

    async def _work(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stdin is not None
        self._keep(self._watch(process))
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: (
                        (self.model["state"] != "loading" and self._next() is not None)
                        or process.returncode is not None
                    )
                )
            if process.returncode is not None:
                return
            job = self._next()
            assert job is not None
            self._at_hand = job
            process.stdin.write(json.dumps(self._begun(job)).encode() + b"\n")
            self._tell()
            async with self._changed:
                await self._changed.wait_for(lambda: self._at_hand is None or process.returncode is not None)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Read what the worker says until it ends, or says what cannot be understood: then it is ended."""
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                self._heard(json.loads(line))
        except ValueError as error:
            log.warning("the worker said what cannot be understood (%s): it is ended", error)
            process.kill()
        await process.wait()
        self._tell()

    def _next(self) -> Run | Look | None:
        if self._looks:
            return self._looks[0]
        return next((run for run in self.runs.values() if run.state == "queued"), None)

    def _begun(self, job: Run | Look) -> dict[str, Any]:
        if isinstance(job, Look):
            self._looks.remove(job)
            return {"id": job.id, "look": job.what, "asked": job.asked}
        job.state, job.began = "running", time.monotonic()
        return {
            "id": job.id,
            "room": job.room,
            "method": job.method,
            "words": job.words,
            "out": job.name,
            "keep": str(self._kept(job)),
        }

    def _kept(self, run: Run) -> Path:
        """Where finished batches of this call lie, whatever its Result is to be called."""
        called = json.dumps([self.source, run.room, run.method, run.words])
        return self.results.folder / UNFINISHED / hashlib.sha256(called.encode()).hexdigest()[:16]

    def _heard(self, said: Mapping[str, Any]) -> None:
        event, job = said["event"], self._at_hand
        if event == "ready":
            self.model["state"] = "ready"
        elif event == "failed to load":
            self.model |= {"state": "failed", "message": said["message"]}
            self._broken()
        elif job is not None and said.get("id") == job.id:
            self._of_job(job, event, said)
        self._tell()

    def _of_job(self, job: Run | Look, event: str, said: Mapping[str, Any]) -> None:
        if isinstance(job, Run) and event in ("progress", "estimate"):
            kept = {key: said[key] for key in ("done", "total", "estimate") if key in said}
            for key, value in kept.items():
                setattr(job, key, value)
            return
        if isinstance(job, Run) and event == "partial":
            job.partial, job.drawn = said["map"], job.drawn + (said["map"] is not None)
            return
        if isinstance(job, Look):
            self._at_hand = job if event == "piece" else None
            job.heard.put_nowait(said)
            return
        self._at_hand = None
        if event == "done":
            shutil.rmtree(self._kept(job), ignore_errors=True)
            job.result, self.made, job.partial = said["result"], next(self._versions), None
            self._finish(job, "done", str(said.get("message") or ""))
            if "verdict" in said:
                self.judged(job.method, self.source, said["weights"], said["verdict"], job.message)
        else:
            self._finish(
                job, event, str(said.get("message") or "what was finished is kept: the same call goes on from there")
            )

    def _finish(self, run: Run, state: str, message: str) -> None:
        run.state, run.message, run.ended = state, message, time.monotonic()

    def _broken(self) -> None:
        """The worker is gone: what it had at hand has failed, and where the model cannot be loaded, all that waits."""
        job, self._at_hand = self._at_hand, None
        why = self.model["message"] or "the process that ran it ended; it may have been short of memory"
        if isinstance(job, Run):
            stopped = job.state == "stopping"
            self._finish(
                job, "cancelled" if stopped else "failed", "it was ended; finished batches are kept" if stopped else why
            )
        elif job is not None:
            job.heard.put_nowait({"event": "failed", "message": why})
        if self.model["state"] == "failed":
            for run in self.runs.values():
                if run.state == "queued":
                    self._finish(run, "failed", why)
            for look in self._looks:
                look.heard.put_nowait({"event": "failed", "message": why})
            self._looks.clear()
        self._tell()

    async def _stop(self, run: Run) -> None:
        """Interrupt the run; a worker that does not stop in time is ended and started again."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGINT)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE), self._changed:
                await self._changed.wait_for(lambda: run.state != "stopping")
        if run.state == "stopping" and process.returncode is None:
            process.kill()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(3):
                    await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    # --- small things ---------------------------------------------------------------------------------

    def _forget(self) -> None:
        ended = [run.id for run in self.runs.values() if run.ended is not None]
        for id in ended[: max(0, len(ended) - MOST_ENDED)]:
            del self.runs[id]

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self) -> None:
        self.version += 1
        self._keep(self._wake())

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()
