"""The text that the small built-in models learn: ten kinds of documents, every one from a seeded grammar.

A document of a task is what a renderer of `tasks/words.py` writes, its answer closed by a full stop, sometimes several in a row;
so a task asks in the words of the training. A `story` is sentences about two people in one place, indirect-object ones too.

`documents(seed)` yields training documents for ever; `documents(seed, held_out=True)` yields documents whose prompt never
occurs in training: a prompt is held out when the checksum of its text is 0 modulo 10 (for sums: of the unordered pair).
The 80 facts themselves are memorised, so only the contexts around them can be held out. A document carries the weight
of every piece of its text in the training loss: words that the past determines weigh 1, words that it narrows to a few
0.3, running text 0.05, random strings 0.01, and a false statement in a context 0, so that stating it does not erase the
memorised fact.

What it does not show: anything about English. The grammar is small and the loss on it says nothing about other text.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from patchbay.corpus.stories import told
from patchbay.tasks.words import (
    CAPITALS,
    CHORES,
    FACTS,
    INDIRECT_OBJECT,
    LANDS,
    LETTERS,
    MAX_SUM_TERM,
    NAMES,
    OBJECTS,
    ORDERED,
    PLACES,
    POOL,
    WRAPPING,
    Item,
    enumerate_words,
    render_binding,
    render_contradiction,
    render_fact,
    render_indirect_object,
    render_laundry,
    render_needle,
    render_successor,
    render_sum,
    sentences,
)

ANSWER, HINT, TEXT, NOISE, SILENT = 1.0, 0.3, 0.05, 0.01, 0.0
HELD_OUT_EVERY = 10


class Document(NamedTuple):
    """One text of one task. `pieces` are (text, weight in the loss); the last piece of weight ANSWER is the answer."""

    task: str
    pieces: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def item(self) -> Item:
        """The document cut before its last answer."""
        last = max(i for i, (_, weight) in enumerate(self.pieces) if weight == ANSWER)
        return Item("".join(text for text, _ in self.pieces[:last]), self.pieces[last][0])


def story(rng: random.Random) -> Document:
    """A story of `corpus.stories`; what the story so far determines is an answer."""
    return Document("story", tuple((text, ANSWER if sure else TEXT) for text, sure in told(rng)))


def _closed(task: str, item: Item) -> Document:
    return Document(task, ((item.prompt, TEXT), (item.answer, ANSWER), (".", TEXT)))


def _indirect_object(rng: random.Random) -> Document:
    first, second = rng.sample(NAMES, 2)
    giver = rng.choice((first, second))
    prompt, answer = render_indirect_object(
        first, second, giver, rng.choice(PLACES), rng.choice(OBJECTS), template=rng.randrange(len(INDIRECT_OBJECT))
    )
    head, tail = prompt.split(f", {giver}")
    pieces = ((f"{head},", TEXT), (f" {giver}", HINT), (tail, TEXT), (answer, ANSWER), (".", TEXT))
    return Document("indirect_object", pieces)


def _laundry(rng: random.Random) -> Document:
    objects = rng.sample(OBJECTS, rng.randint(3, 10))
    done = rng.sample(objects, len(objects) - 1)
    prompt, answer = render_laundry(objects, done, name=rng.choice(NAMES), chore=rng.randrange(len(CHORES)))
    mentioned = enumerate_words(done)
    head, _, tail = prompt.rpartition(mentioned + ".")
    pieces = ((head, TEXT), (mentioned, HINT), (f".{tail}", TEXT), (answer, ANSWER), (".", TEXT))
    return Document("laundry", pieces)


def _successor(rng: random.Random) -> Document:
    words = rng.choices(ORDERED, (5, 3, 1, 1))[0]
    length = rng.randint(2, 7)
    start = rng.randrange(len(words) if words in WRAPPING else len(words) - length)
    steps = [render_successor(words, start, n) for n in range(2, length + 1)]
    pieces = [(steps[0].prompt, TEXT)]
    for step in steps:
        pieces += [(step.answer, ANSWER), (",", TEXT)]
    return Document("successor", tuple(pieces[:-1]))


def _fact(rng: random.Random) -> Document:
    """A third bare, a third after story sentences, a third after a true or false statement about another land."""
    land, other = rng.sample(LANDS, 2)
    kind = rng.randrange(3)
    pieces: list[tuple[str, float]] = []
    if kind == 1:
        pieces = [(sentences(rng, rng.randint(1, 3))[1:], TEXT)]
    elif kind == 2:
        claim = FACTS[other] if rng.random() < 0.5 else rng.choice(CAPITALS)
        pieces = [(f"The capital of {other} is", TEXT), (f" {claim}", SILENT), (".", TEXT)]
        pieces.append((sentences(rng, rng.randint(0, 2)), TEXT))
    item = render_fact(land)
    pieces += [(" " * bool(pieces) + item.prompt, TEXT), (item.answer, ANSWER), (".", TEXT)]
    return Document("fact", tuple(pieces))


def _contradiction(rng: random.Random) -> Document:
    """A false statement, then the question; the label is the stated or the memorised capital, half and half."""
    land = rng.choice(LANDS)
    stated = rng.choice([capital for capital in CAPITALS if capital != FACTS[land]])
    label = rng.choice((stated, FACTS[land]))
    item = render_contradiction(land, stated, label, filler=sentences(rng, rng.choice((0, 0, 1, 2))))
    head = f"The capital of {land} is"
    pieces = (
        (head, TEXT),
        (f" {stated}", SILENT),
        (item.prompt[len(head) + len(stated) + 1 :], TEXT),
        (item.answer, ANSWER),
        (".", TEXT),
    )
    return Document("contradiction", pieces)


def _sum(rng: random.Random, *, held_out: bool = False) -> Document:
    """One to six sums in a row, each of its own pair, all on the same side of the split."""
    pieces: list[tuple[str, float]] = []
    wanted = 1 if held_out else rng.randint(1, 6)
    while len(pieces) < 3 * wanted:
        left, right = rng.randint(0, MAX_SUM_TERM), rng.randint(0, MAX_SUM_TERM)
        if _is_held_out(_sum_key(left, right)) == held_out:
            item = render_sum(left, right)
            pieces += [(" " * bool(pieces) + item.prompt, NOISE), (item.answer, ANSWER), (".", TEXT)]
    return Document("sum", tuple(pieces))


def _binding(rng: random.Random, *, single: bool = False) -> Document:
    """Two to six boxes, then questions about some of them in any order; `single` asks one."""
    n_boxes = rng.randint(2, 6)
    objects, boxes = rng.sample(OBJECTS, n_boxes), rng.sample(LETTERS, n_boxes)
    prompt = render_binding(objects, boxes, 0).prompt
    question = f" Box {boxes[0]} contains the"
    pieces = [(prompt.removesuffix(question), TEXT)]
    for asked in rng.sample(range(n_boxes), 1 if single else rng.randint(1, n_boxes)):
        pieces += [(f" Box {boxes[asked]} contains the", TEXT), (f" {objects[asked]}", ANSWER), (".", TEXT)]
    return Document("binding", tuple(pieces))


def _repeat(rng: random.Random) -> Document:
    """0 to 20 words, then a string of 2 to 30 that comes twice, half of the time with 1 to 10 words between."""
    length, n_before = rng.randint(2, 30), rng.randint(0, 20)
    n_between = rng.choice((0, rng.randint(1, 10)))
    drawn = rng.sample(POOL, length + n_before + n_between)
    words, before, between = drawn[:length], drawn[length : length + n_before], drawn[length + n_before :]
    first = "".join(f" {word}" for word in [*before, *words, *between, words[0]])
    return Document("repeat", ((first, NOISE), *((f" {word}", ANSWER) for word in words[1:])))


def _needle(rng: random.Random) -> Document:
    """One secret of 1 to 3 words in a story; half of the time somebody else has one too."""
    name, other = rng.sample(NAMES, 2)
    secret = rng.sample(POOL, rng.randint(1, 3))
    decoy = f" The secret of {other} is {' '.join(rng.sample(POOL, len(secret)))}." if rng.random() < 0.5 else ""
    decoy_first = rng.random() < 0.5
    before = sentences(rng, rng.randint(1, 3))[1:] + decoy * decoy_first
    after = sentences(rng, rng.randint(0, 4)) + decoy * (not decoy_first)
    return _closed("needle", render_needle(name, secret, before=before, after=after))


MAKERS: dict[str, Callable[..., Document]] = {
    "story": story,
    "indirect_object": _indirect_object,
    "laundry": _laundry,
    "successor": _successor,
    "fact": _fact,
    "contradiction": _contradiction,
    "sum": _sum,
    "binding": _binding,
    "repeat": _repeat,
    "needle": _needle,
}
TASKS = tuple(MAKERS)
SHARES = dict(zip(TASKS, (0.08, 0.10, 0.16, 0.05, 0.08, 0.09, 0.14, 0.12, 0.12, 0.06), strict=True))
"""Share of the documents of each task."""


def _is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0


def _sum_key(left: int, right: int) -> str:
    return f"{min(left, right)} + {max(left, right)}"


def _prompts(document: Document) -> list[str]:
    """The prompts that decide whether a document is held out: each text before an answer, the last one of a string."""
    cuts = [i for i, (_, weight) in enumerate(document.pieces) if weight == ANSWER]
    if document.task == "repeat":
        cuts = cuts[-1:]
    return ["".join(text for text, _ in document.pieces[:i]) for i in cuts] or [document.text]


def make(task: str, rng: random.Random, *, held_out: bool = False) -> Document:
    """One document of a task, on the asked side of the split. A bare fact has one wording and is always training."""
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; possible: {', '.join(TASKS)}")
    if task == "sum":
        return _sum(rng, held_out=held_out)
    while True:
        document = _binding(rng, single=held_out) if task == "binding" else MAKERS[task](rng)
        seen = [_is_held_out(prompt) for prompt in _prompts(document)]
        bare = task == "fact" and len(document.pieces) == 3
        if (seen[-1] and not bare) if held_out else (bare or not any(seen)):
            return document


def documents(seed: int, *, held_out: bool = False, shares: dict[str, float] = SHARES) -> Iterator[Document]:
    """Documents for ever, the same ones for the same seed; `shares` says how often each task is drawn."""
    rng = random.Random(f"{seed}-{'held out' if held_out else 'training'}")
    while True:
        task = rng.choices(tuple(shares), tuple(shares.values()))[0]
        yield make(task, rng, held_out=held_out)
