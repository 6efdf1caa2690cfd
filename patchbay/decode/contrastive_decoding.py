"""Contrastive decoding: what an expert finds likelier than an amateur does, among the tokens that the expert finds plausible.

    V_head = the tokens v with log p_E(v) >= log alpha + max log p_E
    log p_E(v) - log p_A(v)              where beta is not given, p_A at `temperature` 0.5 (Li)
    (1 + beta) z_E(v) - beta z_A(v)      where it is (O'Brien), z the logits

and of V_head the token of the highest value is taken. The two rank differently. The amateur is another model of the same vocabulary,
or a Knob: the same model turned, one more row of the batch. With a knob, beta 0 is the model as it is, and beta -1 with alpha 0 is
generation under the knob, exactly: between and beyond, beta is the knob's strength in the space of logits, beside its strength in
the stream. alpha 1 and beta 0 are greedy decoding of the expert. One pass of each model for a token.

`logp_amateur` is the log-probability of each token under the amateur, as it is. `score` is the sum over tokens of the value above, with
logits taken as log-probabilities.

Li et al. 2023, "Contrastive Decoding: Open-ended Text Generation as Optimization", whose runs use beams of it; O'Brien and Lewis 2023,
"Contrastive Decoding Improves Reasoning in Large Language Models".

It does not show that the text is better: it moves away from the amateur, and so from text that both find likely.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.decode._voices import Voices, calls_beside, costs, log_laws, own_edits
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

TEMPERATURE = 0.5  # of the amateur in the first form


def contrast(expert: Tensor, amateur: Tensor, alpha: float, beta: float | None, temperature: float) -> Tensor:
    """What is maximised, [row, vocab], -inf outside V_head, from the logits of both."""
    own, other = log_laws([expert, amateur if beta is not None else amateur / temperature])
    value = own - other if beta is None else (1 + beta) * own - beta * other
    return value.masked_fill(~plausible(own, alpha), -math.inf)


def plausible(own: Tensor, alpha: float) -> Tensor:
    """V_head [row, vocab]: the tokens at least `alpha` times as likely as the likeliest."""
    if alpha == 0:
        return torch.ones_like(own, dtype=torch.bool)
    return own >= own.amax(-1, keepdim=True) + math.log(alpha)


def decode(
    call: Call,
    *,
    amateur: Any,
    alpha: float = 0.1,
    beta: float | None = None,
    temperature: float | None = None,
    beside: list[Call | None] | None = None,
) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call."""
    temperature = _checked(call, amateur, alpha, beta, temperature)
    beside = calls_beside(call, [amateur], ["amateur"]) if beside is None else beside
    drafts = [[Draft()] for _ in call.prompts]

    def choose(ids: Tensor, expert: Tensor, others: list[Tensor]) -> Chosen:
        value = contrast(expert, others[0], alpha, beta, temperature)
        tokens = value.argmax(-1)
        score = value.gather(1, tokens[:, None])[:, 0]
        amateurs = torch.log_softmax(others[0], -1).gather(1, tokens[:, None])[:, 0]
        return Chosen(tokens, score, beside={"logp_amateur": amateurs})

    for members in call.batches():
        with Voices(call, members, [amateur], beside) as voices:
            stepwise(call, voices, voices.run, choose, drafts)
    return drafts


def _checked(call: Call, amateur: Any, alpha: float, beta: float | None, temperature: float | None) -> float:
    """The amateur's temperature; refuses what cannot be meant."""
    if not 0.0 <= alpha <= 1.0:
        raise PatchbayError(f"alpha={alpha}: from 0, every token, to 1, the likeliest alone")
    if beta is not None and not math.isfinite(beta):
        raise PatchbayError(f"beta={beta}: a finite number, or None for log p_E - log p_A")
    if beta is not None and temperature is not None:
        raise PatchbayError(f"temperature={temperature} is the amateur's where beta is not given, and beta={beta}")
    temperature = TEMPERATURE if temperature is None else temperature
    if not temperature > 0:
        raise PatchbayError(f"temperature={temperature}: above 0")
    if own_edits(call, amateur, "amateur") == [] and beta is None and temperature == 1.0:
        raise PatchbayError(
            "amateur: it is the expert itself, so that all plausible tokens have the value 0 and none is chosen; give another model, "
            "a knob that is turned, or beta="
        )
    return temperature


@method(paper="li2023c")
def contrastive_decoding(
    model: Model,
    amateur: Model | Knob,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    alpha: float = 0.1,
    beta: float | None = None,
    temperature: float | None = None,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued by what the model finds likelier than the amateur does, in nats.

    Beside `score`, `logp_amateur` [prompt, draft, position]; where the amateur is another model, `other_calls` and `other_fed` are what it
    cost. The rest as every decoder returns it.

    `amateur`: another model of the same vocabulary, or a knob: the same model turned. `alpha`: how likely a token must be, as a share of
    the likeliest one's probability. `beta`: the weight of the amateur in O'Brien's form; without, Li's. `temperature`: of the amateur in Li's
    form, 0.5 unless said.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    beside = calls_beside(call, [amateur], ["amateur"])
    drafts = decode(call, amateur=amateur, alpha=alpha, beta=beta, temperature=temperature, beside=beside)
    return as_result(call, drafts, scalars=costs(beside))


published(contrastive_decoding, decode)
