"""Dose and response: what a model answers as a knob is turned, and what that does to text that has nothing to do with it.

At each strength, over the prompts of a task: the score, and the shares of prompts whose most likely next token is the right
answer, one of the wrong ones, or another token (`right` + `wrong` + `other` = 1). Of facts in context, right is what the text
says and wrong is what the model remembers. The side effects, over `neutral` text: `loss` in nats per token, and `kl`, the
divergence KL(as it is || turned) of the next-token distributions in nats per token. Intervals are 95 % bootstraps over
prompts (texts for the side effects). One forward pass per strength, and one of the model as it is.

The shares as in Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models", who report
them on the task alone: a knob that answers as wanted may have broken everything else, hence the side effects.

The curve is of these prompts: choose a strength on one half of a task and report the other (`task.split()`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.knob import Knob
from patchbay.method import method
from patchbay.model import Model
from patchbay.port import PatchbayError
from patchbay.result import Result
from patchbay.run import run
from patchbay.task import Task

STRENGTHS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
SHARE = "share of prompts"


@method(paper="yu2023")
def dose_response(
    model: Model,
    task: Task,
    knob: Knob,
    *,
    strengths: list[float] | tuple[float, ...] = STRENGTHS,
    neutral: list[str] | list[list[int]] | None = None,
    batch_size: int = 32,
) -> Result:
    """Score, kinds of answers and, where `neutral` texts are given, loss and divergence on them, at each strength of the knob.

    Main variable `score` [strength] in the task's unit with `low` and `high`; `right`, `wrong` and `other` likewise with
    `right_low`, ...; with `neutral`, `loss` and `kl`. Scores and losses of the model as it is: `score_without`, `loss_without`.
    """
    steps = [float(step) for step in strengths]
    if not steps or len(set(steps)) < len(steps):
        raise PatchbayError(f"strengths={list(strengths)}: some strengths, each one once")
    task.check(model.vocab_size)
    turned = [knob.edits_at(step) for step in steps]  # refuses a strength that is no number before anything runs
    texts = [] if neutral is None else _texts(model, neutral)
    plain = _answers(model, task, [], batch_size, None)
    curves = [_answers(model, task, edits, batch_size, plain["logits"]) for edits in turned]
    variables = _curve("score", [c["score"] for c in curves], task.unit) | {
        "score_without": (plain["score"].double().mean(), (), task.unit)
    }
    for name in ("right", "wrong", "other"):
        variables |= _curve(name, [c[name] for c in curves], SHARE)
    if texts:
        loss, kl = _side_effects(model, texts, turned, batch_size)  # [1 + strength, text], [strength, text]
        variables |= _curve("loss", list(loss[1:]), "nats per token") | _curve("kl", list(kl), "nats per token")
        variables["loss_without"] = (loss[0].double().mean(), (), "nats per token")
    notes = [] if texts else ["no neutral texts were given: what the knob does to other text was not measured"]
    return Result(
        variables, coords={"strength": steps}, notes=notes, highlights=[edit.port.part for edit in knob.edits]
    )


def _curve(name: str, values: list[Tensor], unit: str) -> dict[str, Any]:
    """Mean over prompts at each strength, with the ends of its interval: `score` has `low` and `high`, others `name_low`, ..."""
    intervals = [maths.bootstrap_interval(value) for value in values]
    prefix = "" if name == "score" else f"{name}_"
    names = (name, f"{prefix}low", f"{prefix}high")
    numbers = torch.tensor(intervals, dtype=torch.float64)  # [strength, end]
    return {key: (numbers[:, at], ("strength",), unit) for at, key in enumerate(names)}


def _answers(
    model: Model, task: Task, edits: list[Any], batch_size: int, reference: Tensor | None
) -> dict[str, Tensor]:
    """Score and kind of answer of every prompt, [prompt] each; `reference` holds the unedited logits, for kl."""
    pieces = [
        run(model, task[i : i + batch_size], edits=edits, logits="last").last_logits
        for i in range(0, len(task), batch_size)
    ]
    logits = torch.cat(pieces)  # [prompt, vocab]
    said = logits.argmax(-1).tolist()
    right = torch.tensor([float(token == answer) for token, answer in zip(said, task.right, strict=True)])
    wrong = torch.tensor([float(token in answers) for token, answers in zip(said, task.wrong, strict=True)])
    score = task.score(logits, logits if reference is None else reference)
    return {"score": score.cpu(), "right": right, "wrong": wrong, "other": 1.0 - right - wrong, "logits": logits}


def _texts(model: Model, neutral: Any) -> list[list[int]]:
    encoded = model.encode(neutral)
    short = next((i for i, ids in enumerate(encoded) if len(ids) < 2), None)
    if short is not None:
        raise PatchbayError(f"neutral text {short} has one token; a loss needs a next token, so 2 or more")
    return encoded


def _side_effects(
    model: Model, texts: list[list[int]], turned: list[list[Any]], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Nats per token of each text: loss [1 + strength, text], the unedited first, and divergence from it [strength, text]."""
    loss, divergence = torch.zeros(1 + len(turned), len(texts)), torch.zeros(len(turned), len(texts))
    for start in range(0, len(texts), batch_size):
        piece = texts[start : start + batch_size]
        plain = run(model, piece).logits  # [text, position, vocab]
        for step, edits in enumerate([[], *turned]):
            logits = run(model, piece, edits=edits).logits if step else plain
            for n, ids in enumerate(piece):
                read = slice(0, len(ids) - 1)  # the predictions of tokens 1, 2, ...
                following = torch.tensor(ids[1:], device=logits.device)
                loss[step, start + n] = -maths.log_probability(logits[n, read], following).mean()
                if step:
                    divergence[step - 1, start + n] = maths.kl(plain[n, read], logits[n, read]).mean()
    return loss, divergence
