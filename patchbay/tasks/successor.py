"""Successor: continue numbers, letters, days or months by the next one.

`5, 6, 7,` -> ` 8`      `Monday, Tuesday, Wednesday,` -> ` Thursday`      `October, November, December,` -> ` January`

The corrupted twin is another run of the same class and length. The wrong answers are the twin's answer and the last
word shown (what a model says that copies). Days and months begin again after the last; no run is long enough to show
its own answer. Classes as in Gould et al. 2023, "Successor Heads"; the wording is this project's own.

It tests whether a model knows the order of common words. A right answer may come from a remembered pair of words; that
one and the same mechanism serves all classes has to be shown by other means.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks import words
from patchbay.tasks.spell import Draft, at_least, choose_words, single_tokens, spans_in_order, spell, tokenizer_of

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task

CLASSES = {"numbers": words.NUMBERS, "letters": words.LETTERS, "days": words.DAYS, "months": words.MONTHS}
LENGTHS = (3, 6)
"""Shortest and longest run shown; six days do not yet name the seventh."""


@by_kind
def successor(model: Model, n: int = 100, *, kind: str = "all", length: int | None = None, seed: int = 0) -> Task:
    """Continue runs of `length` words (2 to 6; without a value 3 to 6 at random) of one kind, or of all.

    `kind` is numbers, letters, days, months or all; `all` takes those that the tokenizer has as single tokens and says
    which in `options`. Marks: `run` (the words shown), `last` (the last of them). Labels: `kind`, `length`, `start`.
    """
    tokenizer = tokenizer_of(model, "successor")
    if kind not in ("all", *CLASSES):
        raise PatchbayError(
            f"asked for kind={kind!r}; possible: all, {', '.join(CLASSES)}{suggest(kind, list(CLASSES))}"
        )
    if length is not None:
        at_least("length", length, 2, 6)
    lengths = range(LENGTHS[0], LENGTHS[1] + 1) if length is None else (length,)
    runs = {k: _runs(k, set(single_tokens(tokenizer, CLASSES[k])), lengths) for k in CLASSES if kind in ("all", k)}
    runs = {k: found for k, found in runs.items() if len(found) > 1}
    if not runs:
        tried = [word for k in CLASSES if kind in ("all", k) for word in CLASSES[k]]
        choose_words(model, "successor", f"{kind} words in a row", tried, len(tried))  # says what was found
        raise PatchbayError(f"successor: no two runs of {lengths[0]} {kind} words; possible: a shorter length")
    options = {"kind": kind, "kinds": list(runs), "length": length}
    return spell("successor", model, _drafts(runs, random.Random(f"successor-{seed}")), n, seed=seed, options=options)


def _runs(kind: str, known: set[str], lengths: range | tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, length) of every run whose words and answer are single tokens."""
    members = CLASSES[kind]
    wraps = members in words.WRAPPING
    return [
        (start, length)
        for length in lengths
        for start in range(len(members) if wraps else len(members) - length)
        if all(members[(start + i) % len(members)] in known for i in range(length + 1))
    ]


def _drafts(runs: dict[str, list[tuple[int, int]]], rng: random.Random) -> Iterator[Draft]:
    while True:
        kind = rng.choice(list(runs))
        start, length = rng.choice(runs[kind])
        others = [run for run in runs[kind] if run[1] == length and run[0] != start]
        if not others:
            continue
        twin = words.render_successor(CLASSES[kind], rng.choice(others)[0], length)
        prompt, answer = words.render_successor(CLASSES[kind], start, length)
        shown = prompt.rstrip(",").split(", ")
        placed = spans_in_order(prompt, shown)
        yield Draft(
            prompt,
            answer,
            tuple(dict.fromkeys((twin.answer, f" {shown[-1]}"))),
            twin.prompt,
            marks={"run": placed, "last": placed[-1:]},
            labels={"kind": kind, "length": length, "start": start},
        )
