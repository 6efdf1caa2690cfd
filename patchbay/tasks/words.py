"""The words and wordings of the tasks: lists of words, one renderer per task, and filler sentences.

A renderer turns chosen words into an `Item(prompt, answer)`: the prompt ends right before its answer, and the answer
begins with its space. The built-in models are trained on these same wordings, so what they are asked is what they saw;
another model meets them for the first time. Plain text only: `spell.py` turns it into tokens.

| renderer              | wording (answer in brackets)                                                                  |
|-----------------------|-----------------------------------------------------------------------------------------------|
| render_indirect_object| When Mary and John went to the store, John gave a drink to [ Mary]      (3 templates, two orders)|
| render_laundry        | On the list are the hat, the cup and the pen. Mary has washed the pen and the hat. Mary still has to wash the [ cup] |
| render_successor      | 5, 6, 7, [ 8]      Monday, Tuesday, [ Wednesday]     March, April, [ May]     C, D, [ E]          |
| render_fact           | The capital of Zorland is [ Quib]       (optional context before it)                          |
| render_contradiction  | The capital of Zorland is Tarn. (filler) The capital of Zorland is [ Tarn] or [ Quib]         |
| render_sum            | 12 + 34 = [ 46]                                                                               |
| render_binding        | The apple is in box A. The pear is in box B. Box A contains the [ apple]                      |
| render_needle         | (story) The secret of Mary is cup river. (story) The secret of Mary is [ cup river]           |
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

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


def render_needle(name: str, secret: Sequence[str], *, before: str, after: str) -> Item:
    """A secret of several words inside a text; `before` is a text, `after` continues it with a leading space."""
    return Item(
        f"{before} The secret of {name} is {' '.join(secret)}.{after} The secret of {name} is", f" {' '.join(secret)}"
    )


def fresh_words(rng: random.Random, names: Sequence[str]) -> dict[str, str]:
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
    return "".join(rng.choice(SENTENCES).format(**fresh_words(rng, names)) for _ in range(n_sentences))
