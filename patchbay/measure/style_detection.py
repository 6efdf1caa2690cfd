"""Style detection: whether a few texts of an author are enough to tell which other texts are theirs, by a model's states.

    score(text, author) = cos(state of the text, mean state of `support` texts of the author),    states the mean over tokens, of length 1

`value`: the area under the curve of scores for a text's own author against the others, over all pairs of a text and an author. Supports are drawn `draws` times; a
text is scored when it is in none of them, and where texts say their `source` (the prompt that they answer) none of its source is, since texts of one prompt
are alike whoever wrote them. Intervals draw whole texts. `partial`: the area up to a false positive rate of .01, standardised (chance .5); `accuracy`: how often the
author of the highest score is the right one. `null` is .5, and p that of authors dealt to the texts, `DEALS` times. One forward pass.

Soto et al. 2024, "Few-Shot Detection of Machine-Generated Text using Style Representations", whose encoder was trained for style; these are a language model's own
states. Higher is better. Where authors are models, the ratio of their likelihoods is the ceiling: `text_loss` of each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure import _estimates as estimates
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing, refuse_by_row
from patchbay.model.model import Model
from patchbay.model.states import mean_states
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port

DEALS = 500
AREA = "area under the curve"


@method(paper="soto2024")
def style_detection(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    support: int = 5,
    layer: int = -1,
    centred: bool = True,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Area under the curve of a text's likeness to a few texts of its own author against the others'.

    `score` and `label` [prompt], of each text and each author in turn; `partial`, `accuracy` with `chance`.

    `items`: rows with the fields text, author and, where wanted, source. `support`: texts of each author that are known. `layer`: whose stream is read, the
    last without. `centred`: whether the mean state of all supports is taken away. `draws`: supports that are drawn.
    """
    rows, said = rows_of(resolved(model, items), ("text", "author"), ("source",))
    texts_only(rows, ("text",))
    authors = list(dict.fromkeys(str(row.values["author"]) for row in rows))
    of = [authors.index(str(row.values["author"])) for row in rows]
    sources = [str(row.values["source"]) if "source" in row.values else f"text {i}" for i, row in enumerate(rows)]
    fewest = min(of.count(i) for i in range(len(authors)))
    if len(authors) < 2 or support < 1 or fewest <= support or draws < 1:
        raise PatchbayError(
            f"{len(authors)} authors, the least of them with {fewest} texts, support={support}, draws={draws}: two authors or more, each with more texts than their support"
        )
    if not -model.n_layers <= layer < model.n_layers:
        raise PatchbayError(f"layer={layer}: this model has {model.n_layers}")
    refuse_by_row(model)
    port = Port("resid_out", layer % model.n_layers)
    states = mean_states(model, model.encode([row.values["text"] for row in rows]), [port], batch_size)[0]
    scores = scored(states, of, sources, support, centred, draws, seed)  # [text, author]
    told = ~scores.isnan().any(1)
    if int(told.sum()) < 2:
        raise PatchbayError(
            "no two texts are left that no support's source has: more sources, or a smaller support, are needed"
        )
    own = torch.nn.functional.one_hot(torch.tensor(of), len(authors)).double()[told]
    scores = scores[told]
    area = estimates.auroc(scores.flatten(), own.flatten())
    known = {"partial": (estimates.partial_auroc(scores.flatten(), own.flatten()), AREA)}
    hits = (scores.argmax(1) == own.argmax(1)).double()
    known |= {"accuracy": (float(hits.mean()), "share of texts"), "chance": (1.0 / len(authors), "share of texts")}
    items_of = torch.stack([scores.flatten(), own.flatten()], 1)
    texts_of = [i for i in range(len(scores)) for _ in authors]
    interval = estimates.resampled(_area, items_of, groups=texts_of, n=300, seed=seed) if not comparing() else None
    return reading(
        {"score": scores.flatten(), "label": own.flatten()}, AREA, better="higher", made="auroc", null=0.5,
        p=None if comparing() else maths.draws_p(area, _dealt(scores, own, seed)), interval=interval,
        more={name: (x, (), unit) for name, (x, unit) in known.items() if x == x}, units={"score": "cosine", "label": "label"},
        tables={"authors": [{"author": name, "texts": of.count(i)} for i, name in enumerate(authors)]},
        notes=[*said, *([] if bool(told.all()) else [f"{int((~told).sum())} of {len(told)} texts were in a support, or of one's source, every time"])],
        seed=seed,
    )  # fmt: skip


def _area(items: Tensor) -> float:
    return estimates.auroc(items[:, 0], items[:, 1])


def scored(
    states: Tensor, of: Sequence[int], sources: Sequence[str], support: int, centred: bool, draws: int, seed: int
) -> Tensor:
    """Mean cosine of each text with each author's support over the draws in which the text is free, [text, author]; NaN where it never is."""
    unit = states / states.norm(dim=1, keepdim=True)
    n_authors = max(of) + 1
    total, times = torch.zeros(len(of), n_authors, dtype=torch.float64), torch.zeros(len(of), 1, dtype=torch.float64)
    for draw in range(draws):
        chance = random.Random(f"style-{seed}-{draw}")
        chosen = [_support([i for i, a in enumerate(of) if a == author], sources, support, chance) for author in range(n_authors)]  # fmt: skip
        known = [i for each in chosen for i in each]
        held = {sources[i] for i in known}
        free = torch.tensor([source not in held for source in sources])
        mean = unit[known].mean(0) if centred else torch.zeros_like(unit[0])
        prototypes = torch.stack([unit[each].mean(0) - mean for each in chosen])  # [author, d_model]
        cosines = maths.cosine((unit - mean)[:, None], prototypes[None]).nan_to_num(0.0)
        total[free] += cosines[free]
        times[free] += 1
    return total / torch.where(times > 0, times, torch.nan)


def _support(own: Sequence[int], sources: Sequence[str], n: int, chance: random.Random) -> list[int]:
    """n of an author's texts, of as few sources as it takes: sources are drawn, and their texts taken."""
    order = sorted({sources[i] for i in own})
    chance.shuffle(order)
    found = [i for source in order for i in own if sources[i] == source]
    return found[:n]


def _dealt(scores: Tensor, own: Tensor, seed: int) -> Tensor:
    """Areas when authors are dealt to the texts at random, [deal]."""
    order = torch.rand(DEALS, len(own), generator=torch.Generator().manual_seed(seed)).argsort(1)
    ranks = maths.mean_ranks(scores.flatten()).view(scores.shape)  # [text, author]
    n = len(own)
    won = ranks[torch.arange(n), own.argmax(1)[order]].sum(1) - n * (n - 1) / 2  # [deal]
    return won / (n * n * (own.shape[1] - 1))
