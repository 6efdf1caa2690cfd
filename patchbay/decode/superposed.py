"""Superposed decoding: several drafts in one stream, whose next input is a weighted mix of their last tokens' embeddings.

    s(d, v) = (1 - alpha) log p(v) + alpha log g_d(v),   over the 3 k likeliest v of p = softmax(z / temperature), made to sum to 1
    x = sum over drafts of w_d E[last token of d],       w = softmax(draft scores)

p is one law for all drafts; what tells them apart is g_d, the n-grams of some texts after each draft (`_ngrams.py`). The k best of
(draft score + s) go on; a draft that the n-grams know no token of takes (1 - alpha) log p - 200. Texts that end leave the stream. The
final order is by score over length. One pass for k drafts, one token position each.

Draft scores are no log-probabilities (the temperature sharpens, n-grams filter), and the cache holds mixtures: `logp` is of one more
run over each finished draft, which is not counted. With n-grams one draft is not greedy decoding: tokens that they do not know are
forbidden. Without, alpha is 0; one draft is then greedy decoding.

Shen et al. 2024, "Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass".

Drafts differ in a few words. At as many token positions fed, beam search may find likelier ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, Rows, asked, best, ids_of
from patchbay.decode._ngrams import NGrams
from patchbay.decode._published import published
from patchbay.decode._rescored import rescore
from patchbay.decode._result import Draft, as_result
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Token
from patchbay.tasks.task import Task

ALPHA = {2: 0.62, 3: 0.54, 4: 0.52, 5: 0.6, 10: 0.54}  # the published weights of n-grams by number of drafts
TEMPERATURE = {10: 0.12}  # else 0.06
UNKNOWN = -200.0  # what a draft loses where the n-grams know none of the tokens


@dataclass
class Stream:
    """The drafts of one prompt: tokens and score of each living one, and those that have ended."""

    prompt: list[int]
    tokens: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    ended: list[tuple[list[int], float]] = field(default_factory=list)


def decode(
    call: Call, *, texts: Any = None, drafts: int = 3, alpha: float | None = None, temperature: float | None = None
) -> list[list[Draft]]:
    """The loop: drafts [prompt][draft] of a call, the best first."""
    known = None if texts is None else NGrams(ids_of(call.model, texts))
    if alpha is None:
        alpha = 0.0 if known is None else ALPHA.get(drafts, ALPHA[3])
    temperature = TEMPERATURE.get(drafts, 0.06) if temperature is None else temperature
    _check(call, known, drafts, alpha, temperature)
    streams = [Stream(ids) for ids in call.prompts]
    found: list[list[Draft]] = [[] for _ in streams]
    for members in call.batches():
        prompts, first = _batch(call, members, streams, known if alpha else None, drafts, alpha, temperature)
        for i in members:
            found[i] = _ranked(streams[i], drafts, call.ends)
        rescore(prompts, first, found)
    return found


def _batch(
    call: Call,
    members: list[int],
    streams: list[Stream],
    known: NGrams | None,
    k: int,
    alpha: float,
    temperature: float,
) -> tuple[Rows, Tensor]:
    """The streams of some prompts to their ends; their prompts as they were read, and the logits [row, vocab] that followed."""
    embed = call.model.hf.get_input_embeddings()
    with call.rows(members) as rows:
        logits = first = rows.run().last
        prompts = rows.again()
        for step in range(call.n_new):
            law = torch.log_softmax(call.chosen_from(rows.ids, logits) / temperature, -1)
            tokens = best(law, min(3 * k, law.shape[1]))  # [row, token]
            logp = torch.log_softmax(law.gather(1, tokens), -1)
            for at, i in enumerate(rows.of):
                _expand(streams[i], tokens[at].tolist(), logp[at].tolist(), known, k, alpha, call.ends)
            stay = [at for at, i in enumerate(rows.of) if len(streams[i].ended) < k and streams[i].tokens]
            if not stay or step == call.n_new - 1:
                break
            if len(stay) < len(rows.of):
                rows.take(stay)
            mixed = torch.stack([mixture(embed, streams[i]) for i in rows.of])
            logits = rows.run_embedded(mixed).last
    return prompts, first


@torch.no_grad()
def mixture(embed: Any, stream: Stream) -> Tensor:
    """The weighted mix of the embeddings of the drafts' last tokens [d_model]."""
    last = torch.tensor([tokens[-1] for tokens in stream.tokens], device=embed.weight.device)
    weights = torch.tensor(stream.scores, dtype=torch.float64).softmax(0).to(embed.weight)
    mixed: Tensor = weights @ embed(last)
    return mixed


def _expand(
    stream: Stream,
    tokens: list[int],
    logp: list[float],
    known: NGrams | None,
    k: int,
    alpha: float,
    ends: frozenset[int],
) -> None:
    """One step of a stream: the best of all drafts with all tokens; those that end are kept aside."""
    found = []
    for text, score in zip(stream.tokens, stream.scores, strict=True):
        steps = _steps([*stream.prompt, *text], tokens, logp, known, alpha)
        found += [(score + step, text, token) for token, step in zip(tokens, steps, strict=True) if step > -math.inf]
    found.sort(key=lambda one: -one[0])  # stable: an earlier draft first, then a likelier token
    live = [(score, [*text, token]) for score, text, token in found if token not in ends][:k]
    stream.ended += [([*text, token], score) for score, text, token in found[: 2 * k] if token in ends]
    live += [live[0]] * (k - len(live)) if live else []  # fewer than k: the best again
    stream.tokens, stream.scores = [text for _, text in live], [score for score, _ in live]


def _steps(text: list[int], tokens: list[int], logp: list[float], known: NGrams | None, alpha: float) -> list[float]:
    """s(d, v) of each token after one draft."""
    if known is None:
        return [(1 - alpha) * one for one in logp]
    weights = [known.weight(text, token) for token in tokens]
    if not any(weights):
        return [(1 - alpha) * one + UNKNOWN for one in logp]
    pairs = zip(logp, weights, strict=True)
    return [(1 - alpha) * one + alpha * math.log(weight) if weight else -math.inf for one, weight in pairs]


def _ranked(stream: Stream, k: int, ends: frozenset[int]) -> list[Draft]:
    """The k best by score over length, of those that ended and those that live; what is twice there, once."""
    several: dict[tuple[int, ...], Draft] = {}
    for tokens, score in [*stream.ended, *zip(stream.tokens, stream.scores, strict=True)]:
        several.setdefault(tuple(tokens), Draft(tokens, [], score / len(tokens), tokens[-1] in ends))
    return sorted(several.values(), key=lambda one: -one.score)[:k]


def _check(call: Call, known: NGrams | None, k: int, alpha: float, temperature: float) -> None:
    if not 1 <= k <= call.model.vocab_size:
        raise PatchbayError(f"drafts={k}: from 1 to the vocabulary's {call.model.vocab_size} tokens")
    if not 0.0 <= alpha <= 1.0:
        raise PatchbayError(f"alpha={alpha}: from 0, no n-grams, to 1")
    if alpha and known is None:
        raise PatchbayError(f"alpha={alpha} is the weight of n-grams: give texts= to count them in")
    if known is not None and not known.after:
        raise PatchbayError("texts: none has two tokens, so that there are no n-grams to count")
    if not temperature > 0:
        raise PatchbayError(f"temperature={temperature}: above 0")
    by_token = next((edit for edit in call.edits if isinstance(edit.positions, Token)), None)
    if by_token is not None:
        raise PatchbayError(
            f"{by_token}: the stream holds mixtures of tokens, so that an edit by token does not know where it acts"
        )


@method(paper="shen2024")
def superposed(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    drafts: int = 3,
    alpha: float | None = None,
    temperature: float | None = None,
    texts: list[str] | list[list[int]] | None = None,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> Result:
    """Several continuations of each prompt from one stream, the best first, with `score` the draft's score over its length.

    The rest as every decoder returns it; `logp` is of a run over each finished draft. Texts end where the model's generation config says.

    `drafts`: how many. `alpha`: the weight of n-grams; without, the published one for so many drafts, and 0 without texts.
    `temperature`: of the law, 0.06 unless said (0.12 for ten drafts). `texts`: those whose n-grams are counted.
    """
    call = asked(model, prompts, max_new_tokens, None, batch_size)
    found = decode(call, texts=texts, drafts=drafts, alpha=alpha, temperature=temperature)
    return as_result(
        call, found, "draft score per token", notes=["logp is of one more run over each draft, not counted"]
    )


published(superposed, decode, stops=False)
