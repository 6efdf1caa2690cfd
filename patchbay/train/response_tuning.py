"""Response tuning: train on answers alone, without the questions that they answer, and see whether questions are answered.

    loss = mean over the tokens of a response of - log p(token | start, response so far), by AdamW on all weights

`start` is what stands before every response whatever was asked (the tags of a chat, or the start token). Beside it a twin is
tuned as instruction tuning does, with each response behind its own question, for as many steps on the same pairs. Both are scored on
the other half of the pairs: the mean log-probability of a token of the response after its question. The lent model is not touched.

`paired` is the same of the response of another question, in its place: what a model gains there too it has learned of responses, and
not of questions. `own` = score - paired is what the question says, and `gain_own` what tuning on responses adds to it.

Hewitt et al. 2024, "Instruction Following without Instruction Tuning".

A gain in `score` alone shows that the form of responses was learned. Small models are no models of following instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchbay import maths
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.train._copies import copied, write

NATS = "nats per token"
Pair = tuple[list[int], list[int]]


@method(paper="hewitt2024")
def response_tuning(
    model: Model,
    pairs: list[list[str]] | list[list[list[int]]],
    *,
    start: str | list[int] | None = None,
    folder: str | None = None,
    steps: int = 60,
    rate: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """Log-probability of held-out responses after their questions, of the model as it is and of both tuned ones.

    Main variable `score` [condition] (before, responses, instructions) with ends; `paired` and `own` likewise, and `gain_own` with
    ends: `own` of the model tuned on responses less that of the model as it is, pair by pair. The table `steps` has the losses.

    `pairs`: questions and their responses, as texts or token ids. `start`: what stands before every response; without, the start token
    that the tokenizer puts before a text, or the model's. `folder`: where the model tuned on responses is written; without, nowhere.
    `steps`: updates of the weights. `rate`: AdamW's learning rate.
    """
    encoded, begun = _read(model, pairs), _start(model, start)
    _check(model, encoded, folder, steps, rate)
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    dev, test = ([encoded[i] for i in part] for part in (order[: len(order) // 2], order[len(order) // 2 :]))
    alone, asked = copied(model), copied(model)
    losses = [_fit(alone, [(begun, answer) for _, answer in dev], steps, rate, batch_size, seed)]
    losses.append(_fit(asked, dev, steps, rate, batch_size, seed))
    moved = [(question, test[(i + 1) % len(test)][1]) for i, (question, _) in enumerate(test)]
    scores = torch.stack([_scores(one, test) for one in (model, alone, asked)])  # [condition, pair]
    others = torch.stack([_scores(one, moved) for one in (model, alone, asked)])
    own = scores - others
    gain = maths.paired_interval(own[1], own[0])
    written = None if folder is None else write(model, alone, Path(folder))
    variables: dict[str, Any] = {}
    for name, values in (("score", scores), ("paired", others), ("own", own)):
        ends = [maths.bootstrap_interval(one) for one in values]
        low, high = ("low", "high") if name == "score" else (f"{name}_low", f"{name}_high")
        for key, at in ((name, 0), (low, 1), (high, 2)):
            variables[key] = ([one[at] for one in ends], ("condition",), NATS)
    variables |= {f"gain_own{end}": (value, (), NATS) for end, value in zip(("", "_low", "_high"), gain, strict=True)}
    table = [{"step": i, "responses": a, "instructions": b} for i, (a, b) in enumerate(zip(*losses, strict=True))]
    return Result(
        variables,
        coords={"condition": ["before", "responses", "instructions"]},
        tables={"steps": table},
        notes=[
            f"tuned on {len(dev)} pairs, scored on {len(test)} others",
            f"weights tuned on responses have the fingerprint {alone.fingerprint}"
            + (f" and are in {written}" if written else "; no folder was given, they are not kept"),
        ],
        provenance={"checkpoint": {"folder": written, "fingerprint": alone.fingerprint}},
    )


def _read(model: Model, pairs: Sequence[Sequence[Any]]) -> list[Pair]:
    """Questions and responses as ids; a response as it stands behind its question."""
    if not isinstance(pairs, list | tuple) or not all(map(_is_pair, pairs)):
        raise PatchbayError("pairs are lists of two: a question and its response, both texts or both token ids")
    found = []
    for number, (question, answer) in enumerate(pairs):
        if isinstance(question, str):
            [before], [whole] = model.encode([question]), model.encode([f"{question}{answer}"])
            same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
            before, after = whole[:same], whole[same:]
        else:
            [before, after] = model.encode([list(question), list(answer)])
        if not before or not after:
            raise PatchbayError(f"pair {number}: its response adds no token to its question")
        found.append((before, after))
    return found


def _is_pair(one: Any) -> bool:
    if not isinstance(one, list | tuple) or len(one) != 2:
        return False
    return all(isinstance(side, str) for side in one) or all(isinstance(side, list | tuple) for side in one)


def _start(model: Model, start: Any) -> list[int]:
    if start is not None:
        return model.encode([start])[0]
    own = getattr(model.tokenizer, "bos_token_id", None) if model.tokenizer is not None else None
    own = own if own is not None else getattr(model.config, "bos_token_id", None)
    if own is None:
        raise PatchbayError("start: what stands before every response; this model names no start token")
    return [int(own)]


def _check(model: Model, pairs: Sequence[Pair], folder: str | None, steps: int, rate: float) -> None:
    if len(pairs) < 4:
        raise PatchbayError(f"{len(pairs)} pairs: four or more, half to train on and half to score")
    if steps < 1 or not 0 < rate < float("inf"):
        raise PatchbayError(f"steps={steps}, rate={rate}: 1 or more steps, and a rate above 0")
    if model._session is not None:
        raise PatchbayError(
            "tuning inside model.edited(...): the copy would be trained under those edits; leave the block"
        )
    if folder is not None and Path(folder).exists():
        raise PatchbayError(f"{folder} is already there; a tuned checkpoint goes to a new folder")


def _fit(tuned: Model, pairs: Sequence[Pair], steps: int, rate: float, batch_size: int, seed: int) -> list[float]:
    """Train all weights in place; the loss of every step."""
    tensors = [one for one in tuned.hf.parameters() if one.is_floating_point()]
    for tensor in tensors:
        tensor.requires_grad_()
    fit = torch.optim.AdamW(tensors, lr=rate, foreach=False)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        rows = torch.randperm(len(pairs), generator=generator)[:batch_size].tolist()
        some = [pairs[i] for i in rows]
        trace = run(tuned, [before + after for before, after in some], grad=True)
        with torch.enable_grad():
            loss = torch.cat([_losses(trace.logits[i], *pair) for i, pair in enumerate(some)]).mean()
        for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
            tensor.grad = gradient
        fit.step()
        losses.append(float(loss.detach()))
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise PatchbayError(
                f"the weights are no longer finite after {len(losses)} steps at rate {rate}: lower the rate"
            )
    for tensor in tensors:
        tensor.grad = None
        tensor.requires_grad_(False)
    return losses


def _losses(logits: Tensor, before: list[int], after: list[int]) -> Tensor:
    """- log p of each token of the response [token], from logits [position, vocab] of question and response."""
    said = logits[len(before) - 1 : len(before) + len(after) - 1].float()
    return nn.functional.cross_entropy(said, torch.tensor(after, device=said.device), reduction="none")


@torch.no_grad()
def _scores(model: Model, pairs: Sequence[Pair]) -> Tensor:
    """The mean log-probability of a response's tokens [pair]."""
    found = [-_losses(run(model, [before + after]).logits[0], before, after).mean() for before, after in pairs]
    return torch.stack(found).double().cpu()
