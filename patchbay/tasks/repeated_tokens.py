"""Repeated random tokens: the same random string twice; say what followed this token the first time.

`q z a m f  a m f` cut anywhere inside the second `a m f ...`: the token that comes next is the one that came next
before. Every prompt has its own number of tokens before the string, its own period, and its own cut, so that no fixed
distance or position gives the answer away. All tokens of a prompt are different apart from the repetition. The wrong
answer is another token of the string. In the corrupted twin the second part is no repetition but other random tokens,
so nothing points to the answer. Needs no tokenizer. Prompts as in Olsson et al. 2022, "In-context Learning and
Induction Heads".

It tests copying by matching (induction) on strings without meaning; it does not show that a model uses it in real text.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from patchbay.errors import by_kind
from patchbay.model.tokens import start_ids
from patchbay.signal.port import PatchbayError
from patchbay.tasks.spell import at_least
from patchbay.tasks.task import Task

if TYPE_CHECKING:
    from patchbay.model.model import Model


@by_kind
def repeated_tokens(
    model: Model, n: int = 100, *, max_period: int | None = None, max_offset: int | None = None, seed: int = 0
) -> Task:
    """Random strings that repeat with a period of up to `max_period`, after up to `max_offset` other tokens.

    Without values: 20 and 8, or what the model's vocabulary and positions allow. Marks: `second` (the repeated tokens,
    the last of them asks), `first` (the same tokens' first places), `source` (the first place of the right answer).
    Labels: `period`, `offset`.
    """
    at_least("n", n, 1)
    pool = _pool(model)
    start = () if model.tokenizer is None else start_ids(model.tokenizer)
    # an offset, a string, then at most the string without its last token; its twin needs that many tokens more
    room = min(len(pool) + 1, (model.max_positions or 10**9) - len(start) + 1)
    offset = min(8, max(room - 4, 0) // 4) if max_offset is None else max_offset
    period = min(20, (room - offset) // 2) if max_period is None else max_period
    if min(period, (room - offset) // 2) < 2 or period > (room - offset) // 2 or offset < 0:
        raise PatchbayError(
            f"repeated_tokens: a period of {period} after {offset} tokens needs {2 * period - 1 + offset} different "
            f"tokens in as many positions; this model has {len(pool)} usable tokens and "
            f"{model.max_positions or 'unlimited'} positions; possible: max_offset 0 and more, max_period from 2 to {max((room - max(offset, 0)) // 2, 0)}"
        )
    rng = random.Random(f"repeated_tokens-{seed}")
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for _ in range(30 * n + 300):
        row = _row(pool, start, period, offset, rng)
        found.setdefault(row["clean"], row)
        if len(found) == n:
            break
    else:
        raise PatchbayError(
            f"repeated_tokens: asked for {n} different prompts, found {len(found)} of {len(pool)} tokens with "
            f"periods up to {period} and offsets up to {offset}; possible: n up to {len(found)}, or larger values of those"
        )
    rows = list(found.values())
    texts = () if model.tokenizer is None else tuple(str(model.tokenizer.decode(list(row["clean"]))) for row in rows)
    return Task(
        name="repeated_tokens",
        clean=tuple(row["clean"] for row in rows),
        right=tuple(row["right"] for row in rows),
        wrong=tuple(row["wrong"] for row in rows),
        corrupted=tuple(row["corrupted"] for row in rows),
        options={"max_period": period, "max_offset": offset},
        seed=seed,
        texts=texts,
        marks={mark: tuple(row[mark] for row in rows) for mark in ("first", "second", "source")},
        labels={label: tuple(row[label] for row in rows) for label in ("period", "offset")},
    )


def _row(
    pool: list[int], start: tuple[int, ...], max_period: int, max_offset: int, rng: random.Random
) -> dict[str, Any]:
    period, offset = rng.randint(min(5, max_period), max_period), rng.randint(0, max_offset)
    n_again = rng.randint(1, period - 1)
    drawn = rng.sample(pool, offset + period + n_again)
    before, string, fresh = drawn[:offset], drawn[offset : offset + period], drawn[offset + period :]
    at = len(start) + offset
    others = [token for token in string if token != string[n_again]]
    return {
        "clean": (*start, *before, *string, *string[:n_again]),
        "corrupted": (*start, *before, *string, *fresh),
        "right": string[n_again],
        "wrong": (rng.choice(others),),
        "first": tuple(range(at, at + n_again)),
        "second": tuple(range(at + period, at + period + n_again)),
        "source": (at + n_again,),
        "period": period,
        "offset": offset,
    }


def _pool(model: Model) -> list[int]:
    """Ids that may be drawn: all of the vocabulary but the special ones, and no ids that the tokenizer lacks."""
    if model.tokenizer is None:
        return list(range(model.vocab_size))
    special = set(model.tokenizer.all_special_ids)
    return [token for token in range(min(model.vocab_size, len(model.tokenizer))) if token not in special]
