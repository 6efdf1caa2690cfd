"""The one thread that runs the model: requests wait in line, join the batch at its next token, and leave when they end.

A turn is: those that nobody waits for leave; those for whom there is room are let in; up to `chunk` tokens of prompts run, so that a long
prompt does not hold up others; each text of the batch goes one token on. What a text's first token needs is its prompt alone, so it is
told before the text joins.

Room is counted in columns of the batch: rows times the length that the longest may come to have, prompts and new tokens together.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchbay.errors import PatchbayError
from patchbay.model.generate import Asked as Options
from patchbay.model.model import Model
from patchbay.serve.choosing import Told, own_steps, told
from patchbay.serve.guard import Refusal, noted
from patchbay.serve.joined import Alone, Joined, Text, fits, joins
from patchbay.serve.prefill import Prefill
from patchbay.serve.room import Counts, Room, check
from patchbay.serve.work import Line, Prompt, Work


@dataclass(eq=False)
class Started:
    """A work whose prompt is on its way, and what an echo has heard of it."""

    work: Work
    prefill: Prefill | None
    heard: list[Told] = field(default_factory=list)
    apart: bool = False  # it failed beside others: which of them was it?

    @property
    def shares(self) -> bool:
        """Whether its prompt may run beside others of its length."""
        return self.prefill is not None and not self.prefill.done and not self.apart and not self.work.echo


class Engine:
    """Runs works on one model. `submit` and `cancel` may be called from any thread."""

    def __init__(self, model: Model, room: Room | None = None) -> None:
        model.check_mode()
        self.model, self.room, self.counts = model, room or Room(), Counts()
        self.tokenizer = copy.deepcopy(model._need_tokenizer())  # the reader's is not to be used by two threads at once
        self.ends = frozenset(Options(model, {}).ends)
        self.own = own_steps(model)
        self.joined = Joined(model)
        self.lines: list[Line] = []  # of the batch, in its order
        self.apart: list[tuple[Line, Alone]] = []
        self.started: list[Started] = []
        self.waiting: deque[Work] = deque()
        self.lock = threading.Condition()
        self.draining = self.closed = False
        self.thread = threading.Thread(target=self._run, name="patchbay-engine", daemon=True)

    # ---- from other threads ----

    def start(self) -> Engine:
        self.thread.start()
        return self

    def submit(self, works: Sequence[Work]) -> None:
        """Put the works of a request in line, all or none. Raises Refusal: 429 where the line is full, 503 while it ends."""
        for work in works:
            check(work, self.room, self.model)
        with self.lock:
            if self.draining or self.closed:
                raise Refusal(503, "the server is ending", code="ending", headers={"retry-after": "5"})
            if len(self.waiting) + len(works) > self.room.queue:
                message = f"{len(self.waiting)} prompts wait already, {self.room.queue} may; try again later"
                raise Refusal(429, message, code="queue_full", headers={"retry-after": "1"})
            for work in works:
                work.begun = time.monotonic()
            self.waiting.extend(works)
            self.lock.notify()

    def cancel(self, works: Sequence[Work]) -> None:
        """Nobody waits for these any longer: their rows are free at the next token."""
        for work in works:
            work.gone = True
        with self.lock:
            self.lock.notify()

    def drain(self) -> None:
        """Take nothing more; what was taken ends."""
        self.draining = True

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.started or self.lines or self.apart)

    def close(self) -> None:
        """End the thread; what still runs is told so."""
        with self.lock:
            self.closed = True
            self.lock.notify()
        if self.thread.is_alive():
            self.thread.join()

    # ---- the thread ----

    def _run(self) -> None:
        while True:
            with self.lock:
                while self.idle and not self.closed:
                    self.lock.wait()
            if self.closed:
                self._fail_all(Refusal(503, "the server ended", code="ending"))
                return
            try:
                self.turn()
            except Exception as error:  # of this file's own: no row may be in a state that nobody knows
                self._fail_all(self._failure(error))

    def turn(self) -> None:
        self._drop()
        self._admit()
        self._prompts()
        self._step()
        self._step_apart()

    def _drop(self) -> None:
        with self.lock:
            self.waiting = deque(work for work in self.waiting if not work.gone)
        self.started = [one for one in self.started if not one.work.gone]
        self._leave([line for line in self.lines if line.work.gone])
        self._leave_apart([line for line, _ in self.apart if line.work.gone])

    def _admit(self) -> None:
        while True:
            running = (
                [one.work for one in self.started]
                + [line.work for line in self.lines]
                + [x.work for x, _ in self.apart]
            )
            n_rows = sum(one.work.n for one in self.started) + len(self.lines) + len(self.apart)
            with self.lock:
                if not self.waiting:
                    return
                work = self.waiting[0]
                width = max(one.total for one in [work, *running])
                if (n_rows + work.n) * width > self.room.batch_tokens or n_rows + work.n > self.room.rows:
                    return
                self.waiting.popleft()
            self.started.append(self._begun(work))

    def _begun(self, work: Work) -> Started:
        started = Started(work, None)
        if fits(self.model, Text(list(work.ids), work.edits), work.n_new):
            heard = (lambda logits, at: self._hear(started, logits, at)) if work.echo else None
            started.prefill = Prefill(self.model, [work.ids], [work.edits], heard)
        return started

    def _hear(self, started: Started, logits: Tensor, at: int) -> None:
        """What the prompt's own tokens are worth, of a chunk: logits after token `at` and those that follow."""
        work = started.work
        if work.logprobs is not None:
            after = work.ids[at + 1 : at + 1 + len(logits)]
            started.heard += told(logits[: len(after)], after, work.logprobs) if after else []

    # ---- prompts ----

    def _prompts(self) -> None:
        """Some of the prompts that wait, those of the first one's length together."""
        budget = self.room.chunk
        while self.started and budget > 0:
            group = self._group(budget)
            try:
                budget -= self._forward(group, budget)
            except Exception as error:
                if len(group) > 1 and all(one in self.started for one in group):
                    for one in group:
                        one.apart = True
                    continue
                self.started = [one for one in self.started if one not in group]
                failure = self._failure(error)
                for one in group:
                    one.work.gone = True
                    one.work.tell(failure)

    def _group(self, budget: int) -> list[Started]:
        first = self.started[0]
        n = len(first.work.ids)
        if not first.shares:
            return [first]
        return [one for one in self.started if one.shares and len(one.work.ids) == n][: max(1, budget // n)]

    def _forward(self, group: list[Started], budget: int) -> int:
        """Run some of a prompt, or several whole ones of one length; those that are whole get their first tokens and join. Returns the
        number of tokens that ran."""
        prefill = group[0].prefill
        if prefill is None:
            self._begin_apart(group[0])
            return len(group[0].work.ids)
        if len(group) > 1:
            prefill = Prefill(self.model, [one.work.ids for one in group], [one.work.edits for one in group])
        before = prefill.left
        prefill.run(before if len(group) > 1 or joins(self.model) != "chunks" else budget)
        if not prefill.left:
            self._join(group, prefill)
        return (before - prefill.left) * len(group)

    def _join(self, group: list[Started], prefill: Prefill) -> None:
        lines: list[Line] = []
        rows: list[int] = []  # of each line, the row of the run that it goes on from
        for row, started in enumerate(group):
            self.started.remove(started)
            going = self._firsts(started, prefill.logits[row])
            lines, rows = lines + going, rows + [row] * len(going)
        if lines:
            if rows != list(range(len(group))):
                prefill.cache.reorder_cache(torch.tensor(rows, device=self.model.device))
            self.joined.join([line.text for line in lines], prefill.cache)
            self.lines += lines

    def _firsts(self, started: Started, logits: Tensor) -> list[Line]:
        """The choices of a work, each with its first token; those that go on."""
        work = started.work
        self.counts.prompt_tokens += len(work.ids)
        if work.echo:
            work.tell(Prompt((Told(work.ids[0], None), *started.heard) if work.logprobs is not None else ()))
        lines = [Line(work, choice, self.own, self.tokenizer, self.ends) for choice in range(work.n)]
        for line in lines:
            if work.n_new:
                self._choose(line, logits)
            else:
                line.finish("length")
        self.counts.first_seconds, self.counts.firsts = (
            self.counts.first_seconds + time.monotonic() - work.begun,
            self.counts.firsts + 1,
        )
        return [line for line in lines if not line.over]

    def _begin_apart(self, started: Started) -> None:
        """A work whose texts run by themselves."""
        self.started.remove(started)
        work, first = started.work, None
        runs: list[Alone] = []
        for _ in range(work.n):
            runs.append(Alone(self.model, Text(list(work.ids), work.edits), work.n_new))
            logits = runs[-1].start()
            if first is None:
                first = logits[-1]
                if work.echo:
                    self._hear(started, logits, 0)
        assert first is not None
        lines = self._firsts(started, first)
        for line in lines:
            run = runs[line.choice]
            run.text = line.text
            self.apart.append((line, run))
        for run in runs:
            if run not in [one for _, one in self.apart]:
                run.close()

    # ---- tokens ----

    def _step(self) -> None:
        if not self.lines:
            return
        try:
            logits = self.joined.step([line.next for line in self.lines])
        except Exception as error:
            failed, self.lines, self.joined = self.lines, [], _fresh(self.joined)
            _tell_once(failed, self._failure(error))
            return
        self.counts.steps += 1
        likeliest = logits.argmax(-1, keepdim=True)  # of what is no number, that
        tops = logits.gather(1, likeliest)[:, 0].tolist()
        for at, (line, token) in enumerate(zip(self.lines, likeliest[:, 0].tolist(), strict=True)):
            if math.isnan(tops[at]):
                self._no_number(line)
            else:
                self._choose(line, logits[at], token)
        self._leave([line for line in self.lines if line.over])

    def _step_apart(self) -> None:
        for line, run in list(self.apart):
            try:
                self._choose(line, run.step(line.next))
            except Exception as error:
                line.over = True
                _tell_once([line], self._failure(error))
        self._leave_apart([line for line, _ in self.apart if line.over])

    def _choose(self, line: Line, logits: Tensor, likeliest: int | None = None) -> None:
        """The next token of a text, told."""
        if likeliest is None and bool((logits != logits).any()):
            return self._no_number(line)
        work = line.work
        if line.chooser.plain and likeliest is not None:
            token = likeliest
        else:
            token = line.chooser.choose(line.text.ids, logits)
        about = () if work.logprobs is None else tuple(told(logits[None], [token], work.logprobs))
        self.counts.new_tokens += 1
        line.take(token, about)
        return None

    def _no_number(self, line: Line) -> None:
        line.over = True
        line.events(
            Refusal(400, "under these knobs the model's logits are no numbers; turn them less", code="no_numbers")
        )
        line.work.gone = True

    def _leave(self, gone: Sequence[Line]) -> None:
        self.joined.leave([line.text for line in gone])
        self.lines = [line for line in self.lines if line not in gone]

    def _leave_apart(self, gone: Sequence[Line]) -> None:
        for line, run in self.apart:
            if line in gone:
                run.close()
        self.apart = [pair for pair in self.apart if pair[0] not in gone]

    # ---- failures ----

    def _failure(self, error: BaseException) -> Refusal:
        """What is told of an error: a refusal in its own words, anything else by an id."""
        if isinstance(error, PatchbayError):
            return Refusal(400, str(error), code="refused")
        self.counts.failures += 1
        id = noted(error)
        return Refusal(500, f"an error of the server's own; in its log under {id}", code=id)

    def _fail_all(self, refusal: Refusal) -> None:
        with self.lock:
            works = list(self.waiting)
            self.waiting.clear()
        works += [one.work for one in self.started]
        self.started = []
        for work in works:
            work.tell(refusal)
        _tell_once([*self.lines, *(line for line, _ in self.apart)], refusal)
        self._leave_apart([line for line, _ in self.apart])
        self.lines, self.joined = [], _fresh(self.joined)


def _tell_once(lines: Sequence[Line], refusal: Refusal) -> None:
    for work in dict.fromkeys(line.work for line in lines):
        work.gone = True
        work.tell(refusal)


def _fresh(joined: Joined) -> Joined:
    """An empty batch in the place of one that failed."""
    joined.close()
    return Joined(joined.model)


__all__ = ["Counts", "Engine", "Room"]
