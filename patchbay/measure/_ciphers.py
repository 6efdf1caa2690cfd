"""Transformations of text whose right answer is computed: shifts of letters, pig Latin, reversal, swapped articles, acronyms, counts."""

from __future__ import annotations

import re
from collections.abc import Callable

from patchbay.signal.port import PatchbayError, suggest

VOWELS = "aeiouAEIOU"


def shift(text: str, by: int) -> str:
    """Every Latin letter moved on by so many places of the alphabet, around its end; all else stays."""

    def moved(letter: str) -> str:
        first = ord("a") if letter.islower() else ord("A")
        return chr(first + (ord(letter) - first + by) % 26)

    return "".join(moved(c) if c.isascii() and c.isalpha() else c for c in text)


def pig_latin(text: str) -> str:
    """Of every word of letters the consonants in front go to its end, before "ay"; before a vowel, "way" is added."""

    def turned(found: re.Match[str]) -> str:
        word = found[0]
        at = next((i for i, c in enumerate(word) if c in VOWELS), len(word))
        return word + "way" if at == 0 else word[at:] + word[:at] + "ay"

    return re.sub(r"[A-Za-z]+", turned, text)


def reversal(text: str) -> str:
    """Its words in the reverse order."""
    return " ".join(reversed(text.split(" ")))


def article_swap(text: str) -> str:
    """Every article changes places with the word before it."""
    words = text.split(" ")
    i = 1
    while i < len(words):
        if words[i].lower() in ("a", "an", "the"):
            words[i - 1], words[i] = words[i], words[i - 1]
        i += 1
    return " ".join(words)


def acronym(text: str) -> str:
    """The first letters of its words, in capitals."""
    return "".join(word[0].upper() for word in text.split())


def counting(text: str) -> str:
    """How many words it has."""
    return str(len(text.split()))


# name -> (what is asked, what is answered), of an output text
CIPHERS: dict[str, Callable[[str], tuple[str, str]]] = {
    **{f"shift_{k}": (lambda text, k=k: (shift(text, k), text)) for k in range(1, 26)},  # type: ignore[misc]
    "pig_latin": lambda text: (pig_latin(text), text),
    "reversal": lambda text: (reversal(text), text),
    "article_swap": lambda text: (article_swap(text), text),
    "acronym": lambda text: (text, acronym(text)),
    "counting": lambda text: (text, counting(text)),
}


def ciphered(text: str, name: str) -> tuple[str, str]:
    """The input and the output of a text under a transformation."""
    if name not in CIPHERS:
        raise PatchbayError(f"no task {name!r}; possible are {', '.join(CIPHERS)}" + suggest(name, list(CIPHERS)))
    return CIPHERS[name](text)
