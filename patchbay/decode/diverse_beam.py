"""Diverse beam search: beams in groups that are pushed apart, by a penalty on tokens that earlier groups chose at the same step.

    group g takes the best of   ledger + log p(v) - penalty N_g(v)

N_g(v) is how often the groups before g chose v at this step, each beam counting. The penalty stays in the ledger, as in both public
codes: `score` is the ledger, and the sum of `logp` the plain log-probability; the two may rank otherwise (`rank_by_logp`). penalty 0
makes all groups alike, each a beam search of its own width; no penalty changes the first group. One pass for a token.

Vijayakumar et al. 2016, "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models".

Other words are not other meanings. A text that ends in one group ends no other.
"""

from __future__ import annotations

from typing import Any

from patchbay.decode._beams import Asked, search
from patchbay.decode._loop import Call, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.tasks.task import Task


def decode(call: Call, *, beams: int = 6, groups: int = 3, penalty: float = 0.5) -> list[list[Draft]]:
    """The loop: drafts [prompt][beam] of a call, group by group."""
    found = search(call, Asked(beams, groups, penalty))
    for several in found:
        order = sorted(range(len(several)), key=lambda at: -sum(several[at].logp))
        for rank, at in enumerate(order, start=1):
            several[at].whole["rank_by_logp"] = float(rank)
    return found


@method(paper="vijayakumar2016")
def diverse_beam(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    beams: int = 6,
    groups: int = 3,
    penalty: float = 0.5,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Continuations of each prompt by groups of beams, group by group and in each the best first, with `score` the ledger in nats.

    Beside it `group` [prompt, draft] and `rank_by_logp`, the rank by plain log-probability; the rest as every decoder returns it.

    `beams`: how many in all. `groups`: in how many groups of one size. `penalty`: what a token costs for each beam of an earlier group
    that chose it at this step, in nats.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    drafts = decode(call, beams=beams, groups=groups, penalty=penalty)
    return as_result(call, drafts, units={"group": "number", "rank_by_logp": "rank"})


published(diverse_beam, decode, stops=False)
