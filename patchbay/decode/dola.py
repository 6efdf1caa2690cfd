"""DoLa, decoding by contrasting layers: what the last layer finds likelier than an earlier one, among plausible tokens.

    q_j = softmax(unembed(final norm(stream after j layers))),  M = argmax over the candidates j of JSD(q_N, q_j)
    score(v) = log q_N(v) - log q_M(v)   on the tokens v with q_N(v) >= alpha max q_N

JSD is the Jensen-Shannon divergence; M is chosen for every row and position by itself. `contrasted` says which j it was. One pass
for a token, and one unembedding for each candidate.

The published code differs from this formula: its early exits take no final norm, its divergence is half of KL(m || q_N) + KL(m || q_j)
averaged over the vocabulary, m the mean of both, and it is averaged over the batch, so that one prompt's layer may depend on the
others. `as_published` does that. Its runs also use a repetition penalty of 1.2, which is transformers' own processor:
`hf.generate(ids, custom_generate=pb.decode.dola.generate, repetition_penalty=1.2)`.

Chuang et al. 2024, "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models".

With tied embeddings layer 0 gives the input token back. A small model has little to contrast; nothing here shows that facts come right.
Early exits are read beside the model: edits of the final norm and of the logits act on q_N alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, Seen, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task


def decode(
    call: Call, *, layers: list[int] | None = None, alpha: float = 0.1, as_published: bool = False
) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call."""
    model = call.model
    layers = candidates(model, layers)
    if not 0.0 <= alpha <= 1.0:
        raise PatchbayError(f"alpha={alpha}: from 0, every token, to 1, the likeliest alone")
    ports = [Port("resid_out", j - 1) if j else Port("resid_in", 0) for j in layers]
    drafts = [[Draft()] for _ in call.prompts]

    def choose(ids: Tensor, last: Tensor, seen: Seen) -> Chosen:
        early = torch.stack([exit_logits(model, seen.taps[port][:, -1], not as_published) for port in ports], 1)
        early = early.to(last.device)  # [row, candidate, vocab]
        far = published_divergence(last, early) if as_published else divergence(last, early)  # [row, candidate]
        at = far.argmax(-1)
        value = contrast(last, early[torch.arange(len(at)), at], alpha)
        tokens = value.argmax(-1)
        return Chosen(
            tokens, value.gather(1, tokens[:, None])[:, 0], beside={"contrasted": torch.tensor(layers)[at.cpu()]}
        )

    for members in call.batches():
        with call.rows(members, taps=ports) as rows:

            def run(tokens: Tensor | None, rows: Any = rows) -> tuple[Tensor, Seen]:
                seen = rows.run(tokens)
                return seen.last, seen

            stepwise(call, rows, run, choose, drafts)
    return drafts


def candidates(model: Model, layers: list[int] | None) -> list[int]:
    """After how many layers: those asked, or every second of the upper half."""
    n = model.n_layers
    if layers is None:
        return list(range(n // 2, n, 2)) or [0]
    bad = next((j for j in layers if not 0 <= j < n), None)
    if bad is not None or not layers or len(set(layers)) < len(layers):
        raise PatchbayError(f"layers={layers}: after how many of the {n} layers, each from 0 to {n - 1} and once")
    return list(layers)


@torch.no_grad()
def exit_logits(model: Model, stream: Tensor, norm: bool) -> Tensor:
    """What the unembedding makes of an earlier stream [row, d_model], after the final norm or without it."""
    return model.unembed_logits(model.final_norm_module.forward(stream) if norm else stream).float()


def divergence(last: Tensor, early: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, [row, candidate], of laws given by logits [row, vocab] and [row, candidate, vocab]."""
    one, other = torch.log_softmax(last, -1)[:, None].expand_as(early), torch.log_softmax(early, -1)
    mean = torch.logaddexp(one, other) - math.log(2)
    return 0.5 * ((one.exp() * (one - mean)).sum(-1) + (other.exp() * (other - mean)).sum(-1))


def published_divergence(last: Tensor, early: Tensor) -> Tensor:
    """What the published code takes for it: the other way round, a mean over the vocabulary and over the rows of the batch."""
    one, other = torch.log_softmax(last, -1)[:, None].expand_as(early), torch.log_softmax(early, -1)
    mean = 0.5 * (one.exp() + other.exp())
    log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    each = 0.5 * ((mean * (log_mean - one)).mean(-1) + (mean * (log_mean - other)).mean(-1))  # [row, candidate]
    return each.mean(0, keepdim=True).expand_as(each)


def contrast(last: Tensor, early: Tensor, alpha: float) -> Tensor:
    """log q_N - log q_M [row, vocab], -inf outside the plausible tokens."""
    own = torch.log_softmax(last, -1)
    value = own - torch.log_softmax(early, -1)
    if alpha == 0:
        return value
    return value.masked_fill(own < own.amax(-1, keepdim=True) + math.log(alpha), -math.inf)


@method(paper="chuang2024")
def dola(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    layers: list[int] | None = None,
    alpha: float = 0.1,
    as_published: bool = False,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued by what the last layer finds likelier than an earlier one, with `score` the sum of that in nats.

    Beside it `contrasted` [prompt, draft, position], after how many layers the other law was read; the rest as every decoder returns it.

    `layers`: the candidates, after how many layers each; without, every second one of the upper half. `alpha`: how likely a token must
    be, as a share of the likeliest one's probability. `as_published`: the published code's choice of a layer in place of the formula's.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    drafts = decode(call, layers=layers, alpha=alpha, as_published=as_published)
    notes = [f"candidates: after {', '.join(map(str, candidates(model, layers)))} of {model.n_layers} layers"]
    if as_published and len(drafts) > 1:
        notes.append(
            "as_published: the layer is chosen by a mean over the batch, so that a prompt's text may depend on the others"
        )
    return as_result(call, drafts, units={"contrasted": "layers"}, notes=notes)


published(dola, decode)
