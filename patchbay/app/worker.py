"""The process that holds the model and does the page's work, one piece at a time: `python -m patchbay.app.worker MODEL FOLDER
[--texts FILE] DICTIONARY...`.

A line of JSON on stdin is a job, `{"id", "room", "method", "words", "out", "keep"}` (of room "papers" the check of a claim) or
`{"id", "look", ...}`; lines on stdout say how far it is, what a look has found so far, and what came of it. SIGINT while a job runs cancels it: what a sweep had finished stays in `keep`. What methods print goes to
stderr. A job that fails says why and the next one is taken.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from patchbay.errors import PatchbayError

EVERY = 0.15  # seconds between two words on progress
PIECES = 24  # batches of a sweep at least: as many times its map fills, and as finely it can be stopped


class Worker:
    """The model, and the job at hand."""

    def __init__(self, folder: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        self.folder, self.tell = folder, tell
        self.model: Any = None
        self.busy = False  # whether an interrupt means the job at hand
        self.telling = self.late = False
        self.said = self.drawn = 0.0

    def interrupted(self, number: int = signal.SIGINT, frame: Any = None) -> None:
        if self.telling:
            self.late = True
        elif self.busy:
            self.busy = False
            raise KeyboardInterrupt

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is done in here by the main thread is done to its end: an interrupt waits for it."""
        if threading.current_thread() is not threading.main_thread():  # where no interrupt is ever raised
            yield
            return
        self.telling = True
        try:
            yield
        finally:
            self.telling = False
            if self.late:
                self.late = False
                self.interrupted()

    def load(self, source: str, dictionaries: Sequence[str] = (), texts: str | None = None) -> None:
        """The model, proved, with features where dictionaries are given: these proved on the lines of the file `texts`."""
        from patchbay.cli.commands import load_model
        from patchbay.features.load import load_dictionary

        try:
            self.model = load_model(source, {}, quiet=True)
            if dictionaries:
                on = {} if texts is None else {"model": self.model, "texts": lines_of(texts)}
                self.model = self.model.with_dictionaries(*(load_dictionary(one, **on) for one in dictionaries))
            self.model.check  # noqa: B018  proved before it is said to be ready
        except Exception as error:
            self.tell({"event": "failed to load", "message": told(error)})
            return
        self.tell({"event": "ready"})

    def do(self, job: Mapping[str, Any]) -> None:
        """One job; whatever comes of it is told."""
        end: dict[str, Any] = {"id": job["id"], "event": "cancelled"}
        try:
            self.busy = True
            if self.model is None:
                raise PatchbayError("the model did not load")
            end |= (
                {"event": "answer", "answer": self.look(job)}
                if "look" in job
                else {"event": "done"} | (self.check(job) if job["room"] == "papers" else {"result": self.run(job)})
            )
        except KeyboardInterrupt:
            end["event"] = "cancelled"
        except BaseException as error:
            end |= {"event": "failed", "message": told(error)}
        finally:
            self.busy = False
        self.tell(end)

    def look(self, job: Mapping[str, Any]) -> dict[str, Any]:
        from patchbay.app.live import LIVE
        from patchbay.app.looks import LOOKS

        what, asked = str(job["look"]), job["asked"]
        if what in LIVE:
            return LIVE[what](
                self.model, asked, lambda piece: self.tell({"id": job["id"], "event": "piece", "piece": piece})
            )
        return LOOKS[what](self.model, asked)

    def check(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Check a paper's claim; its verdict with the numbers of every run."""
        from patchbay.papers import claims

        found = claims.check(str(job["method"]), self.model)
        lines = [f"{found.verdict}: {found.first.text}", *(line.strip() for line in found.told())]
        return {
            "result": None,
            "verdict": found.verdict,
            "weights": str(self.model.fingerprint)[:16],
            "message": "\n".join(lines),
        }

    def run(self, job: Mapping[str, Any]) -> str:
        """Call the method as its command would, and save what it returns."""
        from patchbay.app.forms import command
        from patchbay.cli import options
        from patchbay.cli.commands import called, read_call
        from patchbay.cli.signatures import parameters_of, source

        room, name = str(job["room"]), str(job["method"])
        takes = parameters_of(source(options.files(room)[name]), name)
        made = command(room, name)
        context = made.make_context(name, [str(self.model.source), *job["words"]], resilient_parsing=False)
        given = context.params | {"keep": job["keep"]}
        shown = {
            "progress": lambda done, total: self.far(job, done, total),
            "announce": lambda estimate: self.tell({"id": job["id"], "event": "estimate", "estimate": str(estimate)}),
            "partial": lambda entries, effects, unit: self.draw(job, entries, effects, unit),
            "pieces": PIECES,
        }
        call = read_call(self.model, takes, given)
        returned = called(options.load_method(room, name), call, self.model, given, shown)
        self.busy = False  # it is made: a late interrupt does not throw it away
        out = str(job["out"]) + ("" if hasattr(returned, "ranked") else ".knob")
        returned.save(self.folder / out)
        return out

    def far(self, job: Mapping[str, Any], done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said >= EVERY or done >= total:
            self.said = now
            self.tell({"id": job["id"], "event": "progress", "done": done, "total": total})

    def draw(self, job: Mapping[str, Any], entries: Sequence[Any], effects: Any, unit: str) -> None:
        """What the sweep at hand has found so far, several times a second, and once it is whole."""
        from patchbay.app.partial import partial_map

        now = time.monotonic()
        values = effects.tolist()
        if now - self.drawn >= EVERY or not any(value != value for value in values):
            self.drawn = now
            self.tell({"id": job["id"], "event": "partial", "map": partial_map(entries, values, unit)})


def lines_of(path: str) -> list[str]:
    """The texts of a file, one a line."""
    try:
        found = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PatchbayError(f"{path} cannot be read as texts, one a line of UTF-8: {error}") from error
    if not found:
        raise PatchbayError(f"{path} has no texts: one a line")
    return found


def told(error: BaseException) -> str:
    """Why a job failed, in the words that the command line has for it."""
    import click

    from patchbay.cli.spoken import spoken

    if isinstance(error, PatchbayError):
        return spoken(str(error), [])
    if isinstance(error, click.ClickException):
        return error.format_message()
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def lines(out: int, whole: Callable[[], AbstractContextManager[None]]) -> Callable[[dict[str, Any]], None]:
    """Write each line of JSON to a descriptor, from any thread, `whole`: an interrupt in the midst of one would join it with the next."""
    lock = threading.Lock()

    def tell(line: dict[str, Any]) -> None:
        from patchbay.draw.screen import plain

        said = (json.dumps(plain(line), ensure_ascii=True, allow_nan=False) + "\n").encode()
        with whole(), lock:
            while said:
                said = said[os.write(out, said) :]

    return tell


def main() -> None:
    """Serve jobs until stdin ends."""
    out = os.dup(1)
    os.dup2(2, 1)
    folder = Path(sys.argv[2]).resolve()
    worker = Worker(folder, print)
    worker.tell = lines(out, worker.whole)
    signal.signal(signal.SIGINT, worker.interrupted)
    os.chdir(folder)  # names of results, as in `attribution:3`, are names in it
    rest = sys.argv[3:]
    worker.load(sys.argv[1], *((rest[2:], rest[1]) if rest[:1] == ["--texts"] else (rest,)))
    for line in sys.stdin:
        worker.do(json.loads(line))


if __name__ == "__main__":
    main()
