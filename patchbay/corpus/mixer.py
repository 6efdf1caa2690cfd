"""Mixer: taggers say what a text is like, rules say which texts stay, shares say from which source the next one comes.

A tagger is a function from a text to a number; its name is the attribute's. A rule is (attribute, least, most). What taggers said can be kept beside the
texts, a record for each, and rules read it there. Sources are drawn by their shares from a seed, and a source that ends is left out of the draw from then on, or begins
anew with `again`. What says who somebody is (addresses of mail and machines, telephone numbers) is counted, and masked by what it is.

Soldaini et al. 2024, "Dolma": taggers write attributes, a mixer reads them. Rules on words, lines and repeats are Gopher's (Rae et al. 2021) and C4's (Raffel
et al. 2020). Taggers that are models (languages, toxic text) are not here: any function will do.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from patchbay.corpus.reading import several
from patchbay.errors import PatchbayError, suggest

T = TypeVar("T")
Rule = tuple[str, float | None, float | None]  # attribute, least, most; None: no bound


def length(text: str) -> float:
    """Letters and all else, counted."""
    return float(len(text))


def letters(text: str) -> float:
    """Share of characters that are letters or white space."""
    return sum(c.isalpha() or c.isspace() for c in text) / max(1, len(text))


def repeated_lines(text: str) -> float:
    """Share of lines that stood before in the text."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def longest_word(text: str) -> float:
    return float(max(map(len, text.split()), default=0))


def commonest_word(text: str) -> float:
    """Share of words that are the commonest one."""
    counts = Counter(text.lower().split())
    return max(counts.values()) / counts.total() if counts else 0.0


def n_words(text: str) -> float:
    return float(len(text.split()))


def word_length(text: str) -> float:
    """Mean letters of a word."""
    words = text.split()
    return sum(map(len, words)) / max(1, len(words))


def symbols(text: str) -> float:
    """Hash signs and dots of omission, per word."""
    return (text.count("#") + text.count("...") + text.count("\u2026")) / max(1, len(text.split()))


def stop_words(text: str) -> float:
    """How many of eight English words that every text has."""
    return float(len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(text.lower().split())))


def bullets(text: str) -> float:
    """Share of lines that begin as items of a list."""
    lines = _lines(text)
    return sum(line[0] in "-*\u2022" for line in lines) / max(1, len(lines))


def cut_lines(text: str) -> float:
    """Share of lines that end in dots of omission."""
    lines = _lines(text)
    return sum(line.endswith(("...", "\u2026")) for line in lines) / max(1, len(lines))


def unended_lines(text: str) -> float:
    """Share of lines that end in no mark that ends a sentence."""
    lines = _lines(text)
    return sum(not line.endswith((".", "!", "?", '"')) for line in lines) / max(1, len(lines))


def repeated_words(text: str) -> float:
    """Share of runs of five words that stood before in the text."""
    words = text.split()
    runs = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


PRIVATE = {
    "EMAIL_ADDRESS": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "IP_ADDRESS": re.compile(
        r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.]*\d)"
    ),
    "PHONE_NUMBER": re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?!\w)"),
}


def private(text: str) -> float:
    """Addresses of mail and machines, and telephone numbers as they are written in America, counted."""
    return float(sum(len(pattern.findall(text)) for pattern in PRIVATE.values()))


def masked(text: str) -> str:
    """The text with each of them replaced by what it is."""
    for name, pattern in PRIVATE.items():
        text = pattern.sub(f"|||{name}|||", text)
    return text


TAGGERS: dict[str, Callable[[str], float]] = {
    one.__name__: one for one in (bullets, commonest_word, cut_lines, length, letters, longest_word, n_words, private, repeated_lines, repeated_words,
                                  stop_words, symbols, unended_lines, word_length)
}  # fmt: skip


def attributes(text: str, taggers: Mapping[str, Callable[[str], float]] = TAGGERS) -> dict[str, float]:
    """What every tagger says of a text."""
    return {name: float(tagger(text)) for name, tagger in taggers.items()}


def kept(texts: Iterable[T], attributes: Iterable[Mapping[str, float]], rules: Sequence[Rule]) -> Iterator[T]:
    """Texts (or records of them) that keep every rule by what taggers said of them before, a record for each text, in order.

    Raises PatchbayError for a text without a record, a record without a text, and one that has not got what a rule asks.
    """
    _possible(rules)
    for number, (text, said) in enumerate(zip_longest(texts, attributes), 1):
        if text is None or said is None:
            raise PatchbayError(
                f"{'text' if said is None else 'record'} {number} has no {'record' if said is None else 'text'}: they are not of one corpus"
            )
        for name, _, _ in rules:
            if name not in said:
                raise PatchbayError(
                    f"record {number} has no {name!r}; it has {', '.join(said)}{suggest(name, list(said))}"
                )
        if _keeps(said.__getitem__, rules):
            yield text


def told(path: str | Path) -> Iterator[dict[str, float]]:
    """What taggers said of each text, from a `.jsonl` of numbers by name; PatchbayError names the line that is none."""
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield _told(f"{path}, line {number}", line)
    except OSError as error:
        raise PatchbayError(f"{path} cannot be read: {error.strerror or error}") from error


def _told(where: str, line: bytes) -> dict[str, float]:
    try:
        found = {str(name): float(value) for name, value in json.loads(line.decode()).items()}
        if wrong := [name for name, value in found.items() if value != value]:
            raise ValueError(f"{wrong[0]!r} is no number")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else ": the file ends in mid-line, as one that was cut off"
        raise PatchbayError(f"{where} is no record of numbers by name{cut} ({error})") from error
    return found


def _possible(rules: Sequence[Rule]) -> None:
    """Raise PatchbayError for a rule that no text can keep."""
    for name, least, most in rules:
        low, high = -float("inf") if least is None else least, float("inf") if most is None else most
        if not low <= high:  # NaN too
            raise PatchbayError(f"{name} of at least {low:g} and at most {high:g}: no text has that")


def _keeps(said: Callable[[str], float], rules: Sequence[Rule]) -> bool:
    for name, least, most in rules:
        value = said(name)
        if value != value:
            raise PatchbayError(f"{name!r} of a text is NaN, which is neither kept nor left out by a rule")
        if (least is not None and value < least) or (most is not None and value > most):
            return False
    return True


def filtered(
    texts: Iterable[str], rules: Sequence[Rule], taggers: Mapping[str, Callable[[str], float]] = TAGGERS
) -> Iterator[str]:
    """Texts that keep every rule, in order; only the taggers that rules name are asked."""
    return filter(keeping(rules, taggers), several(texts))


def keeping(rules: Sequence[Rule], taggers: Mapping[str, Callable[[str], float]] = TAGGERS) -> Callable[[str], bool]:
    """Whether a text keeps every rule, as a function of it. Raises PatchbayError for a rule without a tagger, and one that no text can keep."""
    for name, _, _ in rules:
        if name not in taggers:
            raise PatchbayError(f"no tagger {name!r}; taggers are {', '.join(taggers)}{suggest(name, list(taggers))}")
    _possible(rules)
    return lambda text: _keeps(lambda name: taggers[name](text), rules)


def mixed(
    sources: Mapping[str, Callable[[], Iterable[str]]],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    again: bool = False,
) -> Iterator[tuple[str, str]]:
    """(source, text) without end with `again`, else until every source has ended. A source is a function that begins it."""
    if set(shares) != set(sources) or not sources or any(not 0 < share < float("inf") for share in shares.values()):
        raise PatchbayError(
            f"shares {dict(shares)} of sources {', '.join(sources) or 'none'}: one share above 0 for each"
        )
    if wrong := [name for name, begin in sources.items() if not callable(begin)]:
        raise PatchbayError(
            f"source {wrong[0]!r} is a {type(sources[wrong[0]]).__name__}: a source is a function that begins it, such as lambda: texts"
        )
    draw, streams = random.Random(seed), {name: several(begin()) for name, begin in sources.items()}
    while streams:
        [name] = draw.choices(list(streams), [shares[one] for one in streams])
        text = next(streams[name], None)
        if text is None and again:
            streams[name] = several(sources[name]())
            text = next(streams[name], None)
            if text is None:
                raise PatchbayError(f"source {name!r} is empty")
        if text is None:
            del streams[name]
        else:
            yield name, text
