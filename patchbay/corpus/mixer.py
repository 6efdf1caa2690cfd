"""Mixer: taggers say what a text is like, rules say which texts stay, shares say from which source the next one comes.

A tagger is a function from a text to a number; its name is the attribute's. A rule is (attribute, least, most). Sources are drawn by their shares from
a seed, and a source that ends is left out of the draw from then on, or begins anew with `again`.

Soldaini et al. 2024, "Dolma": taggers write attributes, a mixer reads them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from patchbay.errors import PatchbayError, suggest

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


TAGGERS: dict[str, Callable[[str], float]] = {
    one.__name__: one for one in (commonest_word, length, letters, longest_word, repeated_lines)
}


def attributes(text: str, taggers: Mapping[str, Callable[[str], float]] = TAGGERS) -> dict[str, float]:
    """What every tagger says of a text."""
    return {name: float(tagger(text)) for name, tagger in taggers.items()}


def filtered(
    texts: Iterable[str], rules: Sequence[Rule], taggers: Mapping[str, Callable[[str], float]] = TAGGERS
) -> Iterator[str]:
    """Texts that keep every rule, in order; only the taggers that rules name are asked."""
    for name, _, _ in rules:
        if name not in taggers:
            raise PatchbayError(f"no tagger {name!r}; taggers are {', '.join(taggers)}{suggest(name, list(taggers))}")
    return (
        text
        for text in texts
        if all(
            (least is None or taggers[name](text) >= least) and (most is None or taggers[name](text) <= most)
            for name, least, most in rules
        )
    )


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
    draw, streams = random.Random(seed), {name: iter(begin()) for name, begin in sources.items()}
    while streams:
        [name] = draw.choices(list(streams), [shares[one] for one in streams])
        text = next(streams[name], None)
        if text is None and again:
            streams[name] = iter(sources[name]())
            text = next(streams[name], None)
            if text is None:
                raise PatchbayError(f"source {name!r} is empty")
        if text is None:
            del streams[name]
        else:
            yield name, text
