"""Prompts with sets of options: read from text, ids or a Task, laid out with positions and masks, put into other orders."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.model.tokens import start_ids
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

MARKS = ("<|set|>", "<|or|>", "<|end|>")
Segments = list[list[int] | list[list[int]]]  # ids of a text, or the ids of each option of a set


@dataclass(frozen=True)
class Layout:
    """Tokens of one prompt with their positions, and which option of which set each belongs to (-1: none)."""

    ids: list[int]
    positions: list[int]
    sets: list[int]
    options: list[int]

    @property
    def end(self) -> int:
        """Position of the next token."""
        return self.positions[-1] + 1

    def seen(self) -> Tensor:
        """Which keys each query sees, bool [query, key]."""
        n, sets, options = len(self.ids), torch.tensor(self.sets), torch.tensor(self.options)
        apart = (sets[:, None] == sets) & (sets >= 0) & (options[:, None] != options)
        return torch.ones(n, n, dtype=torch.bool).tril() & ~apart


def layout(segments: Segments) -> Layout:
    """Tokens in the order given, with the positions and the sets that make that order invisible."""
    ids: list[int] = []
    rows: list[tuple[int, int, int]] = []  # position, set, option
    start = 0
    for number, segment in enumerate(segments):
        options = options_of(segment)
        for option, tokens in enumerate(_pieces(segment)):
            ids += tokens
            where = (number, option) if options else (-1, -1)
            rows += [(start + i, *where) for i in range(len(tokens))]
        start = max(row[0] for row in rows) + 1
    return Layout(ids, *(list(column) for column in zip(*rows, strict=True)))


def plain_layout(segments: Segments) -> Layout:
    """The same tokens as an ordinary prompt."""
    ids = [token for segment in segments for tokens in _pieces(segment) for token in tokens]
    return Layout(ids, list(range(len(ids))), [-1] * len(ids), [-1] * len(ids))


def options_of(segment: Any) -> list[list[int]]:
    """The options of a set; nothing for a text."""
    return segment if segment and isinstance(segment[0], list) else []


def _pieces(segment: Any) -> list[list[int]]:
    """The options of a set; a text as the only one."""
    return options_of(segment) or [segment]


def canonical(segments: Segments) -> Segments:
    return [sorted(options_of(segment)) or segment for segment in segments]


def read(model: Model, prompts: Any) -> list[Segments]:
    if isinstance(prompts, Task):
        prompts.check(model.vocab_size)
        found = _of_task(prompts)
    elif isinstance(prompts, str):
        found = [_of_text(model, prompts)]
    elif isinstance(prompts, Sequence) and len(prompts) and all(isinstance(one, str) for one in prompts):
        found = [_of_text(model, one) for one in prompts]
    elif isinstance(prompts, Sequence) and len(prompts):
        found = [_of_ids(one, i) for i, one in enumerate(prompts)]
    else:
        raise PatchbayError(f"prompts with sets are texts, lists of segments or a Task, got {type(prompts).__name__}")
    for i, segments in enumerate(found):
        if not any(options_of(segment) for segment in segments):
            raise PatchbayError(f"prompt {i} has no set; in a text it is written {MARKS[0]}one{MARKS[1]}two{MARKS[2]}")
        if options_of(segments[-1]):
            raise PatchbayError(
                f"prompt {i} ends with its options: text must follow, which sees all of them and is asked"
            )
    return found


def _of_text(model: Model, text: str) -> Segments:
    """Pieces between the marks, each tokenised alone; the tokenizer's start token stands in front of the whole."""
    tokenizer = model._need_tokenizer()
    pieces = re.split("|".join(map(re.escape, MARKS)), text)
    marks = re.findall("|".join(map(re.escape, MARKS)), text)
    if not re.fullmatch(r"(s(o*)e)*", "".join("soe"[MARKS.index(mark)] for mark in marks)):
        raise PatchbayError(
            f"{text!r}: sets are written {MARKS[0]}one{MARKS[1]}two{MARKS[2]} and do not nest, found {' '.join(marks)}"
        )

    def ids(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    start, first = list(start_ids(tokenizer)), ids(pieces[0])
    segments: Segments = [first if start and first[: len(start)] == start else [*start, *first]]
    for mark, piece in zip(marks, pieces[1:], strict=True):
        if mark == MARKS[0]:
            segments.append([ids(piece)])
        elif mark == MARKS[1]:
            segments[-1].append(ids(piece))  # type: ignore[arg-type]
        else:
            segments.append(ids(piece))
        if not piece and mark != MARKS[2]:
            raise PatchbayError(f"{text!r} has an empty option")
    return [segment for segment in segments if segment]


def _of_ids(given: Any, i: int) -> Segments:
    try:
        found = [[list(map(int, o)) for o in s] if s and not _is_id(s[0]) else list(map(int, s)) for s in given]
    except (TypeError, ValueError) as error:
        raise PatchbayError(
            f"prompt {i}: segments are lists of ids or lists of options (lists of ids): {error}"
        ) from error
    if any(not all(options_of(segment)) or not segment for segment in found):
        raise PatchbayError(f"prompt {i} has an empty segment or option")
    return found  # type: ignore[return-value]


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__")


def _of_task(task: Task) -> list[Segments]:
    """Cut each prompt at the spans of its options; spans that touch are one set."""
    if "options" not in task.labels:
        raise PatchbayError(
            f"task {task.name}: its labels {list(task.labels)} lack 'options', for each prompt the [start, end] of every option"
        )
    found = []
    for i, (ids, spans) in enumerate(zip(task.clean, task.labels["options"], strict=True)):
        segments: Segments = []
        last = 0
        for start, end in spans:
            if not last <= start < end <= len(ids):
                raise PatchbayError(
                    f"task {task.name}, prompt {i}: options {spans} are not ordered spans of {len(ids)} tokens"
                )
            if start > last or not segments or not options_of(segments[-1]):
                segments += [list(ids[last:start]), []] if start > last else [[]]
            segments[-1].append(list(ids[start:end]))  # type: ignore[arg-type]
            last = end
        segments += [list(ids[last:])] if last < len(ids) else []
        found.append(segments)
    return found


def other_orders(segments: Segments, n: int, chance: random.Random) -> list[Segments]:
    """Up to `n` other orders of the options, all of them where there are no more."""
    sets = [i for i, segment in enumerate(segments) if options_of(segment)]
    count = math.prod(math.factorial(len(segments[i])) for i in sets)
    if count - 1 <= n:
        every = itertools.product(*(itertools.permutations(range(len(segments[i]))) for i in sets))
        picked: list[Any] = list(every)[1:]
    else:
        found: dict[Any, None] = {}
        same = tuple(tuple(range(len(segments[i]))) for i in sets)
        while len(found) < n:
            order = tuple(tuple(chance.sample(range(len(segments[i])), len(segments[i]))) for i in sets)
            if order != same:
                found[order] = None
        picked = list(found)
    out = []
    for orders in picked:
        other = list(segments)
        for i, order in zip(sets, orders, strict=True):
            other[i] = [options_of(segments[i])[place] for place in order]
        out.append(other)
    return out
