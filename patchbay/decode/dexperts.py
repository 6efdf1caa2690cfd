"""DExperts: the model's law, raised where an expert finds a token likelier than an anti-expert does.

    z + alpha (z+ - z-),   among the tokens of the nucleus of softmax(z)

z are the model's logits, z+ the expert's, z- the anti-expert's. The nucleus is that of the model's own law, before anything is added;
tokens are drawn. Expert and anti-expert are other models of the same vocabulary, or knobs: the same model turned, each one more row
of the batch. alpha 0 is nucleus sampling of the model, and so is an expert that is its own anti-expert.

Liu et al. 2021, "DExperts: Decoding-Time Controlled Text Generation with Experts and Anti-Experts".

It does not show that what the experts differ in is what one wants more of.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, asked, draw, generators
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._sampling import check_top_p, nucleus
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.decode._voices import Voices, calls_beside, costs
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

NAMES = ("expert", "antiexpert")


def law(own: Tensor, expert: Tensor, antiexpert: Tensor, alpha: float, top_p: float) -> Tensor:
    """What is drawn from, log-probabilities [row, vocab], from the logits of all three."""
    outside = nucleus(own, top_p).isneginf()
    return torch.log_softmax((own + alpha * (expert - antiexpert)).masked_fill(outside, -math.inf), -1)


def decode(
    call: Call,
    *,
    expert: Any,
    antiexpert: Any,
    alpha: float = 2.0,
    top_p: float = 0.9,
    seed: int = 0,
    beside: list[Call | None] | None = None,
) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call."""
    check_top_p(top_p)
    if not math.isfinite(alpha):
        raise PatchbayError(f"alpha={alpha}: a finite number")
    voices_of = [expert, antiexpert]
    beside = calls_beside(call, voices_of, NAMES) if beside is None else beside
    chance = generators(seed, call.prompts)
    drafts = [[Draft()] for _ in call.prompts]

    for members in call.batches():
        with Voices(call, members, voices_of, beside) as voices:

            def choose(ids: Tensor, own: Tensor, others: list[Tensor], voices: Voices = voices) -> Chosen:
                logq = law(own, others[0], others[1], alpha, top_p)
                tokens = draw(logq, [chance[i][0] for i in voices.of])
                said = logq.gather(1, tokens[:, None])[:, 0]
                return Chosen(tokens, said, said)

            stepwise(call, voices, voices.run, choose, drafts)
    return drafts


@method(paper="liu2021")
def dexperts(
    model: Model,
    expert: Model | Knob,
    antiexpert: Model | Knob,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    alpha: float = 2.0,
    top_p: float = 0.9,
    seed: int = 0,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued by draws from the model's law with what the experts differ in, with `score` the sum of `logq`, in nats.

    `logq` is the log-probability of each token under the law that it was drawn from; where experts are other models, `other_calls` and
    `other_fed` are what they cost. The rest as every decoder returns it.

    `expert`, `antiexpert`: other models of the same vocabulary, or knobs: the same model turned. `alpha`: the weight of their difference.
    `top_p`: the share of the model's own law that is drawn from.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    beside = calls_beside(call, [expert, antiexpert], NAMES)
    options: dict[str, Any] = {"alpha": alpha, "top_p": top_p, "seed": seed, "beside": beside}
    drafts = decode(call, expert=expert, antiexpert=antiexpert, **options)
    return as_result(call, drafts, scalars=costs(beside))


published(dexperts, decode)
