"""Prompt change: what writing a prompt in another way does for its answer.

    value = mean over items of [ln P(right | changed prompt) - ln P(right | prompt)],    P among the choices

Changes: dictionary, which puts a gloss behind every word that a dictionary has, "word (gloss)", the longest entry first; diff, which tells a history of observations
as the first one whole and then what changed from each to the next, as unified diffs without context; given, a prompt of the user's own. Both are undone exactly
(`unglossed`, `undiffed`). `null` of a dictionary: the same glosses dealt among its words, which is what any text in that place does; p by sign flips
of the differences (without such a null, of the change itself against 0). Two forward passes, three with the null.

Lu et al. 2024, "Dictionary Insertion Prompting for Multilingual Reasoning on Multilingual Large Language Models"; Piterbarg et al. 2023, "diff History for Neural Language
Agents". Higher is better. A longer prompt may help by its length: compare with the null.
"""

from __future__ import annotations

import difflib
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay.measure._answers import outcomes
from patchbay.measure._asked import hit, place_of
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row

Change = Literal["dictionary", "diff", "given"]
LETTERS = r"(?<!\w){}(?!\w)"
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@method(paper="lu2024b")
def prompt_change(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    change: Change = "dictionary",
    glosses: str | dict[str, str] | None = None,
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """What a change of prompts adds to the log-probability of the right answer among its choices.

    `accuracy` and `accuracy_changed`, `length` [prompt], characters of the changed prompt over those of the plain one; table `prompts`.

    `items`: rows with the fields prompt, choices and answer, and with change="diff" history (a list of observations, which stand before the prompt), with
    "given" changed. `change`: dictionary, diff or given. `glosses`: words and their glosses, or a JSON file of them. `boundary`: refuse a
    choice that the tokenizer joins with its prompt, or back_up to before it for all choices.
    """
    if change not in ("dictionary", "diff", "given"):
        raise PatchbayError(f"change={change!r}; possible are dictionary, diff, given")
    more_of = {"dictionary": (), "diff": ("history",), "given": ("changed",)}[change]
    rows, said = rows_of(resolved(model, items), ("prompt", "choices", "answer", *more_of), lists=("choices", *(more_of if change == "diff" else ())))  # fmt: skip
    texts_only(rows, ("prompt", *(more_of if change == "given" else ())))
    right = torch.tensor([place_of(row.values["answer"], row.values["choices"], row.where) for row in rows])
    of = _glosses(glosses) if change == "dictionary" else {}
    pairs = [_changed(row, change, of) for row in rows]
    touched = [before != after for before, after in pairs]
    if not any(touched):
        raise PatchbayError(
            f"change={change!r} changes no prompt: no word of the dictionary, or no second observation, occurs"
        )

    def read(prompts: Sequence[str]) -> Tensor:
        """ln P of the choices among themselves, [item, choice]."""
        found = outcomes(model, prompts, [row.values["choices"] for row in rows], where=[row.where for row in rows], boundary=boundary, batch_size=batch_size)  # fmt: skip
        return found.logp.nan_to_num(nan=-torch.inf).log_softmax(1)

    at = torch.arange(len(rows))
    plain, changed = (read([pair[side] for pair in pairs]) for side in (0, 1))
    gain = (changed - plain)[at, right]
    null = None if change == "dictionary" else torch.zeros_like(gain)
    if change == "dictionary" and len(of) > 1 and not comparing():
        dealt = read([glossed(before, _dealt(of, seed)) for before, _ in pairs])
        null = (dealt - plain)[at, right]
    return reading(
        {"per_item": gain},
        "nats",
        better="higher",
        null_items=null,
        more={
            "accuracy": (hit(plain, right).mean(), (), "share of items"),
            "accuracy_changed": (hit(changed, right).mean(), (), "share of items"),
            "length": (torch.tensor([len(b) / max(1, len(a)) for a, b in pairs], dtype=torch.float64), ("prompt",), "characters over characters"),
        },
        tables={"prompts": [{"item": row.where, "changed": after} for row, (_, after) in zip(rows, pairs, strict=True)]},
        notes=[*said, f"{sum(touched)} of {len(rows)} prompts are changed"],
        seed=seed,
    )  # fmt: skip


def _changed(row: Row, change: str, glosses: Mapping[str, str]) -> tuple[str, str]:
    """A prompt as it is and as it is written otherwise."""
    prompt = str(row.values["prompt"])
    if change == "given":
        return prompt, str(row.values["changed"])
    if change == "dictionary":
        after = glossed(prompt, glosses)
        if unglossed(after, glosses) != prompt:
            raise PatchbayError(
                f"{row.where}: two entries of the dictionary read alike with their glosses, so the prompt could not be had back"
            )
        return prompt, after
    history = [str(one) for one in row.values["history"]]
    if not history:
        raise PatchbayError(f"{row.where}: history is empty")
    return "\n".join([*history, prompt]), "\n".join([*diffed(history), prompt])


# --- glosses ----------------------------------------------------------------------------------------


def _glosses(given: Any) -> dict[str, str]:
    if isinstance(given, str | Path):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise PatchbayError(f"could not read the glosses {given}: {error}") from error
    usable = isinstance(given, Mapping) and given and all(isinstance(x, str) and x.strip() for pair in given.items() for x in pair)  # fmt: skip
    if not usable:
        raise PatchbayError(f"glosses={given!r:.60}: a mapping from words to glosses, or a JSON file of one")
    return dict(given)


def glossed(text: str, glosses: Mapping[str, str]) -> str:
    """A text with "word (gloss)" for every whole word or phrase of the dictionary; of entries that begin alike the longest."""
    listed = "|".join(re.escape(word) for word in sorted(glosses, key=len, reverse=True))
    return re.sub(LETTERS.format(f"(?:{listed})"), lambda found: f"{found[0]} ({glosses[found[0]]})", text)


def unglossed(text: str, glosses: Mapping[str, str]) -> str:
    """The text without its glosses."""
    listed = "|".join(re.escape(f"{word} ({glosses[word]})") for word in sorted(glosses, key=len, reverse=True))
    ends = {f"{word} ({gloss})": word for word, gloss in glosses.items()}
    return re.sub(rf"(?<!\w)(?:{listed})", lambda found: ends[found[0]], text)


def _dealt(glosses: Mapping[str, str], seed: int) -> dict[str, str]:
    """Every word with the gloss of another."""
    words = list(glosses)
    random.Random(f"glosses-{seed}").shuffle(words)
    return {word: glosses[words[(i + 1) % len(words)]] for i, word in enumerate(words)}


# --- histories --------------------------------------------------------------------------------------


def diffed(history: Sequence[str]) -> list[str]:
    """The first observation, and for each later one what changed since the one before: hunks of lines without context and without header."""
    found = [history[0]]
    for before, after in itertools.pairwise(history):
        lines = list(difflib.unified_diff(before.split("\n"), after.split("\n"), n=0, lineterm=""))
        found.append("\n".join(lines[2:]))
    return found


def undiffed(told: Sequence[str]) -> list[str]:
    """The observations that `diffed` tells, byte for byte."""
    history = [told[0]]
    for diff in told[1:]:
        before, after, at = history[-1].split("\n"), [], 0
        lines = diff.split("\n") if diff else []
        i = 0
        while i < len(lines):
            hunk = HUNK.fullmatch(lines[i])
            if hunk is None:
                raise PatchbayError(f"{lines[i]!r} begins no hunk of a diff")
            old, n_old, n_new = int(hunk[1]), int(hunk[2] or 1), int(hunk[4] or 1)
            start = old - 1 if n_old else old
            after += before[at:start]
            after += [line[1:] for line in lines[i + 1 + n_old : i + 1 + n_old + n_new]]
            at, i = start + n_old, i + 1 + n_old + n_new
        history.append("\n".join(after + before[at:]))
    return history
