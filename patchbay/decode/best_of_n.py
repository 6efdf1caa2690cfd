"""Best of n: several texts are drawn, and the best by a scorer is taken, or the one whose answer most of them give.

    scorer    the draft of highest score: pmi, logp, self_certainty, unigram_overlap, another model
    "vote"    each draft votes for its answer with (n - r + 1)^power, r its rank by self-certainty from 1 on; of the answer with most votes
              the draft that ranks first. power 0 is self-consistency, a majority; of answers with equal votes the one that was drawn first

Self-certainty is the mean over tokens of KL(uniform || p) under the model's own law, uncut: under a cut one it would be infinite.
`score` is the scorer's, by which drafts are sorted, or the votes of a draft's answer. n passes' worth of tokens, and of the
scorer one pass over each.

With n 1 it is the draw. Expected scores rise with n: `expected` [n] is the mean score of the best of n drafts drawn from the pool without
replacement, over prompts.

Kang et al. 2025, "Scalable Best-of-N Selection for Large Language Models via Self-Certainty"; Wang et al. 2023, "Self-Consistency
Improves Chain of Thought Reasoning in Language Models".

A scorer finds what it likes: best by a score is not best for a reader, and the more drafts, the more it finds faults of the scorer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchbay.decode._drawn import drawn
from patchbay.decode._loop import Call, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result, new_texts
from patchbay.decode._scorers import UNITS, scorer_of
from patchbay.decode._spoken import spoken
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task


@dataclass(frozen=True)
class Vote:
    """`answer`: what of a text is its answer, a pattern whose first group, or whole, in its last match is it; without, the whole text."""

    answer: str | None = None
    power: float = 0.0

    def of(self, text: str) -> str | None:
        """The answer of a text; None where it gives none."""
        if self.answer is None:
            return text
        found = list(re.finditer(self.answer, text))
        return (found[-1].group(1) if found[-1].re.groups else found[-1].group()) if found else None


def votes(answers: Sequence[str | None], certainty: Sequence[float], power: float) -> list[float]:
    """The votes that each draft's answer gets; 0 for a draft without one."""
    n = len(answers)
    order = sorted(range(n), key=lambda at: -certainty[at])
    weight = {at: float(n - rank) ** power for rank, at in enumerate(order)}
    total: dict[str, float] = {}
    for at, answer in enumerate(answers):
        if answer is not None:
            total[answer] = total.get(answer, 0.0) + weight[at]
    return [0.0 if answer is None else total[answer] for answer in answers]


def vote_of(scorer: Any) -> Vote | None:
    """The vote that a scorer's text asks for: "vote", "vote(r'is (.*)$')", "vote(power=0.5)"."""
    if not isinstance(scorer, str) or not scorer.startswith("vote"):
        return None
    name, values, options = spoken(scorer, "scorer")
    try:
        vote = Vote(*values, **options)
        re.compile(vote.answer or "")
    except (TypeError, re.error) as error:
        raise PatchbayError(f"scorer={scorer!r}: {error}; vote(answer='pattern', power=0)") from error
    if name != "vote" or not (isinstance(vote.power, int | float) and math.isfinite(vote.power)):
        raise PatchbayError(f"scorer={scorer!r}: vote(answer='pattern', power=0), the power a finite number")
    return vote


def decode(
    call: Call, *, scorer: Any = "self_certainty", drafts: int = 8, chain: Sequence[str] = (), seed: int = 0
) -> list[list[Draft]]:
    """The loop: drafts [prompt][draft] of a call, the best first."""
    vote = vote_of(scorer)
    score = scorer_of(call, "self_certainty" if vote else scorer)
    pool = drawn(call, chain, drafts, seed)
    said = new_texts(call, pool) if vote else []
    for place, several in enumerate(pool):
        scores = score(call, place, [one.tokens for one in several])
        answers = [vote.of(text) for text in said[place]] if vote else []
        for at, (one, value) in enumerate(zip(several, scores, strict=True)):
            one.whole["self_certainty" if vote else "drawn"] = value if vote else float(at)
            one.score = value
        if vote:
            for one, value in zip(several, votes(answers, scores, vote.power), strict=True):
                one.score = value
    return [_ranked(several, vote) for several in pool]


def _ranked(several: list[Draft], vote: Vote | None) -> list[Draft]:
    """By score; where votes with a power are equal by certainty, and else as they were drawn."""
    if vote is None or vote.power == 0:
        return sorted(several, key=lambda one: -one.score)
    return sorted(several, key=lambda one: (-one.score, -one.whole["self_certainty"]))


def expected(scores: torch.Tensor) -> list[float]:
    """Of scores [prompt, draft] the mean best of n drafts without replacement, n from 1: each score is the best of a set of n with chance
    C(rank from below, n - 1) / C(all, n)."""
    up = scores.double().sort(1).values.mean(0).tolist()  # of the k-th lowest, over prompts
    whole = len(up)
    return [
        sum(math.comb(k, n - 1) * value for k, value in enumerate(up)) / math.comb(whole, n)
        for n in range(1, whole + 1)
    ]


@method(paper="kang2025")
def best_of_n(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    scorer: str | Model = "self_certainty",
    drafts: int = 8,
    chain: list[str] | tuple[str, ...] = (),
    seed: int = 0,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> Result:
    """The drafts of each prompt, the best first; with a scorer `expected` [n_parts], the mean score of the best of 1, 2, ... drafts.

    The rest as every decoder returns it. Texts end where the model's generation config says.

    `scorer`: self_certainty, pmi, logp, unigram_overlap, another model, "vote", or "vote(r'answer: (.*)', power=0.5)" by a pattern. `drafts`: how many
    are drawn. `chain`: steps before each draw, as `decode.samplers` takes them; without, the model's law.
    """
    if drafts < 1:
        raise PatchbayError(f"drafts={drafts}: one or more")
    call = asked(model, prompts, max_new_tokens, None, batch_size)
    found = decode(call, scorer=scorer, drafts=drafts, chain=chain, seed=seed)
    vote = vote_of(scorer)
    unit = "votes" if vote else UNITS.get(str(scorer), "nats")
    scalars: dict[str, Any] = {}
    if not vote:
        means = torch.tensor(expected(torch.tensor([[one.score for one in several] for several in found])))
        scalars["expected"] = (means, ("n_parts",), unit)
    units = {"drawn": "place in the order of draws", "self_certainty": "nats"}
    return as_result(call, found, unit, units=units, scalars=scalars)


published(best_of_n, decode)
