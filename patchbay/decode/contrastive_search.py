"""Contrastive search: of the likely tokens the one whose state is least like those before it.

    v* = argmax over the k likeliest of   (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

h_v is the last state (after the final norm) of token v appended to the text, h_j those of every earlier position, the prompt's too;
p is the probability itself, not its logarithm. A step is one pass of the k candidates on the cache repeated k times, which gives
their states and the next logits at once: n + 1 passes for n tokens and T + k n token positions, and a cache k times as large. `alpha`
0, or k 1, is greedy decoding. A state of zeros has no direction; its cosine is 0. Of equal values the likelier token is taken, then
the one of lower id.

`isotropy` is 1 minus the mean cosine between the states of a text: near 0 every cosine is near 1 and the penalty is blind.

Su and Xu 2022, "Contrastive Search Is What You Need For Neural Text Generation".

It does not show that a text reads like people's: repetition falls below that of human text as well as above it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchbay.decode._loop import Call, asked, best
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

STATE = Port("final_norm")
BLIND = 0.3  # isotropy below which the official table holds only models that the search fails on


def search(call: Call, *, k: int = 4, alpha: float = 0.6) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call."""
    if not 1 <= k <= call.model.vocab_size:
        raise PatchbayError(f"k={k}: from 1 to the vocabulary's {call.model.vocab_size} tokens")
    if not 0.0 <= alpha <= 1.0:
        raise PatchbayError(f"alpha={alpha}: from 0, by probability alone, to 1, by likeness alone")
    drafts = [[Draft()] for _ in call.prompts]
    for members in call.batches():
        _batch(call, members, k, alpha, drafts)
    for several in drafts:  # a mean over tokens, as long texts have no better score than short ones
        several[0].score /= len(several[0].tokens)
    return drafts


def _batch(call: Call, members: list[int], k: int, alpha: float, drafts: list[list[Draft]]) -> None:
    """Prompts of one length. Before a step, row i of the batch holds the text of prompt `of[i]`; in it, rows i k to i k + k - 1 do."""
    of = list(members)
    with call.rows(members, taps=[STATE]) as rows:
        seen = rows.run()
        logits, states = seen.last, _unit(seen.taps[STATE])  # [row, vocab], [row, position, d_model]
        winners = torch.arange(len(of))
        for step in range(call.n_new):
            law = call.chosen_from(rows.ids[winners], logits)
            tokens = best(law, k)  # [row, k]
            rows.take(winners.repeat_interleave(k))
            seen = rows.run(tokens.flatten())
            found = _unit(seen.taps[STATE][:, -1]).unflatten(0, (-1, k))  # [row, k, d_model]
            likeness = (found @ states.mT).amax(-1)  # [row, k]
            value = (1 - alpha) * law.softmax(-1).gather(1, tokens) - alpha * likeness
            at = value.argmax(-1)  # the first of equal ones
            each = torch.arange(len(of), device=at.device)
            token = tokens[each, at]
            logp = torch.log_softmax(logits, -1)[each, token]
            for i, told in enumerate(zip(token.tolist(), logp.tolist(), value[each, at].tolist(), strict=True)):
                drafts[of[i]][0].add(*told)
            states = torch.cat([states, found[each, at][:, None]], 1)
            winners = (each * k + at).cpu()
            over = call.ended(rows.ids[winners]).tolist()
            going = [i for i in range(len(of)) if not over[i] and step < call.n_new - 1]
            for i in set(range(len(of))) - set(going):
                drafts[of[i]][0].finished = over[i]
                drafts[of[i]][0].whole["isotropy"] = _isotropy(states[i])
            if not going:
                return
            of, winners, states, logits = (
                [of[i] for i in going],
                winners[going],
                states[going],
                seen.last[winners][going],
            )


def _unit(states: Tensor) -> Tensor:
    """Directions; zeros stay zeros."""
    return F.normalize(states.float(), dim=-1)


def _isotropy(states: Tensor) -> float:
    """1 - the mean cosine of different positions, from directions [position, d_model]."""
    n = len(states)
    together = states.double().sum(0).square().sum() - states.double().square().sum()
    return float(1 - together / (n * (n - 1)))


def _notes(drafts: list[list[Draft]]) -> list[str]:
    mean = sum(one.whole["isotropy"] for [one] in drafts) / len(drafts)
    if mean >= BLIND:
        return []
    return [
        f"isotropy {mean:.2f} is below {BLIND}: states are alike whatever the token, so that the penalty hardly tells repetition apart"
    ]


@method(paper="su2022")
def contrastive_search(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    k: int = 4,
    alpha: float = 0.6,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued by contrastive search, with `score` the mean over tokens of what was maximised, between -alpha and 1.

    Beside it `isotropy` [prompt, draft] of the states that were compared; the rest as every decoder returns it.

    `k`: candidates at each step, the likeliest tokens. `alpha`: the weight of likeness against probability, from 0 to 1.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    drafts = search(call, k=k, alpha=alpha)
    return as_result(
        call, drafts, "probability - cosine, per token", units={"isotropy": "1 - cosine"}, notes=_notes(drafts)
    )


published(contrastive_search, search)
