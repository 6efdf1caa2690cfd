"""Doubtful tokens: whether the tokens that a guess has wrong are those that the model was unsure of.

    value = sum of wrong tokens with p < `tau` / sum of wrong tokens        recall of the holes that a solver would be given

Wrong are a guess's tokens that no longest common run with the true text holds (difflib's blocks). `holes`: the share of all tokens below tau, which is the recall that
as many tokens at random have, `null`; p from `DEALS` deals of the wrong places within each guess. `precision`: the share of holes that are wrong. `auroc`: how
well p ranks them. Table `holes`: each hole with the model's likeliest tokens for it; `fill` puts such together into the likeliest text
that a check of one's own accepts. One forward pass.

Lee et al. 2023, "Guess & Sketch: Language Model Guided Transpilation", whose solver is the user's. Higher is better. A guess that is wrong and sure has no
holes: the recall counts it.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure import _estimates as estimates
from patchbay.measure._answers import spell
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing, distributions
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

DEALS = 1000
CANDIDATES = 5
SHARE = "share of wrong tokens"


@method(paper="lee2023")
def doubtful_tokens(
    model: Model, items: str | list[dict[str, Any]], *, tau: float = 0.5, seed: int = 0, batch_size: int = 32
) -> Result:
    """Recall of a guess's wrong tokens among those with a probability below tau.

    `found` and `wrong` [prompt], counts; `holes`, `precision`, `auroc`; table `holes`.

    `items`: rows with the fields prompt, guess and truth, texts. `tau`: the probability below which a token is a hole.
    """
    rows, said = rows_of(resolved(model, items), ("prompt", "guess", "truth"))
    texts_only(rows, ("prompt", "guess", "truth"))
    if not 0 < tau <= 1:
        raise PatchbayError(f"tau={tau} lies in (0, 1]")
    prompts = [row.values["prompt"] for row in rows]
    spelled = spell(
        model, prompts, [[row.values["guess"], row.values["truth"]] for row in rows], where=[row.where for row in rows], boundary="back_up"
    )  # fmt: skip
    full = [prompt + answers[0] for prompt, answers in zip(spelled.prompts, spelled.answers, strict=True)]
    places = [range(len(prompt) - 1, len(row) - 1) for prompt, row in zip(spelled.prompts, full, strict=True)]
    logp = distributions(model, full, places, batch_size=batch_size)  # of each guess [token, vocab]
    p = [each.exp().gather(1, torch.tensor(answers[0])[:, None])[:, 0] for each, answers in zip(logp, spelled.answers, strict=True)]  # fmt: skip
    wrong = [wrong_tokens(*answers) for answers in spelled.answers]
    total = float(sum(each.sum() for each in wrong))
    holes = [(each < tau).double() for each in p]
    hit = [(a * b).sum() for a, b in zip(holes, wrong, strict=True)]
    n, n_holes = sum(map(len, p)), float(sum(each.sum() for each in holes))
    numbers = {"holes": n_holes / n, "precision": float(sum(hit)) / n_holes if n_holes else float("nan")}
    numbers["auroc"] = estimates.auroc(-torch.cat(p), torch.cat(wrong))
    notes = list(said) if total else [*said, "no token of any guess is wrong: there is no recall"]
    return reading(
        {"found": torch.stack(hit), "wrong": torch.stack([each.sum() for each in wrong])},
        SHARE,
        better="higher",
        made="ratio",
        null=numbers["holes"],
        p=_p(holes, wrong, float(sum(hit)), seed) if total and not comparing() else None,
        more={name: (x, (), "probability" if name != "auroc" else "area under the curve") for name, x in numbers.items() if x == x},
        units={"found": "tokens", "wrong": "tokens"},
        tables={"holes": _holes(model, rows, spelled.answers, p, logp, tau)},
        notes=notes,
        seed=seed,
    )  # fmt: skip


def wrong_tokens(guess: Sequence[int], truth: Sequence[int]) -> Tensor:
    """1 for every token of the guess that stands in no run that both have, [token]."""
    wrong = torch.ones(len(guess), dtype=torch.float64)
    for block in difflib.SequenceMatcher(None, list(guess), list(truth), autojunk=False).get_matching_blocks():
        wrong[block.a : block.a + block.size] = 0.0
    return wrong


def _p(holes: Sequence[Tensor], wrong: Sequence[Tensor], hit: float, seed: int) -> float:
    """How often as many wrong tokens are holes when the wrong places are dealt within each guess."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(DEALS, dtype=torch.float64)
    for a, b in zip(holes, wrong, strict=True):
        order = torch.rand(DEALS, len(a), generator=generator).argsort(1)
        drawn += a[order] @ b
    return maths.draws_p(hit, drawn)


def _holes(
    model: Model, rows: Sequence[Any], answers: Sequence[Any], p: Sequence[Tensor], logp: Sequence[Tensor], tau: float
) -> list[dict[str, Any]]:
    found = []
    for row, each, own, seen in zip(rows, answers, p, logp, strict=True):
        for at in (own < tau).nonzero()[:, 0].tolist():
            best = seen[at].topk(min(CANDIDATES, seen.shape[1]))
            texts = [model.decode([token]) for token in best.indices.tolist()]
            found.append({"item": row.where, "at": at, "token": model.decode([each[0][at]]), "p": float(own[at]), "candidates": " | ".join(texts)})  # fmt: skip
    return found


def fill(pieces: Sequence[Sequence[tuple[str, float]]], check: Callable[[str], bool], most: int = 1000) -> str | None:
    """The likeliest text that a check accepts, one candidate (text, log p) taken from each piece; None where none of the `most` likeliest
    is. A piece that is sure has one candidate."""
    ordered = [sorted(piece, key=lambda one: -one[1]) for piece in pieces]
    if not all(ordered):
        raise PatchbayError("a piece without candidates cannot be filled")

    def worth(places: tuple[int, ...]) -> float:
        return sum(piece[at][1] for piece, at in zip(ordered, places, strict=True))

    first = (0,) * len(ordered)
    queue, seen = [(-worth(first), first)], {first}
    for _ in range(most):
        if not queue:
            return None
        _, places = heapq.heappop(queue)
        text = "".join(piece[at][0] for piece, at in zip(ordered, places, strict=True))
        if check(text):
            return text
        for i, at in enumerate(places):
            further = (*places[:i], at + 1, *places[i + 1 :])
            if at + 1 < len(ordered[i]) and further not in seen:
                seen.add(further)
                heapq.heappush(queue, (-worth(further), further))
    return None
