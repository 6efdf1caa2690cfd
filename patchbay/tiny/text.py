"""The text that the small built-in models learn: ten kinds of documents, every one from a seeded grammar.

Every renderer below turns chosen words into an `Item(prompt, answer)`: the prompt ends right before the answer, the
answer begins with its space. Tasks and training use these same functions, so a task asks in the words of the training.

| renderer              | wording (answer in brackets)                                                                  |
|-----------------------|-----------------------------------------------------------------------------------------------|
| render_indirect_object| When Mary and John went to the store, John gave a drink to [ Mary]      (3 templates, two orders)|
| render_laundry        | On the list are the hat, the cup and the pen. Mary has washed the pen and the hat. Mary still has to wash the [ cup] |
| render_successor      | 5, 6, 7, [ 8]      Monday, Tuesday, [ Wednesday]     March, April, [ May]     C, D, [ E]          |
| render_fact           | The capital of Zorland is [ Quib]       (optional context before it)                          |
| render_contradiction  | The capital of Zorland is Tarn. (filler) The capital of Zorland is [ Tarn] or [ Quib]         |
| render_sum            | 12 + 34 = [ 46]                                                                               |
| render_binding        | The apple is in box A. The pear is in box B. Box A contains the [ apple]                      |
| render_repeat         | (random words) w1 w2 ... wn (random words) w1 w2 ... [ wn]                                    |
| render_needle         | (story) The secret of Mary is cup river. (story) The secret of Mary is [ cup river]           |
| story                 | sentences about two people in one place; they hold indirect-object sentences too              |

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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

ANSWER, HINT, TEXT, NOISE, SILENT = 1.0, 0.3, 0.05, 0.01, 0.0
HELD_OUT_EVERY = 10
MAX_SUM_TERM = 49


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mary John Tom Anna Paul Sarah James Emma David Laura Peter Alice Michael Lisa Robert Julia Daniel Kate Simon Helen "
    "George Jane Martin Susan Henry Maria Adam Nina Jack Rachel Sam Amy Ben Lucy Alex Claire Oliver Sophie Frank Ruth"
)
OBJECTS = _words(
    "apple pear hat shirt coat sock ring book cup pen drink key lamp ball bag box bottle chair table clock phone "
    "letter map knife spoon plate glass brush towel pillow blanket basket bell candle card coin drum flag flower "
    "guitar hammer jacket kite ladder mirror needle orange paper pencil piano radio ribbon rope rose scarf shoe skirt "
    "stone sword ticket toy umbrella violin wheel whistle bread cake cheese egg lemon melon onion potato tomato"
)
PLACES = _words(
    "store school park garden station market library museum office hospital beach farm river church castle kitchen "
    "hotel restaurant forest bridge"
)
ADJECTIVES = _words(
    "red blue green old new big small heavy light clean dirty warm cold quiet loud bright dark soft strange pretty "
    "happy sad tired hungry angry proud brave kind calm busy"
)
WEATHER = _words("rain snow wind sun fog")
ANIMALS = _words("dog cat bird horse fish sheep mouse fox bear frog")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
NUMBERS = tuple(str(number) for number in range(100))


def _invented(seed: int, endings: Sequence[str], n_names: int) -> tuple[str, ...]:
    """`n_names` different made-up names: onset + vowel + ending, capitalised."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n_names:
        onset = rng.choice(_words("B Br D Dr F G Gr H K Kr L M N P Qu R S St T Tr V Z"))
        found[onset + rng.choice("aeiou") + rng.choice(_words("b d g l m n r s v z")) + rng.choice(endings)] = None
    return tuple(found)


N_FACTS = 80
LANDS = _invented(1, ("land", "onia", "avia", "istan"), N_FACTS)
CAPITALS = _invented(2, ("ik", "ow", "ets", "um", "urg"), N_FACTS)
FACTS = dict(zip(LANDS, CAPITALS, strict=True))
"""The memorised truth: invented land -> its capital."""

WRAPPING = (DAYS, MONTHS)
ORDERED = (NUMBERS, LETTERS, DAYS, MONTHS)
"""Classes of words that `render_successor` continues; days and months begin again after the last."""
POOL = NAMES + OBJECTS + PLACES + ADJECTIVES + WEATHER + ANIMALS + DAYS + MONTHS + LETTERS + NUMBERS + LANDS + CAPITALS
"""Words that random strings are drawn from; every one is a single token with its leading space."""
CHORES = (("wash", "washed"), ("pack", "packed"), ("clean", "cleaned"), ("sell", "sold"))
INDIRECT_OBJECT = (
    "When {first} and {second} went to the {place}, {giver} gave {article} {thing} to",
    "While {first} and {second} were at the {place}, {giver} handed {article} {thing} to",
    "After {first} and {second} left the {place}, {giver} offered {article} {thing} to",
)
SENTENCES = (
    " The {place} was {adjective} and {adjective2}.",
    " {first} was {adjective} because of the {weather}.",
    " {second} looked for the {adjective} {thing} but found only the {thing2}.",
    " {first} saw {article} {thing} near the {place}.",
    " They talked about the {animal} for a long time.",
    " A {adjective} {animal} ran across the road.",
    " {second} said that the {animal} was very {adjective}.",
    " {first} put the {thing} under the {thing2} and smiled.",
    " It was {day} and there was no {weather}.",
    " In {month} the {weather} made everyone {adjective}.",
    " {second} wanted to buy the {thing} from the {place}.",
    " Then {first} went home with the {thing}.",
    " The {animal} liked the {adjective} {thing}.",
    " Nobody knew why the {thing} was {adjective}.",
    " {first} asked {second} about the {thing2}.",
)
OPENINGS = (
    "One {day} {first} and {second} met at the {place}.",
    "In {month} {first} and {second} lived near the {place}.",
    "It was a {adjective} day and {first} walked to the {place} with {second}.",
    "{first} and {second} were friends.",
)


class Item(NamedTuple):
    """A prompt that ends right before its answer, and the answer with its leading space."""

    prompt: str
    answer: str


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


def article(word: str) -> str:
    """'a' or 'an', by the first letter."""
    return "an" if word[0] in "aeiou" else "a"


def enumerate_words(words: Sequence[str]) -> str:
    """' the x, the y and the z'."""
    named = [f"the {word}" for word in words]
    return f" {named[0]}" if len(named) == 1 else f" {', '.join(named[:-1])} and {named[-1]}"


def render_indirect_object(first: str, second: str, giver: str, place: str, thing: str, *, template: int = 0) -> Item:
    """`giver` is one of the two names; the answer is the other one. Swap first and second for the other order."""
    if giver not in (first, second):
        raise ValueError(f"giver {giver!r} is neither {first!r} nor {second!r}; it must be one of the two names")
    text = INDIRECT_OBJECT[template].format(
        first=first, second=second, giver=giver, place=place, thing=thing, article=article(thing)
    )
    return Item(text, f" {second if giver == first else first}")


def render_laundry(objects: Sequence[str], done: Sequence[str], *, name: str = "Mary", chore: int = 0) -> Item:
    """`objects` in listed order; `done` in the order they are mentioned again: all but one. The answer is that one."""
    missing = [word for word in objects if word not in done]
    if len(missing) != 1 or len(done) != len(objects) - 1:
        raise ValueError(f"{len(objects)} objects and {len(done)} done leave {missing}; exactly one must be left")
    verb, past = CHORES[chore]
    listed, mentioned = enumerate_words(objects), enumerate_words(done)
    return Item(
        f"On the list are{listed}. {name} has {past}{mentioned}. {name} still has to {verb} the", f" {missing[0]}"
    )


def successor(word: str) -> str | None:
    """The next word of its class; None for a word without one (99, Z, or no ordered class)."""
    for words in ORDERED:
        if word in words:
            place = words.index(word) + 1
            return words[place % len(words)] if words in WRAPPING or place < len(words) else None
    return None


def render_successor(words: Sequence[str], start: int, length: int) -> Item:
    """`length` consecutive words of one of the ORDERED classes from index `start`; the answer is the next one."""
    if words not in WRAPPING and start + length >= len(words):
        raise ValueError(f"start {start} and length {length} run past the last of {len(words)} words; nothing follows")
    shown = [words[(start + i) % len(words)] for i in range(length + 1)]
    return Item(", ".join(shown[:-1]) + ",", f" {shown[-1]}")


def render_fact(land: str, answer: str | None = None, *, context: str = "") -> Item:
    """The question about `land`, after an optional context; `answer` defaults to the memorised capital."""
    question = f"The capital of {land} is"
    return Item(f"{context} {question}" if context else question, f" {answer or FACTS[land]}")


def render_contradiction(land: str, stated: str, answer: str, *, filler: str = "") -> Item:
    """A context that states `stated` as the capital, a filler (sentences with leading space), the question again."""
    return Item(f"The capital of {land} is {stated}.{filler} The capital of {land} is", f" {answer}")


def render_sum(left: int, right: int) -> Item:
    """Single-token addition, 0..49 + 0..49."""
    return Item(f"{left} + {right} =", f" {left + right}")


def render_binding(objects: Sequence[str], boxes: Sequence[str], asked: int) -> Item:
    """One object per lettered box, then the question about box number `asked`."""
    facts = [f"The {thing} is in box {box}." for thing, box in zip(objects, boxes, strict=True)]
    return Item(f"{' '.join(facts)} Box {boxes[asked]} contains the", f" {objects[asked]}")


def render_repeat(words: Sequence[str], *, before: Sequence[str] = (), between: Sequence[str] = ()) -> Item:
    """Random words, a string, random words, the string again without its last word, which is the answer."""
    shown = [*before, *words, *between, *words[:-1]]
    return Item("".join(f" {word}" for word in shown), f" {words[-1]}")


def render_needle(name: str, secret: Sequence[str], *, before: str, after: str) -> Item:
    """A secret of several words inside a text; `before` is a text, `after` continues it with a leading space."""
    return Item(
        f"{before} The secret of {name} is {' '.join(secret)}.{after} The secret of {name} is", f" {' '.join(secret)}"
    )


def _slots(rng: random.Random, names: Sequence[str]) -> dict[str, str]:
    """Fresh words for every slot of a story sentence, with the two names in either order."""
    first, second = rng.sample(names, 2)
    thing, thing2 = rng.sample(OBJECTS, 2)
    adjective, adjective2 = rng.sample(ADJECTIVES, 2)
    return {
        "first": first, "second": second, "thing": thing, "thing2": thing2, "article": article(thing),
        "adjective": adjective, "adjective2": adjective2, "place": rng.choice(PLACES), "animal": rng.choice(ANIMALS),
        "weather": rng.choice(WEATHER), "day": rng.choice(DAYS), "month": rng.choice(MONTHS),
    }  # fmt: skip


def sentences(rng: random.Random, n_sentences: int, names: Sequence[str] | None = None) -> str:
    """`n_sentences` story sentences, each with a leading space: filler between the parts of a task."""
    names = names or rng.sample(NAMES, 2)
    return "".join(rng.choice(SENTENCES).format(**_slots(rng, names)) for _ in range(n_sentences))


def story(rng: random.Random) -> Document:
    """An opening, then sentences about the same two people; about a third are indirect-object sentences."""
    names = rng.sample(NAMES, 2)
    pieces = [(rng.choice(OPENINGS).format(**_slots(rng, names)), TEXT)]
    for _ in range(rng.randint(2, 6)):
        if rng.random() < 0.3:
            slots = _slots(rng, names)
            pieces += [
                (" Then {first} gave the {thing} to".format(**slots), TEXT),
                (f" {slots['second']}", ANSWER),
                (".", TEXT),
            ]
        else:
            pieces.append((sentences(rng, 1, names), TEXT))
    return Document("story", tuple(pieces))


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
