"""Rerank: draw several continuations, rank them by a scorer, keep the best, and go on from these.

    each of `beams` texts draws `samples` segments from the nucleus of its law; of all of them, and of texts that have ended, the
    `beams` with the highest score(prompt, whole continuation) are kept

until all have ended or are long enough. One beam and a segment as long as the text is ranking whole samples; beams and samples of 1
are nucleus sampling. Scorers (`_scorers.py`) are read off the model itself, under the edits in force: `pmi`, what the prompt adds to the
log-probability of a continuation, is the default; or another model. Cost: samples x beams token positions a step, and the scorer's
passes over each continuation.

Krishna et al. 2022, "RankGen: Improving Text Generation with Large Ranking Models", whose trained encoder is the scorer there.

On small models `pmi` tells a text's own continuation from another's; ranking by the model's own log-probability pulls towards greedy text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, Rows, asked, draw, generators, refuse_too_many
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._sampling import check_top_p, nucleus
from patchbay.decode._scorers import UNITS, Scorer, scorer_of
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

POOL = (2, 10, 20)  # the published beams, samples and tokens of a segment


def decode(
    call: Call,
    *,
    scorer: Any = "pmi",
    pool: list[int] | tuple[int, ...] = POOL,
    top_p: float = 0.9,
    seed: int = 0,
) -> list[list[Draft]]:
    """The loop: drafts [prompt][beam] of a call, the best first."""
    check_top_p(top_p)
    if len(pool) != 3 or min(pool) < 1:
        raise PatchbayError(f"pool={list(pool)}: beams, samples of each, tokens of a segment; each one or more")
    beams, samples, segment = pool
    refuse_too_many(call, beams * samples, f"pool={list(pool)}", 1)
    score = scorer_of(call, scorer)
    chance = generators(seed, call.prompts, beams * samples)
    return [_one(call, i, (beams, samples, segment), top_p, chance[i], score) for i in range(len(call.prompts))]


def _one(
    call: Call, place: int, pool: tuple[int, int, int], top_p: float, chance: list[torch.Generator], score: Scorer
) -> list[Draft]:
    """One prompt: the beams that are left."""
    beams, samples, segment = pool
    kept, ended = [Draft(logq=[])], list[Draft]()
    with call.rows([place]) as rows:
        logits = rows.run().last
        while True:
            rows.take(torch.arange(len(kept)).repeat_interleave(samples))
            drafts = [_copy(one) for one in kept for _ in range(samples)]
            n = min(segment, call.n_new - len(kept[0].tokens))
            _segment(call, rows, logits.repeat_interleave(samples, 0), drafts, n, top_p, chance)
            everything = [*ended, *drafts]
            scores = score(call, place, [one.tokens for one in everything])
            for one, value in zip(everything, scores, strict=True):
                one.score = value
            best = sorted(range(len(everything)), key=lambda at: -scores[at])[:beams]
            ended = [everything[at] for at in best if everything[at].finished]
            going = [at - (len(everything) - len(drafts)) for at in best if not everything[at].finished]
            if not going or len(drafts[going[0]].tokens) == call.n_new:
                return [everything[at] for at in best]
            kept = [drafts[at] for at in going]
            rows.take(going)
            logits = rows.run(torch.tensor([one.tokens[-1] for one in kept])).last


def _segment(
    call: Call, rows: Rows, logits: Tensor, drafts: list[Draft], n: int, top_p: float, chance: list[torch.Generator]
) -> None:
    """Draw `n` more tokens of each draft, fewer of one that ends; the last token of a row is not fed."""
    for step in range(n):
        law = torch.log_softmax(nucleus(call.chosen_from(rows.ids, logits), top_p), -1)
        tokens = draw(law, chance[: len(drafts)])
        logp, logq = (one.gather(1, tokens[:, None])[:, 0].tolist() for one in (torch.log_softmax(logits, -1), law))
        over = call.ended(torch.cat([rows.ids, tokens[:, None].to(rows.ids.device)], 1)).tolist()
        for row, one in enumerate(drafts):
            if not one.finished:
                one.add(int(tokens[row]), logp[row], 0.0, logq[row])
                one.finished = over[row]
        if step < n - 1 and not all(one.finished for one in drafts):
            logits = rows.run(tokens).last


def _copy(one: Draft) -> Draft:
    return Draft(list(one.tokens), list(one.logp), one.score, one.finished, list(one.logq or []))


@method(paper="krishna2022")
def rerank(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    scorer: str | Model = "pmi",
    pool: list[int] | tuple[int, ...] = POOL,
    top_p: float = 0.9,
    seed: int = 0,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> Result:
    """The continuations of each prompt that are left, the best first, with `score` what the scorer gave them.

    The rest as every decoder returns it. Texts end where the model's generation config says.

    `scorer`: pmi, logp, self_certainty, unigram_overlap, or another model, by whose log-probability texts are ranked. `pool`: how many
    texts are kept, how many segments each of them draws, of how many tokens. `top_p`: the share of the law that is drawn from.
    """
    call = asked(model, prompts, max_new_tokens, None, batch_size)
    drafts = decode(call, scorer=scorer, pool=pool, top_p=top_p, seed=seed)
    return as_result(call, drafts, UNITS.get(str(scorer), "nats"))


published(rerank, decode)
