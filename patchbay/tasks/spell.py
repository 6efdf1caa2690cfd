"""From drafted prompts to a task in a model's own tokens.

`choose_words` keeps the words that are one token with their leading space; `spell` turns drafts (texts, answers, twins,
marks) into a Task and drops each draft whose tokens do not say what its text says: an answer that is not exactly the
one token after the prompt's tokens, a twin of another length, a word that the tokenizer does not know. What was
dropped, and why, is in the error when too few are left. Some tokenizers make the space before a digit or letter a token
of its own; where that holds for all answers of a prompt, that space ends the prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbay.model.tokens import start_ids, tokenize
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

if TYPE_CHECKING:
    from patchbay.model.model import Model

Ids = tuple[int, ...]
Span = tuple[int, int]
PROBE = "The"
"""A text that a word is tried after: the start of a text is spelled differently."""


class Draft(NamedTuple):
    """A prompt as text; answers with their leading space; marks as spans of characters of the prompt."""

    prompt: str
    answer: str
    wrong: tuple[str, ...]
    corrupted: str
    marks: Mapping[str, Sequence[Span]]
    labels: Mapping[str, Any]


def spans(text: str, word: str) -> list[Span]:
    """Where `word` stands in `text` as a whole word, in order."""
    return [found.span() for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]


def spans_in_order(text: str, words: Sequence[str], start: int = 0) -> list[Span]:
    """The first span of each word after the span of the word before it."""
    found: list[Span] = []
    for word in words:
        found.append(next(span for span in spans(text, word) if span[0] >= start))
        start = found[-1][1]
    return found


def replaced(text: str, changes: Mapping[Span, str]) -> str:
    """The text with other words at some spans."""
    for (start, end), word in sorted(changes.items(), reverse=True):
        text = text[:start] + word + text[end:]
    return text


def tokenizer_of(model: Model, task: str) -> Any:
    """The model's tokenizer, or an error that says which tasks do without."""
    if model.tokenizer is None:
        raise PatchbayError(
            f"{task} is made of words and this model has no tokenizer; possible: pass one when loading, "
            "the task repeated_tokens, or a Task of your own token ids"
        )
    return model.tokenizer


def at_least(name: str, value: int, lowest: int, highest: int | None = None) -> None:
    """An error where an option is out of its range."""
    if value < lowest or (highest is not None and value > highest):
        possible = f"{lowest} and more" if highest is None else f"{lowest} to {highest}"
        raise PatchbayError(f"asked for {name}={value}; possible: {possible}")


def single_tokens(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """The words that are one known token with their leading space.

    Where a tokenizer makes the space a token of its own, the words that are one token after it, if they are more.
    """
    words = list(dict.fromkeys(words))
    probe, *spelled = tokenize(tokenizer, [PROBE, *(f"{PROBE} {word}" for word in words)])
    special = set(tokenizer.all_special_ids)
    whole: dict[int, str] = {}
    after_space: dict[int, str] = {}
    for word, ids in zip(words, spelled, strict=True):
        if ids[-1] in special:
            continue
        head = _head(tokenizer, probe, ids)
        if head is not None:
            (whole if head == probe else after_space).setdefault(ids[-1], word)
    return list(max(whole, after_space, key=len).values())


def choose_words(model: Model, task: str, what: str, words: Sequence[str], n: int) -> list[str]:
    """All single-token words of the list; an error that says what was found when they are fewer than `n`."""
    tokenizer = tokenizer_of(model, task)
    found = single_tokens(tokenizer, words)
    if len(found) >= n:
        return found
    probe = len(tokenize(tokenizer, [PROBE])[0])
    failed = [word for word in words if word not in found][:4]
    shown = []
    for word, ids in zip(failed, tokenize(tokenizer, [f"{PROBE} {word}" for word in failed]), strict=True):
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids[probe:]))]
        shown.append(f"{word!r} is {' + '.join(map(repr, pieces))}")
    raise PatchbayError(
        f"{task}: asked for {n} {what}, found {len(found)} that are single tokens in this tokenizer, of {len(words)} "
        f"tried ({', '.join(shown)}); possible: "
        + (f"up to {len(found)} {what}, " if found else "")
        + "a model with a larger vocabulary, or the task repeated_tokens, which needs no words"
    )


def spell(
    name: str,
    model: Model,
    drafts: Iterable[Draft],
    n: int,
    *,
    seed: int,
    options: dict[str, Any],
    metric: str = "logit_diff",
) -> Task:
    """The task of the first `n` different drafts whose tokens say what their text says."""
    at_least("n", n, 1)
    tokenizer = tokenizer_of(model, name)
    source = iter(drafts)
    kept: dict[str, tuple[Draft, _Spelled]] = {}
    dropped: Counter[str] = Counter()
    example: dict[str, str] = {}
    in_vain = 0
    while len(kept) < n and in_vain < 300 + 4 * len(kept):  # rarer than that, what is left is not worth the wait
        batch = list(islice(source, max(n - len(kept), 32)))
        fresh = {draft.prompt: draft for draft in batch if draft.prompt not in kept}
        results = _spell_all(tokenizer, list(fresh.values()), model.max_positions)
        n_before = len(kept)
        for draft, result in zip(fresh.values(), results, strict=True):
            if isinstance(result, str):
                dropped[result] += 1
                example.setdefault(result, draft.prompt + draft.answer)
            elif len(kept) < n:
                kept[draft.prompt] = (draft, result)
        in_vain = 0 if len(kept) > n_before else in_vain + max(len(batch), 1)
    if len(kept) < n:
        why = "; ".join(
            f"{count} dropped: {reason} (such as {example[reason]!r})" for reason, count in dropped.most_common(3)
        )
        raise PatchbayError(
            f"{name}: asked for {n} different prompts, found {len(kept)} with {_said(options)}"
            f"{'; ' + why if why else ''}; possible: " + (f"n up to {len(kept)}, or " if kept else "") + "other options"
        )
    rows = list(kept.values())
    task = Task(
        name=name,
        clean=tuple(row.prompt for _, row in rows),
        right=tuple(row.right for _, row in rows),
        wrong=tuple(row.wrong for _, row in rows),
        corrupted=tuple(row.corrupted for _, row in rows),
        metric=metric,
        options=options,
        seed=seed,
        texts=tuple(row.text for _, row in rows),
        marks={mark: tuple(row.marks[mark] for _, row in rows) for mark in rows[0][1].marks},
        labels={label: tuple(draft.labels[label] for draft, _ in rows) for label in rows[0][0].labels},
    )
    task.check(model.vocab_size)
    return task


class _Spelled(NamedTuple):
    text: str
    prompt: Ids
    right: int
    wrong: Ids
    corrupted: Ids
    marks: dict[str, Ids]


def _spell_all(tokenizer: Any, drafts: Sequence[Draft], max_positions: int | None) -> list[_Spelled | str]:
    """Each draft in tokens, or why it cannot be. Everything is tokenised in one call."""
    texts: dict[str, None] = {}
    for draft in drafts:
        texts |= dict.fromkeys((draft.prompt, draft.corrupted, draft.corrupted + draft.answer))
        texts |= dict.fromkeys(draft.prompt + answer for answer in (draft.answer, *draft.wrong))
        texts |= dict.fromkeys(draft.prompt[:end] for span in _all_spans(draft) for end in _ends(draft.prompt, span))
    texts.pop("", None)
    ids = dict(zip(texts, tokenize(tokenizer, list(texts)), strict=True))
    special = frozenset(tokenizer.all_special_ids)
    ids[""] = start_ids(tokenizer)
    return [_spell_one(tokenizer, draft, ids, special, max_positions) for draft in drafts]


def _spell_one(
    tokenizer: Any, draft: Draft, ids: Mapping[str, Ids], special: frozenset[int], max_positions: int | None
) -> _Spelled | str:
    wholes = [ids[draft.prompt + answer] for answer in (draft.answer, *draft.wrong)]
    prompt = _head(tokenizer, ids[draft.prompt], wholes[0])
    if prompt is None or any(whole[:-1] != prompt for whole in wholes):
        return "an answer is not one token after the prompt"
    corrupted = _head(tokenizer, ids[draft.corrupted], ids[draft.corrupted + draft.answer])
    if corrupted is None or len(corrupted) != len(prompt):
        return "the corrupted twin has another number of tokens"
    answers = [whole[-1] for whole in wholes]
    n_start = len(ids[""])
    if not special.isdisjoint((*prompt[n_start:], *corrupted[n_start:], *answers)):
        return "a word is unknown to the tokenizer"
    if len(set(answers)) < len(answers):
        return "two answers are the same token"
    if max_positions is not None and len(prompt) > max_positions:
        return f"longer than the model's {max_positions} positions"
    marks: dict[str, Ids] = {}
    for mark, group in draft.marks.items():
        positions: list[int] = []
        for span in group:
            before, until = (ids[draft.prompt[:end]] for end in _ends(draft.prompt, span))
            if prompt[: len(until)] != until or until[: len(before)] != before:
                return f"the tokens of the mark {mark!r} cross the edges of its words"
            positions.extend(range(len(before), len(until)))
        marks[mark] = tuple(positions)
    text = draft.prompt + " " * (len(prompt) - len(ids[draft.prompt]))
    return _Spelled(text, prompt, answers[0], tuple(answers[1:]), corrupted, marks)


def _head(tokenizer: Any, prompt: Ids, whole: Ids) -> Ids | None:
    """`whole` without its last token if that is the prompt, or the prompt and a token of mere space; else None."""
    head = whole[:-1]
    if head == prompt or (head[:-1] == prompt and not tokenizer.decode([head[-1]]).strip(" \u2581")):
        return head
    return None


def _all_spans(draft: Draft) -> list[Span]:
    return [span for group in draft.marks.values() for span in group]


def _ends(text: str, span: Span) -> Span:
    """The span with the space before it, which belongs to the word's token."""
    start, end = span
    return (start - 1 if start and text[start - 1] == " " else start), end


def _said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "these options"
