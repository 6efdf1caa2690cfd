"""Predicates: short sentences about a token that are true or false of it, and the one that says best when a feature fires.

    token in {...}   previous token in {...}   the token came before   the token is a number (capitalised, punctuation, ...)
    position < k     the token matches /ing$/  A and B                 A and not B

Predicates are made on one half of the texts that choose and weighed on the other, so that long lists of what was seen once do not win. Sets of tokens
grow by precision, which is the order that is best for F1; of two joined, the second is looked for where the first holds. The shortest is taken whose
F1 is within `SLACK` of the best. All masks are [token].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SLACK = 0.02
SETS = (1, 2, 3, 5, 8, 13, 21, 34)
PLACES = (1, 2, 4, 8)
JOINED = 5  # first halves of what is joined
CLASSES: dict[str, Callable[[str], bool]] = {
    "a number": lambda text: text.strip().isdigit(),
    "capitalised": lambda text: text.strip()[:1].isupper(),
    "in capitals": lambda text: len(text.strip()) > 1 and text.strip().isupper(),
    "punctuation": lambda text: bool(text.strip()) and not any(c.isalnum() for c in text),
    "white space": lambda text: bool(text) and not text.strip(),
    "the beginning of a word": lambda text: text[:1] == " " and text[1:2].isalpha(),
    "the middle of a word": lambda text: text[:1].isalpha(),
}


@dataclass(frozen=True)
class Predicate:
    """What it says, how many things it names, and where it holds."""

    text: str
    length: int
    mask: Tensor

    def joined(self, other: Predicate, *, no: bool) -> Predicate:
        word = "and not" if no else "and"
        return Predicate(
            f"{self.text} {word} {other.text}",
            self.length + other.length,
            self.mask & (~other.mask if no else other.mask),
        )


class Tokens:
    """The tokens of texts, one after the other, as predicates see them; `spelled` is the text of an id, without which there are no classes."""

    def __init__(self, texts: Sequence[Sequence[int]], spelled: Callable[[int], str] | None) -> None:
        self.ids = torch.tensor([token for ids in texts for token in ids])
        self.previous = torch.tensor([token for ids in texts for token in (-1, *ids[:-1])])
        self.position = torch.tensor([at for ids in texts for at in range(len(ids))])
        self.repeats = torch.tensor([token in set(ids[:at]) for ids in texts for at, token in enumerate(ids)])
        self.text = torch.tensor([i for i, ids in enumerate(texts) for _ in ids])
        self.spelled = spelled

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        return {} if self.spelled is None else {token: self.spelled(token) for token in self.ids.unique().tolist()}

    def named(self, token: int) -> str:
        return repr(self.vocabulary[token]) if token in self.vocabulary else str(token)

    def having(self, test: Callable[[str], bool]) -> Tensor:
        """Where the token's text passes a test."""
        held = torch.tensor([token for token, text in self.vocabulary.items() if test(text)], dtype=torch.long)
        return torch.isin(self.ids, held)


def f1(mask: Tensor, fires: Tensor) -> float:
    """Harmonic mean of precision and recall; 0 where both are."""
    hits = int((mask & fires).sum())
    return 2 * hits / max(int(mask.sum()) + int(fires.sum()), 1)


def best(tokens: Tokens, fires: Tensor, some: Tensor) -> Predicate:
    """The shortest of the best predicates on `some` of the tokens; its mask is over all of them."""
    made, weighed = halves(tokens, fires, some)
    found = candidates(tokens, fires, made)
    for i in scored(found, fires, made).argsort(descending=True, stable=True)[:JOINED].tolist():
        one = found[i]
        inside = made & one.mask
        for no in (False, True):
            wanted = ~fires if no else fires
            if bool((inside & wanted).any()) and bool((inside & ~wanted).any()):
                found += [one.joined(other, no=no) for other in candidates(tokens, wanted, inside)]
    scores = scored(found, fires, weighed).tolist()
    near = [
        (one.length, -score, i)
        for i, (one, score) in enumerate(zip(found, scores, strict=True))
        if score >= max(scores) - SLACK
    ]
    return found[min(near)[2]]


def scored(found: Sequence[Predicate], fires: Tensor, some: Tensor) -> Tensor:
    """F1 of several predicates on some of the tokens."""
    masks, wanted = torch.stack([one.mask[some] for one in found]), fires[some]
    return 2 * (masks & wanted).sum(1).double() / (masks.sum(1) + wanted.sum()).clamp_min(1)


def halves(tokens: Tokens, fires: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Every other text of `some` to make predicates on, and the others to weigh them; all for both where one half never fires."""
    texts = tokens.text[some].unique()
    made = some & torch.isin(tokens.text, texts[::2])
    weighed = some & ~made
    return (made, weighed) if bool(fires[made].any()) and bool(fires[weighed].any()) else (some, some)


def candidates(tokens: Tokens, fires: Tensor, some: Tensor) -> list[Predicate]:
    """Single predicates, those with words chosen by where `fires` is true among `some`."""
    found = [Predicate("the token came before", 1, tokens.repeats)]
    for name, ids in (("token", tokens.ids), ("previous token", tokens.previous)):
        found += _sets(tokens, name, ids, fires, some)
    found += [Predicate(f"position < {k}", 1, tokens.position < k) for k in PLACES]
    found += [Predicate(f"position >= {k}", 1, tokens.position >= k) for k in PLACES]
    if tokens.vocabulary:
        found += [Predicate(f"the token is {name}", 1, tokens.having(test)) for name, test in CLASSES.items()]
        found += _patterns(tokens, fires, some)
    return found


def _sets(tokens: Tokens, name: str, ids: Tensor, fires: Tensor, some: Tensor) -> list[Predicate]:
    """Sets of tokens, those first that fire most often when they are there."""
    there, hits = Counter(ids[some].tolist()), Counter(ids[some & fires].tolist())
    hits.pop(-1, None)
    order = sorted(hits, key=lambda token: (-hits[token] / there[token], -hits[token], token))
    found = []
    for n in sorted({min(n, len(order)) for n in SETS} - {0}):
        said = ", ".join(tokens.named(token) for token in sorted(order[:n]))
        found.append(Predicate(f"{name} in {{{said}}}", n, torch.isin(ids, torch.tensor(order[:n]))))
    return found


def _patterns(tokens: Tokens, fires: Tensor, some: Tensor) -> list[Predicate]:
    """Beginnings and ends that several firing tokens share."""
    seen: Counter[str] = Counter()
    for token in set(tokens.ids[some & fires].tolist()):
        text = tokens.vocabulary[token].strip()
        for n in range(1, min(4, len(text) - 1) + 1):
            seen[f"^{re.escape(text[:n])}"] += 1
            seen[f"{re.escape(text[-n:])}$"] += 1
    shared = [pattern for pattern, count in seen.most_common(40) if count > 1]
    found = []
    for pattern in shared:
        held = {token for token, text in tokens.vocabulary.items() if re.search(pattern, text.strip())}
        found.append(Predicate(f"the token matches /{pattern}/", 1, torch.isin(tokens.ids, torch.tensor(sorted(held)))))
    return found
