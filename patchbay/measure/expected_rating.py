"""Expected rating: the mean of a scale's numbers by the probability that a model gives them after a word, beside people's norms.

    E(word) = sum over s of s p(s | frame(word)) / mass,    mass = sum over s of p(s | frame(word))

`value`: Spearman's correlation of E with the norms over words, its interval over words, p by dealing the norms to the words at random; `null` is 0. Without
norms the mean of E. A word whose scale holds less than `min_mass` of the probability has no rating (NaN): then the numbers are not
what the model would say, and a correlation of them, however significant, is none of ratings. `frame_spearman`: the correlation of the norms with
plain log p of the word in the frame, which is what a rating must beat. One forward pass.

Conde et al. 2025, "Adding LLMs to the psycholinguistic norming toolbox: A practical guide to getting the most out of human ratings". Higher is better. Not shown: that the ratings are about the words' meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure import _estimates as estimates
from patchbay.measure._answers import outcomes, score, spell
from patchbay.measure._items import finite, resolved, rows_of
from patchbay.measure._meter import reading
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

FRAME = 'Question: On a scale from 1 to 5, how familiar is "{}"?\nAnswer:'


@method(paper="brysbaert2025")
def expected_rating(
    model: Model,
    items: str | list[dict[str, Any]] | list[str],
    *,
    frame: str = FRAME,
    scale: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5),
    min_mass: float = 0.1,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """The expected rating of each word, and its rank correlation with norms where these are given.

    `rating` [prompt], `mass` [prompt], `entropy` [prompt] of the scale in nats, `mode` [prompt]; `withheld`, the share of words without a rating.

    `items`: words, or rows with the fields word and, where wanted, norm. `frame`: the question, with {} where the word stands. `scale`: its numbers. `min_mass`:
    the least probability of the whole scale with which a word has a rating.
    """
    given = resolved(model, items)
    plain = isinstance(given, list) and given and all(isinstance(word, str) for word in given)
    rows, said = rows_of([{"word": word} for word in given] if plain else given, ("word",), ("norm",))
    if frame.count("{}") != 1 or len(set(scale)) < 2 or not 0 <= min_mass < 1:
        raise PatchbayError(
            f"frame={frame!r} holds {{}} once, scale={list(scale)} two numbers or more, min_mass={min_mass} lies in [0, 1)"
        )
    words = [str(row.values["word"]) for row in rows]
    prompts = [frame.replace("{}", word) for word in words]
    where = [row.where for row in rows]
    p = outcomes(
        model, prompts, [[f" {s}" for s in scale]] * len(words), where=where, batch_size=batch_size
    ).logp.exp()  # [word, scale]
    mass, numbers = p.sum(1), torch.tensor([float(s) for s in scale], dtype=torch.float64)
    share = p / mass[:, None]
    rating = torch.where(mass >= min_mass, share @ numbers, torch.nan)
    more: dict[str, Any] = {
        "mass": (mass, ("prompt",), "probability"),
        "entropy": (-(share * share.clamp_min(1e-300).log()).sum(1), ("prompt",), "nats"),
        "mode": (numbers[share.argmax(1)], ("prompt",), "rating"),
        "withheld": (rating.isnan().double().mean(), (), "share of words"),
    }
    notes = list(said)
    if bool(rating.isnan().any()):
        notes.append(
            f"the scale holds {float(mass.min()):.2g} to {float(mass.max()):.2g} of the probability: {int(rating.isnan().sum())} of {len(words)} words have no rating (below {min_mass:g})"
        )
    norms = _norms(rows)
    if norms is None:
        return reading({"per_item": rating}, "rating", better="neither", more=more, notes=notes, seed=seed)
    more |= _beside(model, words, frame, norms, batch_size)
    rated = ~rating.isnan()
    value = maths.spearman(rating[rated], norms[rated]) if int(rated.sum()) > 1 else float("nan")
    items_of = torch.stack([rating, norms], 1)
    interval = (
        estimates.resampled(_spearman, items_of, seed=seed) if value == value else maths.Interval(value, value, value)
    )
    p_value = _rank_p(rating[rated], norms[rated], seed) if value == value else None
    return reading(
        {"rating": rating, "norm": norms}, "correlation", better="higher", made="spearman", null=0.0, p=p_value, interval=interval, more=more,
        units={"rating": "rating", "norm": "rating"}, notes=notes, seed=seed,
    )  # fmt: skip


def _spearman(items: Tensor) -> float:
    kept = items[~items.isnan().any(1)]
    return maths.spearman(kept[:, 0], kept[:, 1]) if len(kept) > 1 else float("nan")


def _rank_p(a: Tensor, b: Tensor, seed: int, n: int = 2000) -> float:
    """Two-sided p of a rank correlation, b dealt to a at random."""
    generator = torch.Generator().manual_seed(seed)
    deals = torch.stack([torch.randperm(len(b), generator=generator) for _ in range(n)])
    return maths.draws_p(maths.spearman(a, b), maths.spearman_of_deals(a, b, deals), two_sided=True)


def _norms(rows: Sequence[Any]) -> Tensor | None:
    given = [row.values.get("norm") for row in rows]
    if all(x is None for x in given):
        return None
    norms = [finite(x, f"{row.where}: norm is a number for every word or for none") for row, x in zip(rows, given, strict=True)]  # fmt: skip
    return torch.tensor(norms, dtype=torch.float64)


def _beside(model: Model, words: Sequence[str], frame: str, norms: Tensor, batch_size: int) -> dict[str, Any]:
    """The correlation of norms with log p of the word itself, where the frame puts text before it."""
    before = frame.partition("{}")[0]
    if not before.strip():
        return {}
    try:
        spelled = spell(model, [before] * len(words), [[word] for word in words], boundary="back_up")
    except PatchbayError:
        return {}
    logp = score(model, spelled, batch_size=batch_size).logp[:, 0]
    found = maths.spearman(logp, norms)
    return {"frame_spearman": (found, (), "correlation")} if found == found else {}
