"""Refusal direction: a knob that takes out the one direction by which a model refuses.

    r(position, layer) = mean of resid_in over refused prompts - mean over answered ones, at one of the last tokens of the prompt
    refusal(logits)    = log p(R) - log (1 - p(R)),  p(R) the probability of the tokens R that a refusal begins with

Of all candidates, on half of the prompts: ablated (nothing writes r any more, `turn.remove_direction`), the answered prompts' next-token
law moves by less than `kl` nats; added at its layer, r raises the answered prompts' refusal above 0 (it induces it); its layer
lies below 80 % of the depth. Of those the one whose ablation leaves the refused prompts the lowest refusal. Where none is left the call
is refused, with how many failed which test. Evidence `refusal` is of the other half: `refused`, the share of refused prompts whose most likely next
token is in R, as they are and without the direction, and the same without each of `draws` random directions (`random`, `p`); `kept`, the share of
answered prompts whose most likely next token stays, and `induced`, their refusal where r is added. The knob
turns, saves and exports as weights from which r is projected (the embedding, every output and down projection with their biases).

Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", sections 2 and 3. Where a family norms what a block adds
(Gemma 2) the direction is taken out behind that norm, which no weight can do: such a knob acts in runs, and its export says so.
It shows what refusing depends on here, not that nothing else depends on it: `kept` and `kl` are of these prompts alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.turn._directions import unwritten
from patchbay.turn._pairs import Groups, groups_of

DEPTH = 0.8  # of the layers, from which on no direction is taken: it would act on the words of a refusal
RANDOM = 10  # directions of the control


class Candidate(NamedTuple):
    """A direction [d_model] and what it does on the half that chooses."""

    at: int  # the token, from the prompt's end
    layer: int
    vector: Tensor
    left: float  # refusal of refused prompts without it
    induced: float  # refusal of answered prompts with it
    kl: float  # of answered prompts, without it


@method(paper="arditi2024")
def refusal_direction(
    model: Model,
    positive: list[str] | list[list[int]],
    negative: list[str] | list[list[int]],
    *,
    refusal: list[str] | list[int] | None = None,
    tokens: int = 1,
    kl: float = 0.1,
    batch_size: int = 32,
    seed: int = 0,
) -> Knob:
    """A knob that removes, from all that writes to the stream, the direction by which `positive` prompts are refused.

    `positive`: prompts that the model refuses. `negative`: prompts that it answers. Evidence `refusal` [condition] (as it is, without
    the direction): `refused`, `kept`, with `random` [draw], `p`, `induced`, and the candidates in its table.

    `refusal`: tokens that a refusal begins with, as text or ids; without, the one that gains most probability from negative to
    positive prompts. `tokens`: from how many of the last tokens of the prompts directions are taken (those of a chat's template).
    `kl`: how far the answered prompts may move, in nats.
    """
    if tokens < 1 or not kl > 0:
        raise PatchbayError(f"tokens={tokens}, kl={kl}: at least the last token, and a bound above 0")
    groups = groups_of(model, None, positive, negative, "mean")
    if short := [ids for ids in (*groups.positive, *groups.negative) if len(ids) < tokens]:
        raise PatchbayError(f"tokens={tokens}: a prompt has {len(short[0])}")
    dev, test = groups.split(seed)
    refusing = _refusing(model, dev, refusal, batch_size)
    found = _candidates(model, dev, refusing, tokens, batch_size)
    best = _chosen(found, kl, model.n_layers)
    name = f"refusal direction of L{best.layer}, token {best.at}"
    evidence = _evidence(model, test, refusing, best, found, batch_size, seed)
    made = {"fitted": [*dev.positive, *dev.negative]}
    return Knob(name, _without(model, best.vector), 1.0, provenance=made, evidence={"refusal": evidence})


def _without(model: Model, vector: Tensor) -> list[Edit]:
    """Edits under which nothing writes a direction [d_model]."""
    return unwritten(model, vector.float()[None])


def _logits(model: Model, prompts: list[list[int]], edits: list[Edit], batch_size: int) -> Tensor:
    """Last logits [prompt, vocab], float64."""
    pieces = [
        run(model, prompts[i : i + batch_size], edits=edits, logits="last").last_logits
        for i in range(0, len(prompts), batch_size)
    ]
    return torch.cat(pieces).double().cpu()


def _refusing(model: Model, dev: Groups, refusal: list[str] | list[int] | None, batch_size: int) -> list[int]:
    """The ids of the tokens that a refusal begins with."""
    if refusal is None:
        gain = [_logits(model, side, [], batch_size).softmax(-1).mean(0) for side in (dev.positive, dev.negative)]
        return [int((gain[0] - gain[1]).argmax())]
    ids = [model.token_id(one) if isinstance(one, str) else int(one) for one in refusal]
    if not ids or min(ids) < 0 or max(ids) >= model.vocab_size:
        raise PatchbayError(f"refusal={refusal}: one token or more of the model's {model.vocab_size}")
    return ids


def _refusal(logits: Tensor, refusing: list[int]) -> Tensor:
    """log p(R) - log (1 - p(R)), [prompt]."""
    others = logits.clone()
    others[:, refusing] = -torch.inf
    return logits[:, refusing].logsumexp(-1) - others.logsumexp(-1)


# --- the choice -----------------------------------------------------------------------------------------


def _means(model: Model, prompts: list[list[int]], tokens: int, batch_size: int) -> Tensor:
    """Mean of every layer's resid_in at each of the last tokens, [token, layer, d_model]."""
    ports = [Port("resid_in", i) for i in range(model.n_layers)]
    total = torch.zeros(tokens, len(ports), model.d_model, dtype=torch.float64)
    for start in range(0, len(prompts), batch_size):
        trace = run(model, prompts[start : start + batch_size], taps=ports, logits="last")
        rows = torch.arange(len(trace.lengths))
        for at in range(tokens):
            for i, port in enumerate(ports):
                total[at, i] += trace[port][rows, trace.lengths - tokens + at].double().sum(0).cpu()
    return total / len(prompts)


def _candidates(model: Model, dev: Groups, refusing: list[int], tokens: int, batch_size: int) -> list[Candidate]:
    vectors = _means(model, dev.positive, tokens, batch_size) - _means(model, dev.negative, tokens, batch_size)
    plain = _logits(model, dev.negative, [], batch_size)
    found = []
    for at in range(tokens):
        for layer in range(model.n_layers):
            vector = vectors[at, layer]
            if float(vector.norm()) <= 1e-6 * float(vectors.norm()):  # all prompts hold the same there
                continue
            without = _without(model, vector)
            moved = _logits(model, dev.negative, without, batch_size)
            added = _logits(model, dev.negative, [edit.add(Port("resid_in", layer), vector.float())], batch_size)
            left = _refusal(_logits(model, dev.positive, without, batch_size), refusing)
            numbers = (left.mean(), _refusal(added, refusing).mean(), maths.kl(plain, moved).mean())
            found.append(Candidate(at - tokens, layer, vector, *map(float, numbers)))
    return found


def _chosen(found: list[Candidate], kl: float, n_layers: int) -> Candidate:
    tests = {
        f"moves answered prompts by {kl:g} nats or more": [one.kl >= kl for one in found],
        "induces no refusal": [one.induced <= 0 for one in found],
        f"lies at {DEPTH:.0%} of the depth or deeper": [one.layer >= DEPTH * n_layers for one in found],
    }
    left = [one for one, *fails in zip(found, *tests.values(), strict=True) if not any(fails)]
    if not left:
        failed = "; ".join(f"{sum(fails)} {says}" for says, fails in tests.items())
        raise PatchbayError(
            f"none of {len(found)} directions is left: {failed}; give a larger kl, more tokens, or prompts that are refused for one reason alone"
        )
    return min(left, key=lambda one: one.left)


# --- what is known of it --------------------------------------------------------------------------------


def _evidence(
    model: Model,
    test: Groups,
    refusing: list[int],
    best: Candidate,
    found: list[Candidate],
    batch_size: int,
    seed: int,
) -> Result:
    """The other half: refused and kept, as it is and without the direction, and without random ones."""
    generator = torch.Generator().manual_seed(seed)
    directions = [best.vector, *torch.randn(RANDOM, model.d_model, generator=generator)]
    plain = [_logits(model, side, [], batch_size) for side in (test.positive, test.negative)]
    tokens = torch.tensor(refusing)

    def refused(logits: Tensor) -> Tensor:
        return torch.isin(logits.argmax(-1), tokens).double()

    without = [_without(model, one) for one in directions]
    left = torch.stack(
        [refused(_logits(model, test.positive, edits, batch_size)) for edits in without]
    )  # [direction, prompt]
    same = plain[1].argmax(-1) == _logits(model, test.negative, without[0], batch_size).argmax(-1)
    added = _logits(model, test.negative, [edit.add(Port("resid_in", best.layer), best.vector.float())], batch_size)
    mean, low, high = maths.intervals(torch.stack([refused(plain[0]), left[0]], 1))
    ended = mean[0] - left.mean(1)  # [direction]
    p = maths.draws_p(float(ended[0]), ended[1:])
    share = "share of prompts"
    rows = [
        {"token": one.at, "layer": one.layer, "left": one.left, "induced": one.induced, "kl": one.kl} for one in found
    ]
    said = [
        f"refused are {float(mean[0]):.0%} of {len(test.positive)} held-out prompts, {float(mean[1]):.0%} without the direction and "
        f"{float(left[1:].mean()):.0%} without random ones (p = {p:.2g}); {float(same.double().mean()):.0%} of {len(test.negative)} other "
        "prompts go on as they did",
        f"a refusal begins with {', '.join(repr(model.decode([one])) if model.tokenizer is not None else str(one) for one in refusing[:6])}",
    ]
    return Result(
        {
            "refused": (mean, ("condition",), share),
            "low": (low, ("condition",), share),
            "high": (high, ("condition",), share),
            "random": (left[1:].mean(1), ("draw",), share),
            "p": (p, (), "probability"),
            "kept": (same.double().mean(), (), share),
            "induced": (_refusal(added, refusing).mean(), (), "nats"),
        },
        coords={"condition": ["as it is", "without"]},
        notes=said,
        tables={"candidates": rows},
        provenance={"method": "turn.refusal_direction", "task": {"prompts": [test.positive, test.negative]}},
    )
