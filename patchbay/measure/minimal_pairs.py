"""Minimal pairs: how often a model finds the good sentence of a pair likelier than the bad one, beside what length alone gives.

    value = share of pairs with log p(good) > log p(bad), equal ones half;    per_item in nats: the margin, in `margin`

`null` is the share that the sentence with fewer tokens wins on the same pairs (equal lengths half), and p compares the two pair by pair: a sum
of log-probabilities prefers short sentences, so a share above one half says nothing by itself. Table `lengths`: the share where the good
sentence is shorter, longer and equally long; table `groups`: each phenomenon, p against one half, Benjamini-Hochberg over them;
`low_groups` and `high_groups` the interval over phenomena. Single sentences with labels of 1 (acceptable) and 0 give AUROC in place
of the share, its null that of minus the number of tokens, and `mcc` on one half of the sentences at the threshold that is best on the other.
One forward pass over the sentences.

Someya et al. 2023, "JCoLA: Japanese Corpus of Linguistic Acceptability"; the pairs as in Warstadt et al. 2020 (BLiMP). Higher is
better. Not shown: what a model knows of grammar where its margins follow length or frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure import _estimates as estimates
from patchbay.measure._items import Items, resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._texts import Text, losses, whole_texts
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row
from patchbay.tasks.task import Task

SHARE = "share of pairs"


@method(paper="someya2023")
def minimal_pairs(
    model: Model,
    items: Items,
    *,
    score: Literal["sum", "token", "char", "penlp"] = "sum",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Share of pairs whose good sentence scores higher (or AUROC of labelled sentences), beside what length alone gives.

    `items`: rows with the fields good and bad, or sentence and label (1 acceptable, 0 not), and where wanted group; or a Task, whose pairs are
    its prompts with the right and with the first wrong answer. `score`: what is compared: sum of log-probabilities, or by token, by char, or
    penlp, by ((5 + tokens) / 6)^0.8.
    """
    items = resolved(model, items)
    if not isinstance(items, Task) and _labelled(items):
        rows, said = rows_of(items, ("sentence", "label"), ("group",))
        return _labels(model, rows, said, score, seed, batch_size)
    good, bad, groups, where, said = _pairs(items)
    texts = whole_texts(model, [*good, *bad], [*(f"{w}, good" for w in where), *(f"{w}, bad" for w in where)])
    values = scored(model, texts, score, batch_size)
    margin = values[: len(good)] - values[len(good) :]  # [pair]
    lengths = torch.tensor([len(text.ids) for text in texts])
    shorter = lengths[len(good) :] - lengths[: len(good)]  # above 0 where the good sentence has fewer tokens
    won, null = _wins(margin), _wins(shorter)
    more: dict[str, Any] = {"margin": (margin, ("prompt",), _unit(score))}
    tables: dict[str, Any] = {"lengths": _by_length(won, shorter, seed)}
    if groups:
        tables["groups"] = _by_group(won, groups, seed)
        ends = _over_groups(won, groups, seed)
        more |= {name: (end, (), SHARE) for name, end in zip(("low_groups", "high_groups"), ends[1:], strict=True) if end == end}  # fmt: skip
    return reading(
        {"per_item": won}, SHARE, better="higher", null_items=null, more=more, tables=tables, notes=said, seed=seed
    )


def scored(model: Model, texts: Sequence[Text], score: str, batch_size: int) -> Tensor:
    """What is compared, [text]."""
    longest = model.longest_prompt
    long = next((text for text in texts if longest is not None and len(text.before) + len(text.ids) > longest), None)
    if long is not None:
        raise PatchbayError(
            f"{long.where} has {len(long.before) + len(long.ids)} tokens and the model reads {longest}: a sentence is scored whole; shorten it, or leave it out"
        )
    found = losses(model, texts, window=None, batch_size=batch_size)
    total = -torch.stack([loss.sum() for loss in found])
    n = torch.tensor([len(text.ids) for text in texts]).double()
    if score == "char":
        lacking = next((text for text in texts if text.n_chars is None), None)
        if lacking is not None:
            raise PatchbayError(
                f"score='char': {lacking.where} is given as ids and the model has no tokenizer; possible: sum, token, penlp"
            )
        return total / torch.tensor([float(max(1, text.n_chars or 0)) for text in texts]).double()
    return {"sum": total, "token": total / n, "penlp": total / ((5.0 + n) / 6.0) ** 0.8}[score]


def _unit(score: str) -> str:
    return {
        "sum": "nats",
        "token": "nats per token",
        "char": "nats per character",
        "penlp": "nats, penalised by length",
    }[score]


def _pairs(items: Any) -> tuple[list[Any], list[Any], list[Any], list[str], list[str]]:
    if isinstance(items, Task):
        lacking = next(
            (i for i, each in enumerate(items.whole_answers if items.answered else ()) if len(each) < 2), None
        )
        if not items.answered or lacking is not None:
            raise PatchbayError(
                f"task {items.name} has prompts without a wrong answer: a pair is a prompt with the right one and with a wrong one"
            )
        good, bad = (
            [(*p, *a[which]) for p, a in zip(items.clean, items.whole_answers, strict=True)] for which in (0, 1)
        )
        return good, bad, [], [f"prompt {i}" for i in range(len(items))], []
    rows, said = rows_of(items, ("good", "bad"), ("group",))
    texts_only(rows, ("good", "bad"))
    same = next((row for row in rows if row.values["good"] == row.values["bad"]), None)
    if same is not None:
        raise PatchbayError(f"{same.where}: good and bad are the same sentence, {same.values['good']!r:.60}")
    groups = [row.values.get("group") for row in rows]
    if any(group is None for group in groups) and any(group is not None for group in groups):
        raise PatchbayError(f"{rows[groups.index(None)].where} has no group and others have one: all pairs or none")
    return [row.values["good"] for row in rows], [row.values["bad"] for row in rows], groups if None not in groups else [], [row.where for row in rows], said  # fmt: skip


def _labelled(items: Any) -> bool:
    """Whether items are single sentences: they have the field label, or say which is meant."""
    if isinstance(items, list) and items and isinstance(items[0], dict):
        return "label" in items[0]
    try:
        rows_of(items, ("sentence", "label"))
    except PatchbayError:
        return False
    return True


def _wins(margin: Tensor) -> Tensor:
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def _by_length(won: Tensor, shorter: Tensor, seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, chosen in (("shorter", shorter > 0), ("equal", shorter == 0), ("longer", shorter < 0)):
        if bool(chosen.any()):
            value, low, high = maths.bootstrap_interval(won[chosen], seed=seed)
            rows.append({"good is": name, "n": int(chosen.sum()), "value": value, "low": low, "high": high})
    return rows


def _by_group(won: Tensor, groups: Sequence[Any], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(groups):
        own = won[torch.tensor([group == name for group in groups])]
        p = float(maths.sign_flip_p((own - 0.5)[:, None], seed=seed)[0])
        rows.append({"group": str(name), "n": len(own), "value": float(own.mean()), "p": p})
    adjusted = maths.benjamini_hochberg(torch.tensor([row["p"] for row in rows], dtype=torch.float64))
    return [row | {"q": float(q)} for row, q in zip(rows, adjusted, strict=True)]


def _over_groups(won: Tensor, groups: Sequence[Any], seed: int) -> tuple[float, float, float]:
    """The share, with its interval where whole groups are drawn."""
    names = list(dict.fromkeys(groups))
    at = torch.tensor([names.index(group) for group in groups])
    sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, at, won)
    counts = torch.bincount(at, minlength=len(names)).double()
    value, low, high = maths.intervals(sums[:, None], counts, seed=seed)
    return float(value), float(low), float(high)


# --- single sentences ---------------------------------------------------------------------------------


def _labels(model: Model, rows: Sequence[Row], said: list[str], score: str, seed: int, batch_size: int) -> Result:
    texts_only(rows, ("sentence",))
    labels = []
    for row in rows:
        if str(row.values["label"]) not in ("0", "1"):
            raise PatchbayError(f"{row.where}: label is 1 (acceptable) or 0, got {row.values['label']!r}")
        labels.append(float(row.values["label"]))
    texts = whole_texts(model, [row.values["sentence"] for row in rows], [row.where for row in rows])
    values, right = scored(model, texts, score, batch_size), torch.tensor(labels).double()
    short = -torch.tensor([float(len(text.ids)) for text in texts]).double()
    notes = list(said)
    if len(set(labels)) < 2:
        notes.append("labels of one class: there is nothing to tell apart, and no AUROC")
    mcc = _held_out(values, right, seed)
    more = {"mcc": (mcc, (), "correlation")} if mcc == mcc else {}
    return reading(
        {"per_item": values, "label": right},
        "area under the curve",
        better="higher",
        made="auroc",
        null=estimates.auroc(short, right),
        p=_against_length(values, short, right, seed),
        more=more,
        units={"per_item": _unit(score), "label": "label"},
        notes=notes,
        seed=seed,
    )


def _against_length(values: Tensor, short: Tensor, right: Tensor, seed: int) -> float:
    """p that the scores tell labels apart as minus the number of tokens does: their ranks exchanged sentence by sentence."""

    def area(items: Tensor) -> float:
        return estimates.auroc(items[:, 0], items[:, 1])

    first, second = (torch.stack([_ranks(x), right], 1) for x in (values, short))
    return estimates.exchanged(area, first, second, seed=seed)


def _ranks(values: Tensor) -> Tensor:
    """Ranks in place of values, so that two scores of other units can be exchanged."""
    return torch.searchsorted(values.sort().values, values).double()


def _held_out(values: Tensor, labels: Tensor, seed: int) -> float:
    """MCC on one random half of the sentences at the threshold that is best on the other."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    fit, test = order[: len(order) // 2], order[len(order) // 2 :]
    if not len(fit):
        return float("nan")
    cuts = values[fit].unique()
    found = [estimates.matthews(labels[fit], (values[fit] >= cut).double()) for cut in cuts]
    if all(x != x for x in found):
        return float("nan")
    best = cuts[max(range(len(found)), key=lambda i: (found[i] == found[i], found[i]))]
    return estimates.matthews(labels[test], (values[test] >= best).double())
