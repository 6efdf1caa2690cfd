"""Dose and response: what a model answers as a knob is turned, and what that does to text that has nothing to do with it.

At each strength, over the prompts of a task: the score and its change, and the shares of prompts whose most likely next token
is the right answer, one of the wrong ones, or another token (`right` + `wrong` + `other` = 1). Of facts in context, right is
what the text says and wrong is what the model remembers. The side effects: over `neutral` text, `loss` in nats per token, and
`kl`, the divergence KL(as it is || turned) of the next-token distributions in nats per token; and the score of every one of the
`others`. Beside them the same of random knobs (random directions of the same norm, or random parts of the same kind).

One strength is recommended, or none. It is chosen on a random half of the texts and of the prompts that the model does not answer
right as it is (on the others there is nothing to raise: how many they are is said): of those whose share of right answers comes
within 5 points of the highest (where none raises that share: whose gain in score comes within a tenth of the highest), the one of
least divergence on neutral text, or without neutral text the one nearest to neutral. It must keep that divergence at `cap` or below,
and its own text fluent: `own_loss`, the loss under the model as it is of what it samples after prompts, stays between half that of
the model's own samples and two caps above it (`_own_text.py`). Where none that gains does, none is recommended. What it does is
reported of the other half: `test_effect`, `test_right`, `test_kl`, and `test_against_random`, prompt by prompt. To lower a score,
exchange the task's right and wrong answers.

A cap of 0.5 nats: by Pinsker's inequality next-token distributions at a divergence d differ by at most sqrt(d / 2) in total
variation, here a half, so that at least half of what is sampled could have been sampled from the model as it is.

A knob that `turn.steer` made is never measured on the pairs that it was fitted on; on its own task it is measured on the twins,
which it leads to the prompts' answers.

Intervals are 95 % bootstraps over prompts (texts for the side effects). The model as it is runs once; every strength restarts
from the first layer that the knob edits (`_restarted.py`), so that nine strengths in the upper half of a model cost less than
five forward passes and nine unembeddings.

The shares as in Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models", who report
them on the task alone: a knob that answers as wanted may have broken everything else, hence the side effects. It says nothing
of other prompts than these and such as these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.measure._choice import NATS, SHARE, Curves, choice
from patchbay.measure._controls import random_knobs
from patchbay.measure._own_text import own_losses
from patchbay.measure._prompts import prompts_for
from patchbay.measure._restarted import Restarted
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

STRENGTHS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
Edits = Sequence[Sequence[Edit]]


@method(paper="yu2023")
def dose_response(
    model: Model,
    task: Task,
    knob: Knob,
    neutral: list[str] | list[list[int]] | None = None,
    *,
    strengths: list[float] | tuple[float, ...] = STRENGTHS,
    cap: float = 0.5,
    others: dict[str, Task] | None = None,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Score, kinds of answers and side effects at each strength of the knob, against `draws` random knobs; a strength is chosen.

    Main variable `score` [strength] in the task's unit with `low` and `high`, `effect` its change, `random` [draw, strength] the
    scores of the random knobs, `chance_low` and `chance_high` the ends of their effects; `right`, `wrong` and `other` likewise with
    `right_low`, ...; with `neutral`, `loss`, `kl` and `random_kl`; `others` [condition, strength] the scores of other tasks by name.
    Of the model as it is: `score_without`, `loss_without`, `others_without`. `chosen`, `own_loss`, `test_effect`, `test_right`,
    `test_against_random` and `p` as above. The table `dose` has the columns that print.

    `knob`: the knob that is turned. `neutral`: texts that have nothing to do with the task, for the side effects. `strengths`: the
    strengths to turn it to. `cap`: the divergence on neutral text, in nats per token, up to which a strength is recommended.
    `others`: other tasks by name, whose scores are watched. `draws`: random knobs that are turned beside it, each to every
    strength: 3 show where they lie and p is at least 0.25, 19 can show p = 0.05.
    """
    steps, turned = _steps(model, task, knob, strengths)
    if draws < 0 or not cap > 0:
        raise PatchbayError(f"draws={draws} (0 or more), cap={cap} (above 0)")
    texts = [] if neutral is None else _texts(model, neutral)
    task, notes = prompts_for(task, knob)
    controls, said = random_knobs(model, knob, draws, seed) if draws else ([], "no random knobs were tried (draws=0)")
    lists = [*turned, *(control.edits_at(step) for control in controls for step in steps)]
    seen = _answers(model, task, lists, batch_size)  # name -> [1 + list, prompt], the model as it is first
    n, shape = len(steps), (len(controls), len(steps))
    random_scores = seen["score"][1 + n :].reshape(*shape, len(task))  # [draw, strength, prompt]
    variables = _scores(seen, n, random_scores, task.unit)
    harm = None
    if texts:
        loss, kl = _side_effects(model, texts, lists, batch_size)  # [1 + list, text], [list, text]
        harm = kl[:n]
        variables |= _curve("loss", loss[1 : 1 + n], NATS) | _curve("kl", harm, NATS)
        variables["loss_without"] = (loss[0].mean(), (), NATS)
        if controls:
            variables["random_kl"] = (kl[n:].reshape(*shape, -1).mean(-1), ("draw", "strength"), NATS)
    if others:
        variables |= _others(model, others, turned, batch_size)
    harm, told = _felt(knob, steps, harm)
    own = partial(_own_losses, model, task, turned, seed)
    curves = Curves(
        task, steps, knob.neutral, {k: v[: 1 + n] for k, v in seen.items()}, random_scores, harm, own, cap, seed
    )
    found, chosen = choice(curves)
    coords = {"strength": steps} | ({"condition": list(others)} if others else {})
    variables |= found
    return Result(
        variables,
        coords=coords,
        tables={"dose": _printed(steps, variables)},
        notes=[*notes, *told, said, *chosen],
        highlights=[edit.port.part for edit in knob.edits],
    )


def _scores(seen: Mapping[str, Tensor], n: int, random: Tensor, unit: str) -> dict[str, Any]:
    """Score, effect and kinds of answers at each strength, and the random knobs' scores [draw, strength, prompt]."""
    plain, curves = seen["score"][0], seen["score"][1 : 1 + n]
    made = _curve("score", curves, unit) | _curve("effect", curves - plain, unit)
    made["score_without"] = (plain.mean(), (), unit)
    for name in ("right", "wrong", "other"):
        made |= _curve(name, seen[name][1 : 1 + n], SHARE)
    if len(random):
        effects = (random - plain).mean(-1)  # [draw, strength]
        made["random"] = (random.mean(-1), ("draw", "strength"), unit)
        made["chance_low"], made["chance_high"] = (
            (end.values, ("strength",), unit) for end in (effects.min(0), effects.max(0))
        )
    return made


def _felt(knob: Knob, steps: list[float], harm: Tensor | None) -> tuple[Tensor | None, list[str]]:
    """The divergence on neutral texts, where it says something of the knob, else why not."""
    if harm is None:
        return None, [
            "no neutral texts were given: what the knob does to other text was not measured, and no cap on it was held"
        ]
    turned = [i for i, step in enumerate(steps) if step != knob.neutral]
    if turned and not harm[turned].any():
        where = ", ".join(sorted({str(edit.positions) for edit in knob.edits}))
        return None, [
            f"at no strength does a prediction on neutral text change (the knob acts at {where}): the texts say nothing of it, and no "
            "cap was held"
        ]
    return harm, []


def _own_losses(
    model: Model, task: Task, turned: Edits, seed: int, prompts: Sequence[int], places: Sequence[int]
) -> list[float]:
    """Losses of own text after some of the prompts, at some of the strengths; the model as it is first."""
    return own_losses(model, [task.clean[i] for i in prompts], [[], *(turned[at] for at in places)], seed)


def _printed(steps: list[float], variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table that prints: strength, effect, loss, KL, and what random knobs do."""
    rows: list[dict[str, Any]] = [{"strength": step} for step in steps]
    for i, row in enumerate(rows):
        row |= {name: float(variables[key][0][i]) for name, key in (("effect", "effect"), ("loss", "loss"), ("KL", "kl")) if key in variables}  # fmt: skip
        if "chance_low" in variables:
            row["random"] = " to ".join(f"{float(variables[f'chance_{end}'][0][i]):.3g}" for end in ("low", "high"))
    return rows


def _steps(model: Model, task: Task, knob: Knob, strengths: Sequence[float]) -> tuple[list[float], list[list[Edit]]]:
    """Strengths and the edits at each; refuses before anything runs."""
    steps = [float(step) for step in strengths]
    if not steps or len(set(steps)) < len(steps):
        raise PatchbayError(f"strengths={list(strengths)}: some strengths, each one once")
    task.check(model.vocab_size)
    knob.check(model)
    for edit in knob.edits:
        model.require(edit.port)
        if edit.by_row:
            raise PatchbayError(
                f"{edit} treats prompts by their place in a batch: a curve over prompts needs one that does not"
            )
    return steps, [knob.edits_at(step) for step in steps]


# --- runs ---------------------------------------------------------------------------------------------


def _answers(model: Model, task: Task, lists: Edits, batch_size: int) -> dict[str, Tensor]:
    """Score and kind of answer under each list of edits, [1 + list, prompt] each, without any first."""
    pieces: list[dict[str, Tensor]] = []
    for start in range(0, len(task), batch_size):
        some = task[start : start + batch_size]
        ready = Restarted(model, some.clean, last=True)
        rows = [_answered(some, ready.logits(edits), ready.plain) for edits in ([], *lists)]
        pieces.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    return {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}


def _answered(task: Task, logits: Tensor, plain: Tensor) -> dict[str, Tensor]:
    said = logits.argmax(-1).tolist()
    right = torch.tensor([float(token == answer) for token, answer in zip(said, task.right, strict=True)]).double()
    wrong = torch.tensor([float(token in answers) for token, answers in zip(said, task.wrong, strict=True)]).double()
    return {
        "score": task.score(logits, plain).double().cpu(),
        "right": right,
        "wrong": wrong,
        "other": 1.0 - right - wrong,
    }


def _others(model: Model, tasks: Mapping[str, Task], turned: Edits, batch_size: int) -> dict[str, Any]:
    """Scores of other tasks, [condition, strength], with their intervals."""
    rows = []
    for task in tasks.values():
        task.check(model.vocab_size)
        scores = _answers(model, task, turned, batch_size)["score"]
        rows.append(torch.tensor([maths.bootstrap_interval(row) for row in scores], dtype=torch.float64))
    found = torch.stack(rows)  # [condition, 1 + strength, end]
    units = sorted({task.unit for task in tasks.values()})
    unit = units[0] if len(units) == 1 else "each task's own unit"
    axes = ("condition", "strength")
    made = {f"others{end}": (found[:, 1:, at], axes, unit) for at, end in enumerate(("", "_low", "_high"))}
    return made | {"others_without": (found[:, 0, 0], ("condition",), unit)}


def _texts(model: Model, neutral: Any) -> list[list[int]]:
    encoded = model.encode(neutral)
    short = next((i for i, ids in enumerate(encoded) if len(ids) < 2), None)
    if short is not None:
        raise PatchbayError(f"neutral text {short} has one token; a loss needs a next token, so 2 or more")
    return encoded


def _side_effects(model: Model, texts: list[list[int]], lists: Edits, batch_size: int) -> tuple[Tensor, Tensor]:
    """Nats per token of each text: loss [1 + list, text], the unedited first, and divergence from it [list, text]."""
    loss, divergence = (torch.zeros(more + len(lists), len(texts), dtype=torch.float64) for more in (1, 0))
    for start in range(0, len(texts), batch_size):
        piece = texts[start : start + batch_size]
        ready = Restarted(model, piece, last=False)
        for step, edits in enumerate([[], *lists]):
            logits = ready.logits(edits)  # [text, position, vocab]
            for n, ids in enumerate(piece):
                read = slice(0, len(ids) - 1)  # the predictions of tokens 1, 2, ...
                following = torch.tensor(ids[1:], device=logits.device)
                loss[step, start + n] = -maths.log_probability(logits[n, read], following).mean()
                if step:
                    divergence[step - 1, start + n] = maths.kl(ready.plain[n, read], logits[n, read]).mean()
    return loss, divergence


# --- what is reported ---------------------------------------------------------------------------------


def _curve(name: str, values: Tensor, unit: str) -> dict[str, Any]:
    """Mean over prompts at each strength of values [strength, prompt], with its interval: `score` has `low` and `high`."""
    numbers = torch.tensor(
        [maths.bootstrap_interval(value) for value in values], dtype=torch.float64
    )  # [strength, end]
    prefix = "" if name == "score" else f"{name}_"
    return {
        key: (numbers[:, at], ("strength",), unit) for at, key in enumerate((name, f"{prefix}low", f"{prefix}high"))
    }
