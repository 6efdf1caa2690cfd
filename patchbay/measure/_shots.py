"""Examples in front of prompts, as texts or as ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from patchbay.measure._asked import Asked
from patchbay.model.model import Model
from patchbay.model.tokens import start_ids

Shot = tuple[Any, Any]  # a prompt and the answer that follows it


def pool_of(asked: Asked) -> list[Shot]:
    """Every item as an example: its prompt and its right answer."""
    return [
        (prompt, choices[at]) for prompt, choices, at in zip(asked.prompts, asked.choices, asked.right, strict=True)
    ]


def drawn(prompt: Any, pool: Sequence[Shot], k: int, name: str) -> list[Shot]:
    """k examples of a pool in an order that `name` alone decides, none of them the prompt itself."""
    return random.Random(name).sample([one for one in pool if one[0] != prompt], k)


def with_shots(model: Model, shots: Sequence[Shot], prompt: Any, join: str) -> Any:
    """A prompt behind examples, as text or as ids with one start token in front of all."""
    if isinstance(prompt, str):
        return "".join(f"{asked}{answer}{join}" for asked, answer in shots) + prompt
    start = tuple(start_ids(model.tokenizer)) if model.tokenizer is not None else ()
    pieces: list[tuple[tuple[int, ...], tuple[int, ...]]] = [(tuple(asked), tuple(answer)) for asked, answer in shots]
    pieces.append((tuple(prompt), ()))
    bare = [ids[len(start) :] if start and ids[: len(start)] == start else ids for ids, _ in pieces]
    first = pieces[0][0][: len(pieces[0][0]) - len(bare[0])]
    return [*first, *(token for ids, (_, answer) in zip(bare, pieces, strict=True) for token in (*ids, *answer))]
