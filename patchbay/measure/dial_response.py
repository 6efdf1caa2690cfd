"""Dial response: what each of several knobs does to each of several attributes of what a model writes.

    response[dial, attribute] = slope of the mean score of the samples on the dial's strength, over the strengths given

by least squares, all other dials at their neutral strength. `monotone` [dial]: Spearman's correlation of strength and the dial's own attribute (the
one at its place). `value`: cross-talk, the share of sum |response| that lies off the diagonal, each attribute's slopes divided by the spread of
its scores, so that scores of other units count alike; 0 where every dial moves its own attribute alone, about 1 - 1 / dials where
none is any attribute's own: `null`, by dealing the dials to the attributes at random. Its interval is over prompts. The same prompts and sample seeds at every strength;
at neutral strengths every dial gives the same texts.

Li et al. 2024, "Learning to Generate Research Idea with Dynamic Control", whose controllers are such dials. Lower is better. A list of words finds words; a dial that
breaks the text may move them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.knobs.knob import Knob
from patchbay.measure import _estimates as estimates
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._samples import Words, samples, scored, texts_of
from patchbay.measure._texts import given_texts
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

GRID = ("condition", "statistic")


@method(paper="li2024c")
def dial_response(
    model: Model,
    items: Items,
    dials: dict[str, Knob],
    scorers: dict[str, Any],
    *,
    strengths: list[float] | tuple[float, ...] = (0.0, 0.5, 1.0),
    per_prompt: int = 4,
    max_new_tokens: int = 40,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """How far each dial moves each attribute, and how much of that is not its own.

    Main variable `value`, the cross-talk; `response` [condition, statistic], the slope of each attribute on each dial; `monotone` [condition];
    table `scores`: the mean score of each attribute at each strength of each dial.

    `items`: prompts, as texts, ids, a Task or a file with the field text. `dials`: name -> knob. `scorers`: name -> a list of words, a file of them, or an
    object with __call__(texts) and to_json(); as many as dials, each dial's own attribute at its place. `strengths`: how far each dial is
    turned. `per_prompt`: samples of a prompt. `max_new_tokens`: tokens of a sample.
    """
    judges = {name: Words.of(one, "rate") for name, one in _mapped(scorers, "scorers").items()}
    knobs = _mapped(dials, "dials")
    steps = sorted({float(s) for s in strengths})
    if len(judges) != len(knobs) or len(steps) < 2:
        raise PatchbayError(
            f"{len(knobs)} dials, {len(judges)} scorers and strengths {steps}: as many scorers as dials, and two strengths or more"
        )
    for knob in knobs.values():
        knob.check(model)
    prompts, _, _, said = given_texts(resolved(model, items))
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    found = torch.stack(
        [
            torch.stack([_scores(model, prompts, knob.edits_at(step), judges, per_prompt, how) for step in steps])
            for knob in knobs.values()
        ]
    )  # [dial, strength, attribute, prompt]
    slopes = _slopes(found, steps)  # [dial, attribute, prompt]
    spread = found.flatten(0, 1).movedim(1, 0).flatten(1).std(1).clamp_min(1e-12)  # [attribute]
    items_of = (slopes / spread[:, None]).flatten(0, 1).T  # [prompt, dial * attribute]
    k = len(knobs)
    value = estimates.resampled(lambda x: cross_talk(x.mean(0).view(k, k)), items_of, seed=seed)
    dealt = torch.tensor(
        [cross_talk(items_of.mean(0).view(k, k)[:, order]) for order in _deals(k, seed)], dtype=torch.float64
    )
    own = torch.tensor(
        [maths.spearman(torch.tensor(steps), found[i, :, i].mean(-1)) for i in range(k)], dtype=torch.float64
    )
    more: dict[str, Any] = {"response": (slopes.mean(-1), GRID, "score per strength")}
    if bool((~own.isnan()).any()):
        more["monotone"] = (own, ("condition",), "correlation")
    rows = [
        {"dial": dial, "strength": step, **{name: float(found[i, j, a].mean()) for a, name in enumerate(judges)}}
        for i, dial in enumerate(knobs) for j, step in enumerate(steps)
    ]  # fmt: skip
    ingredient = slopes.diagonal(dim1=0, dim2=1).mean(1)  # [prompt]: how far dials move their own attributes
    result = reading(
        {"per_item": ingredient}, "share", better="lower", null=float(dealt.nanmean()), p=maths.draws_p(-value.mean, -dealt) if value.mean == value.mean else None,
        interval=value, more=more, units={"per_item": "score per strength"}, tables={"scores": rows}, notes=said, seed=seed,
    )  # fmt: skip
    result.coords |= {"condition": list(knobs), "statistic": list(judges)}
    result.tables.pop("meter")  # its value is no mean of what lies by prompt
    return result


def _mapped(given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not given:
        raise PatchbayError(f"{what} are a mapping from names, got {given!r:.60}")
    return dict(given)


def _scores(
    model: Model, prompts: Sequence[Any], edits: Sequence[Any], judges: Mapping[str, Any], n: int, how: dict[str, Any]
) -> Tensor:
    """Mean score of the samples, [attribute, prompt]."""
    with model.edited(*edits):
        texts = [texts_of(model, each) for each in samples(model, prompts, n, **how)]
    return torch.stack([torch.stack([scored(judge, each).mean() for each in texts]) for judge in judges.values()])


def _slopes(found: Tensor, steps: Sequence[float]) -> Tensor:
    """Least squares of [dial, strength, attribute, prompt] on the strengths, [dial, attribute, prompt]."""
    x = torch.tensor(steps, dtype=torch.float64)
    x = x - x.mean()
    return torch.einsum("s,dsap->dap", x, found) / (x @ x)


def cross_talk(response: Tensor) -> float:
    """Share of |response| off the diagonal; NaN where nothing moves."""
    total = float(response.abs().sum())
    return 1.0 - float(response.diagonal().abs().sum()) / total if total else float("nan")


def _deals(k: int, seed: int, n: int = 200) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(k, generator=generator) for _ in range(n)]
