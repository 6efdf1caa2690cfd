"""Known circuits: programs compiled into GPT-2 weights, each with a task whose twins differ in what it computes.

copy_previous     the letter before                                     one head
exclusive_or      whether one and only one of two letters occurred      two counting heads, neurons
histogram         how often this letter has occurred                    a counting head, neurons
indirect_object   the one of two names that did not give                a head that tells a second one whom not to name
induction         what followed this letter the last time               two heads in a row
last_first        the first letter, asked at the end                    a head that looks at a place
modular_sum       two digits, added modulo ten                          a head, neurons
more_open         whether more was opened than closed                   two counting heads, neurons
pointer           the letter at the place that a digit names            a head whose query is a token
recall            the digit that stood after this key                   two heads in a row
successor         the next letter                                       neurons alone
two_hop           the value of the value of a key                       three heads in a row

`make(name)` returns the `Compiled` model with its words and its true graph; `task(made, ...)` prompts for it, of one length
each. Every other head and neuron is a distractor of random weights. `superposed` below 1 lets the codes of values overlap.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks.task import Task
from patchbay.tiny.compiler import Compiled, compile_program
from patchbay.tiny.programs import Value, Variable, count, mapped, pick, positions, same, tokens

LETTERS, DIGITS = tuple("abcdefgh"), tuple("0123456789")
N_PLACES = 12
Draw = Callable[[random.Random], list[Value]]


@dataclass(frozen=True)
class Program:
    """The answer of a program, and how one of its prompts is drawn."""

    answer: Callable[[], Variable]
    draw: Draw


def make(name: str, *, superposed: float = 1.0, seed: int = 0) -> Compiled:
    """The compiled model of one program."""
    return compile_program(_program(name).answer(), superposed=superposed, seed=seed)


def task(name: str, made: Compiled, n: int = 64, *, seed: int = 0) -> Task:
    """`n` different prompts of a program; a prompt's twin is another of its length with another answer, the wrong one."""
    draw, rng = _program(name).draw, random.Random(f"{name}-{seed}")
    clean: list[tuple[int, ...]] = []
    twins: list[tuple[int, ...]] = []
    right: list[int] = []
    wrong: list[tuple[int, ...]] = []
    while len(clean) < n:
        prompt, twin = draw(rng), draw(rng)
        answers = [made.expected(words) for words in (prompt, twin)]
        ids = [made.ids(words) for words in (prompt, twin)]
        if None in answers or answers[0] == answers[1] or len(ids[0]) != len(ids[1]):
            continue
        clean.append(tuple(ids[0]))
        twins.append(tuple(ids[1]))
        right.append(made.words.index(answers[0]))
        wrong.append((made.words.index(answers[1]),))
    return Task(
        name=name,
        clean=tuple(clean),
        right=tuple(right),
        wrong=tuple(wrong),
        corrupted=tuple(twins),
        metric="logit_diff",
        seed=seed,
    )


def _program(name: str) -> Program:
    if name not in PROGRAMS:
        raise PatchbayError(f"no program {name!r}; programs are {', '.join(PROGRAMS)}{suggest(name, list(PROGRAMS))}")
    return PROGRAMS[name]


# ---- programs --------------------------------------------------------------------------------------------------------


def _back(name: str, words: Variable, distance: int) -> Variable:
    """The token that stands `distance` places back."""
    places = positions(N_PLACES)
    return pick(name, places, places, lambda key, query: bool(key == query - distance), words)


def _key_before(words: Variable) -> Variable:
    """At every second place, the token before: of pairs of a key and its value, the key."""
    places = positions(N_PLACES)
    return pick("key", places, places, lambda key, query: query % 2 == 1 and key == query - 1, words)


def _copy_previous() -> Variable:
    return _back("answer", tokens(LETTERS), 1)


def _induction() -> Variable:
    words = tokens(LETTERS)
    return pick("answer", _back("letter before", words, 1), words, same, words)


def _recall() -> Variable:
    words = tokens((*LETTERS, *DIGITS))
    return pick("answer", _key_before(words), words, same, words)


def _two_hop() -> Variable:
    words = tokens(LETTERS)
    key = _key_before(words)
    return pick("answer", key, pick("value", key, words, same, words), same, words)


def _indirect_object() -> Variable:
    words = tokens((*LETTERS, "gave", "to"))
    giver = _back("giver", words, 2)
    return pick("answer", words, giver, lambda key, query: key in LETTERS and key != query, words)


def _last_first() -> Variable:
    places = positions(N_PLACES)
    return pick("answer", places, places, lambda key, query: key == 0, tokens(LETTERS))


def _pointer() -> Variable:
    words = tokens((*LETTERS, *DIGITS[:6]))
    return pick("answer", positions(N_PLACES), words, lambda key, query: str(key) == query, words)


def _histogram() -> Variable:
    words = tokens((*LETTERS[:4], *DIGITS[:7]))
    return mapped("answer", lambda n: DIGITS[n], count("occurrences", words, words, same, 6))


def _modular_sum() -> Variable:
    words = tokens((*DIGITS, "+"))

    def add(a: str, b: str) -> str | None:
        return None if "+" in (a, b) else DIGITS[(int(a) + int(b)) % 10]

    return mapped("answer", add, _back("first digit", words, 2), words)


def _successor() -> Variable:
    return mapped("answer", lambda letter: LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)], tokens(LETTERS))


def _counted(words: Variable, token: str, most: int) -> Variable:
    return count(f"how many {token}", words, words, lambda key, query: bool(key == token), most)


def _exclusive_or() -> Variable:
    words = tokens((*LETTERS, "yes", "no"))
    both = (_counted(words, letter, 1) for letter in "ab")
    return mapped("answer", lambda a, b: "yes" if a != b else "no", *both)


def _more_open() -> Variable:
    words = tokens(("(", ")", "x", "yes", "no"))
    both = (_counted(words, bracket, 6) for bracket in "()")
    return mapped("answer", lambda opened, closed: "yes" if opened > closed else "no", *both)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _letters(n: int, of: int = 8) -> Draw:
    return lambda rng: [rng.choice(LETTERS[:of]) for _ in range(n)]


def _once_before(rng: random.Random) -> list[Value]:
    letters = rng.sample(LETTERS, len(LETTERS))
    return [*letters, letters[rng.randrange(len(letters) - 1)]]


def _keys_and_digits(rng: random.Random) -> list[Value]:
    keys = rng.sample(LETTERS, 4)
    return [*(word for key in keys for word in (key, rng.choice(DIGITS))), rng.choice(keys)]


def _chains(rng: random.Random) -> list[Value]:
    """Five pairs: a first key to a middle one, the middle one to a last, others; then the first key again."""
    first, middle, last, *others = rng.sample(LETTERS, 8)
    pairs = [(first, middle), (middle, last), (others[0], others[1]), (others[2], others[3]), (others[4], first)]
    rng.shuffle(pairs)
    return [*(word for pair in pairs for word in pair), rng.choice([first, others[4]])]


def _names(rng: random.Random) -> list[Value]:
    one, other = rng.sample(LETTERS, 2)
    return [one, other, rng.choice((one, other)), "gave", "to"]


def _pointed(rng: random.Random) -> list[Value]:
    return [*(rng.choice(LETTERS) for _ in range(6)), rng.choice(DIGITS[:6])]


def _sums(rng: random.Random) -> list[Value]:
    return [rng.choice(DIGITS), "+", rng.choice(DIGITS)]


def _brackets(rng: random.Random) -> list[Value]:
    return [rng.choice("()x") for _ in range(7)]


def _marked(rng: random.Random) -> list[Value]:
    """At most one a and one b among other letters, none of them last."""
    word = [rng.choice(LETTERS[2:]) for _ in range(7)]
    for letter, place in zip("ab", rng.sample(range(6), 2), strict=True):
        word[place] = letter if rng.random() < 0.5 else word[place]
    return word


PROGRAMS = {
    "copy_previous": Program(_copy_previous, _letters(8)),
    "exclusive_or": Program(_exclusive_or, _marked),
    "histogram": Program(_histogram, _letters(6, 4)),
    "indirect_object": Program(_indirect_object, _names),
    "induction": Program(_induction, _once_before),
    "last_first": Program(_last_first, _letters(8)),
    "modular_sum": Program(_modular_sum, _sums),
    "more_open": Program(_more_open, _brackets),
    "pointer": Program(_pointer, _pointed),
    "recall": Program(_recall, _keys_and_digits),
    "successor": Program(_successor, _letters(4)),
    "two_hop": Program(_two_hop, _chains),
}
