"""Feedback: a network that learns an axis of its own states from labelled examples, in context.

Words are states: word w has a vector s_w in R^16, whose components are of ever smaller spread, and its embedding is that vector in R^64, which is
never trained. A stream deals out an axis u, a fresh one each time, and is

    w_1 mark_1  w_2 mark_2  ..  w_16 mark_16,     mark = 1 where u . s_w > 0, else 0

with u drawn in the span of the first TOP components alone. Marks are learned, words are not; a quarter of the words is in no stream of training. So the
truth is known: an axis within the span can be reported after examples, another cannot, although every state carries it (`ridge`, a regression on the same
examples, says how far the examples alone would take one). The span grows from one component to TOP while the network learns.

Ji-An, Xiong, Wilson, Mattar and Benna 2025, "Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations":
their language models report axes of a space that is much smaller than that of the states. `turn.neurofeedback` asks for the report and the control.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchbay.model.model import Model
from patchbay.tiny import lab

STATE, TOP, LENGTH = 16, 4, 16
WORDS, UNREAD = 768, 192  # words, the last of which are in no stream of training
MARKS = (0, 1)
FIRST = 2  # the token of word 0
ROWS = 40
PENALTY = 1.0  # of the ridge regression, in units of a state's smallest variance


def states(seed: int) -> Tensor:
    """The vector of each word [word, component]; the spread falls from 1 to 1/2."""
    drawn = torch.randn(WORDS, STATE, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.linspace(1.0, 0.5, STATE)


def axes(n: int, top: int, generator: torch.Generator) -> Tensor:
    """Unit axes in the span of the first `top` components, [axis, component]."""
    drawn = torch.zeros(n, STATE)
    drawn[:, :top] = torch.randn(n, top, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


def streams(known: Tensor, along: Tensor, generator: torch.Generator, *, unread: bool = False) -> Tensor:
    """Ids [stream, 2 LENGTH] of words and marks, for axes [stream, component]; of words that training never reads with `unread`."""
    low, high = (WORDS - UNREAD, WORDS) if unread else (0, WORDS - UNREAD)
    words = torch.randint(low, high, (len(along), LENGTH), generator=generator)
    marks = (torch.einsum("nc,nkc->nk", along, known[words]) > 0).long()
    return torch.stack([FIRST + words, marks], 2).flatten(1)


def network(seed: int) -> Model:
    """The untrained network, whose words are embedded as they will stay."""
    model = lab.small(FIRST + WORDS, layers=3, positions=2 * LENGTH, seed=seed)
    hf: Any = model.hf
    basis = torch.linalg.qr(torch.randn(hf.config.hidden_size, STATE, generator=torch.Generator().manual_seed(seed)))[0]
    with torch.no_grad():
        hf.model.embed_tokens.weight[FIRST:] = states(seed) @ basis.T
    model._fingerprint = None
    return model


def train(*, steps: int = 340, seed: int = 0) -> Model:
    """A network that had `steps` steps of streams, a half of them with axes in a smaller span."""
    model, known = network(seed), states(seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def loss(hf: Any, step: int) -> Tensor:
        top = min(TOP, 1 + step * 2 * TOP // max(1, steps))
        ids = streams(known, axes(ROWS, top, generator), generator)
        table = hf.get_input_embeddings().weight
        fixed = torch.cat([table[:FIRST], table[FIRST:].detach()])
        logits = hf(inputs_embeds=fixed[ids], use_cache=False).logits[:, ::2, : len(MARKS)]  # at words
        return cross_entropy(logits.flatten(0, 1), ids[:, 1::2].flatten())

    return lab.fitted(model, loss, steps)


@torch.no_grad()
def reports(model: Model, ids: Tensor) -> Tensor:
    """Whether each mark is the likelier one before it is read: float64 [stream, examples before]."""
    logits = model.hf(ids, use_cache=False).logits[:, ::2, : len(MARKS)]
    return (logits.argmax(-1) == ids[:, 1::2]).double()


def ridge(known: Tensor, ids: Tensor, examples: int) -> Tensor:
    """The same of a ridge regression on the states of the first `examples` words, told of the word after them: float64 [stream]."""
    words, marks = ids[:, ::2] - FIRST, ids[:, 1::2]
    x, y = known[words[:, :examples]].double(), marks[:, :examples].double() * 2 - 1
    inside = x.transpose(1, 2) @ x + PENALTY * 0.25 * torch.eye(STATE, dtype=torch.float64)
    along = torch.linalg.solve(inside, (x.transpose(1, 2) @ y[..., None]))[..., 0]
    said = (along * known[words[:, examples]].double()).sum(-1) > 0
    return (said == (marks[:, examples] == 1)).double()
