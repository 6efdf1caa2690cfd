"""Beam search: the likeliest continuations that are found by keeping a few at every step.

    score = sum of log p over the new tokens, divided by length ^ length_penalty

At each step the best `beams` of all continuations of all beams are kept; the search starts from one. A text that ends is kept aside
and competes by its score. length_penalty 0, the default, ranks by probability; transformers divides by the length (1), so that its
best text is not the likeliest. The prompts of a batch and their beams run as one batch; edits by row, and those by token, go with their
beams. One pass for a token, `beams` token positions each.

It is diverse beam search of one group, after Vijayakumar et al. 2016, "Diverse Beam Search: Decoding Diverse Solutions from Neural
Sequence Models". transformers' own beam search, with its processors, is `model.generate(prompts, num_beams=n)`: it takes no edits by row.

Likely texts are not good ones: they are short, and repeat.
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


def decode(call: Call, *, beams: int = 4, length_penalty: float = 0.0) -> list[list[Draft]]:
    """The loop: drafts [prompt][beam] of a call, the best first."""
    found = search(call, Asked(beams, length_penalty=length_penalty))
    for several in found:
        for one in several:
            one.whole.clear()
    return found


@method(paper="vijayakumar2016")
def beam(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    beams: int = 4,
    length_penalty: float = 0.0,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """The best continuations of each prompt that beam search finds, the best first, with `score` as above in nats.

    The sum of `logp` over a draft is its plain log-probability. The rest as every decoder returns it.

    `beams`: how many are kept. `length_penalty`: the power of the length that scores are divided by.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    return as_result(call, decode(call, beams=beams, length_penalty=length_penalty))


published(beam, decode, stops=False)
