"""Samplers: text drawn from the model's law after a chain of steps in the order they are written, each text from a stream of its own.

    chain = ("temperature(0.8)", "min_p(0.1)"),  token ~ softmax of the logits after all of them

Steps that transformers lacks are ours (`_samplers.py`): mirostat, top_n_sigma, dry, xtc; temperature, top_k, top_p, min_p, top_h, typical,
epsilon, eta, repetition_penalty, no_repeat_ngram and watermark are transformers' own; regex, json and lark leave what a grammar allows, by
llguidance (`_constrained.py`). With no step it is sampling from the model. `logq` is the
log-probability under the law that was drawn from, and `score` its sum. One pass for a token.

Mirostat's surprise is counted under the law that is left, as published code does, in nats: under the model's own it comes out lower than
tau where much is cut. It has a state, and so has what looks at the text: a draft that is drawn ahead has to wind it back.

Basu et al. 2021, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity".

A law that is cut is no longer the model's: neither logp nor a model's ranking says which cut reads better.
"""

from __future__ import annotations

from typing import Any

from patchbay.decode._drawn import drawn
from patchbay.decode._loop import Call, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.tasks.task import Task

CHAIN = ("top_p(0.9)",)


def decode(
    call: Call, *, chain: list[str] | tuple[str, ...] = CHAIN, drafts: int = 1, seed: int = 0
) -> list[list[Draft]]:
    """The loop: drafts [prompt][draft] of a call."""
    return drawn(call, chain, drafts, seed)


@method(paper="basu2021")
def samplers(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    chain: list[str] | tuple[str, ...] = CHAIN,
    drafts: int = 1,
    seed: int = 0,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Drafts of each prompt, each token drawn from the law after the chain, with `score` the sum of `logq` in nats.

    The rest as every decoder returns it.

    `chain`: steps in their order, as "temperature(0.8)", "min_p(0.1)", "mirostat(tau=3.0, eta=0.1)", "dry(multiplier=0.8)", "xtc(threshold=0.1)",
    "top_n_sigma(1.0)", "regex(r'[0-9]+')", "json('{...}')" (a schema), "lark('start: ...')", "watermark(0.25, 2.0)". `drafts`: how many of each prompt, each with its own chance.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    return as_result(call, decode(call, chain=chain, drafts=drafts, seed=seed))


published(samplers, decode)
