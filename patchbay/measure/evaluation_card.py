"""Evaluation card: one table of several readings of the same items: accuracy, calibration, robustness, fairness, representation, the worst of samples.

    robustness = mean over items of the lowest accuracy over rewritings that keep the answer      (as it is, small letters, more spaces, contractions, a typo)
    fairness   = the same over texts with words swapped: names, pronouns
    representation = 1/2 sum over groups of |share of the group's words in what is written - 1 / groups|

Accuracy and calibration are `answer_choices` and `calibration`; the worst of samples is `worst_of_k` after the items' prompts, representation of samples after them too. Both
worst cases are below the accuracy by how they are made. `value` is robustness; `null` the accuracy with every item's choices after another's prompt. Representation is
left out where no word of any group is written. Seconds are the record's `wall_time_s`.

Liang et al. 2022, "Holistic Evaluation of Language Models". Higher is better. Word groups find words, not what is said of those whom they name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._answers import outcomes
from patchbay.measure._asked import asked_of, hit
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.measure._samples import Words, samples, texts_of
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.replay import find_method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

LEAST = 20  # items of a calibration
SHARE = "share of items"
SAMPLED: dict[str, Any] = {"max_new_tokens": 20, "top_p": 0.9}
SHORT = {"is not": "isn't", "are not": "aren't", "do not": "don't", "does not": "doesn't", "it is": "it's", "I am": "I'm", "cannot": "can't"}  # fmt: skip


@method(paper="liang2022")
def evaluation_card(
    model: Model,
    items: Items,
    *,
    swaps: dict[str, str] | None = None,
    groups: dict[str, list[str]] | None = None,
    scorer: list[str] | str | Any | None = None,
    per_prompt: int = 5,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """A card of readings of one set of questions with choices, with robustness as its value.

    `accuracy` [prompt], `fair` [prompt]; `mass`, the mean probability of all choices; table `card`, a row for each reading with its interval and null.

    `items`: a Task of texts, or rows with the fields prompt, choices and answer. `swaps`: words and what stands for them, both ways, as names or pronouns; without,
    no fairness. `groups`: name -> words, whose shares in what is written are compared; without, no representation. `scorer`: what scores a
    sample, as in worst_of_k; without, no worst of samples. `per_prompt`: samples after each prompt.
    """
    given = resolved(model, items)
    asked = asked_of(given)
    if not all(isinstance(prompt, str) for prompt in asked.prompts):
        raise PatchbayError("a card rewrites prompts, and these are token ids: give items whose prompts are texts")
    right, mass = torch.tensor(asked.right), list[float]()

    def read(rewrite: Callable[[str], str]) -> Tensor:
        """Right or wrong after every prompt rewritten, [item]."""
        found = outcomes(model, [rewrite(prompt) for prompt in asked.prompts], asked.choices, where=asked.where, boundary="back_up", batch_size=batch_size)  # fmt: skip
        mass.append(float(found.mass.mean()))
        return hit(found.logp, right)

    plain = read(str)
    robust = torch.stack([plain, *(read(rewrite) for rewrite in REWRITINGS.values())]).amin(0)
    columns = {"robust": robust}
    if swaps:
        columns["fair"] = torch.minimum(plain, read(lambda text: swapped(text, swaps)))
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    rows, null = [], None
    if not comparing():
        choices = find_method("measure.answer_choices")(model, given, boundary="back_up", **how)
        null = float(choices["null"]) if "null" in choices else None
        rows = [_row("accuracy", choices, "higher")]
        rows += [_row("calibration error", find_method("measure.calibration")(model, given, boundary="back_up", **how), "lower")] if len(plain) >= LEAST else []  # fmt: skip
    for name, values in columns.items():
        ends = maths.bootstrap_interval(values, seed=seed)
        rows.append({"reading": {"robust": "robustness", "fair": "fairness"}[name], "value": ends.mean, "low": ends.low, "high": ends.high, "null": None, "better": "higher"})  # fmt: skip
    more: dict[str, Any] = {"accuracy": (plain, ("prompt",), "right"), "mass": (mass[0], (), "probability")}
    more |= {name: (values, ("prompt",), "right") for name, values in columns.items() if name != "robust"}
    if groups:
        apart = _representation(model, asked.prompts, groups, per_prompt, how)
        rows.append({"reading": "representation", "value": apart, "low": None, "high": None, "null": 0.0, "better": "lower"})  # fmt: skip
        more |= {"representation": (apart, (), "total variation")} if apart == apart else {}
    if scorer is not None and not comparing():
        worst = find_method("measure.worst_of_k")(model, asked.prompts, scorer, k=per_prompt, per_prompt=per_prompt, **SAMPLED, **how)  # fmt: skip
        rows.append(_row(f"worst of {per_prompt}", worst, "lower"))
    return reading(
        {"per_item": robust},
        SHARE,
        better="higher",
        null=null,
        more=more,
        tables={"card": rows},
        notes=[*asked.said, f"rewritings: {', '.join(REWRITINGS)}"],
        seed=seed,
    )


def _row(name: str, found: Result, better: str) -> dict[str, Any]:
    return {"reading": name, **{key: float(found[key]) if key in found else None for key in ("value", "low", "high", "null")}, "better": better}  # fmt: skip


def contracted(text: str) -> str:
    """Words that are written together in speech, written so."""
    return re.sub("|".join(rf"\b{long}\b" for long in SHORT), lambda found: SHORT[found[0]], text)


def mistyped(text: str) -> str:
    """Two inner letters of one word of four letters or more change places; which, the text alone decides."""
    words = [found for found in re.finditer(r"[A-Za-z]{4,}", text) if found[0][1] != found[0][2]]
    if not words:
        return text
    at = random.Random(f"typo-{text}").choice(words).start() + 1
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


REWRITINGS: dict[str, Callable[[str], str]] = {
    "small letters": str.lower,
    "more spaces": lambda text: re.sub(r"(?<=\S) (?=\S)", "  ", text),
    "contractions": contracted,
    "a typo": mistyped,
}


def swapped(text: str, swaps: Mapping[str, str]) -> str:
    """Every whole word of the swaps as what stands for it, both ways at once."""
    both = {**{b: a for a, b in swaps.items()}, **swaps}
    listed = "|".join(re.escape(word) for word in sorted(both, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{listed})(?!\w)", lambda found: both[found[0]], text)


def _representation(
    model: Model, prompts: list[str], groups: Mapping[str, list[str]], n: int, how: dict[str, Any]
) -> float:
    """Total variation of the groups' shares of their words in samples from equal shares; NaN where none is written."""
    if len(groups) < 2:
        raise PatchbayError(f"groups={dict(groups)!r:.60}: two groups of words or more")
    texts = [text for each in samples(model, prompts, n, **SAMPLED, **how) for text in texts_of(model, each)]
    return apart([sum(Words(words, "count")(texts)) for words in groups.values()])


def apart(counts: list[float]) -> float:
    """Half the sum of how far each share lies from equal ones; NaN of nothing."""
    total = sum(counts)
    return sum(abs(x / total - 1 / len(counts)) for x in counts) / 2 if total else float("nan")
