"""Dose and response: what a model answers as a knob is turned, and what that does to text that has nothing to do with it.

At each strength, over the prompts of a task: the score and its change, and the shares of prompts whose most likely next token
is the right answer, one of the wrong ones, or another token (`right` + `wrong` + `other` = 1). Of facts in context, right is
what the text says and wrong is what the model remembers. The side effects: over `neutral` text, `loss` in nats per token, and
`kl`, the divergence KL(as it is || turned) of the next-token distributions in nats per token; and the score of every one of the
`others`. Beside them the same of random knobs (random directions of the same norm, or random parts of the same kind).

One strength is chosen on a random half of the prompts and texts: of those whose share of right answers comes within 5 points
of the highest (where none raises that share: whose gain in score comes within a tenth of the highest), the one of least
divergence on neutral text, or without neutral text the one nearest to neutral; none when nothing gains. What it does is
reported of the other half: `test_effect`, `test_right`, and `test_against_random`, prompt by prompt. To lower a score, exchange
the task's right and wrong answers.

Intervals are 95 % bootstraps over prompts (texts for the side effects). The model as it is runs once; every strength restarts
from the first layer that the knob edits (`_restarted.py`), so that nine strengths in the upper half of a model cost less than
five forward passes and nine unembeddings.

The shares as in Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models", who report
them on the task alone: a knob that answers as wanted may have broken everything else, hence the side effects. It says nothing
of other prompts than these and such as these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.measure._controls import random_knobs
from patchbay.measure._restarted import Restarted
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

STRENGTHS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
LEVEL = 0.05
SHARE, NATS = "share of prompts", "nats per token"
NEAR, POINTS = (
    0.1,
    0.05,
)  # of the highest gain in score, of the share of right answers: strengths so near to the best compete
Edits = Sequence[Sequence[Edit]]


@method(paper="yu2023")
def dose_response(
    model: Model,
    task: Task,
    knob: Knob,
    *,
    strengths: list[float] | tuple[float, ...] = STRENGTHS,
    neutral: list[str] | list[list[int]] | None = None,
    others: dict[str, Task] | None = None,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Score, kinds of answers and side effects at each strength of the knob, against `draws` random knobs; a strength is chosen.

    Main variable `score` [strength] in the task's unit with `low` and `high`, `effect` its change, `random` [draw, strength] the
    scores of the random knobs; `right`, `wrong` and `other` likewise with `right_low`, ...; with `neutral`, `loss`, `kl` and
    `random_kl`; `others` [condition, strength] the scores of other tasks by name. Of the model as it is: `score_without`,
    `loss_without`, `others_without`. `chosen`, `test_effect`, `test_right`, `test_against_random` and `p` as above.

    `knob`: the knob that is turned. `strengths`: the strengths to turn it to. `neutral`: texts that have nothing to do
    with the task, for the side effects. `others`: other tasks by name, whose scores are watched. `draws`: random knobs
    that are turned beside it, each to every strength: 3 show where they lie and p is at least 0.25, 19 can show p = 0.05.
    """
    steps, turned = _steps(model, task, knob, strengths)
    if draws < 0 or batch_size < 1:
        raise PatchbayError(f"draws={draws} (0 or more), batch_size={batch_size} (1 or more)")
    texts = [] if neutral is None else _texts(model, neutral)
    controls, said = random_knobs(model, knob, draws, seed) if draws else ([], "no random knobs were tried (draws=0)")
    lists = [*turned, *(control.edits_at(step) for control in controls for step in steps)]
    seen = _answers(model, task, lists, batch_size)  # name -> [1 + list, prompt], the model as it is first
    n, shape = len(steps), (len(controls), len(steps))
    plain, curves = seen["score"][0], seen["score"][1 : 1 + n]
    random_scores = seen["score"][1 + n :].reshape(*shape, len(task))  # [draw, strength, prompt]
    variables = _curve("score", curves, task.unit) | _curve("effect", curves - plain, task.unit)
    variables["score_without"] = (plain.mean(), (), task.unit)
    for name in ("right", "wrong", "other"):
        variables |= _curve(name, seen[name][1 : 1 + n], SHARE)
    if controls:
        variables["random"] = (random_scores.mean(-1), ("draw", "strength"), task.unit)
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
    notes = (
        [said] if texts else ["no neutral texts were given: what the knob does to other text was not measured", said]
    )
    found, told = _choice(task, knob, steps, {k: v[: 1 + n] for k, v in seen.items()}, random_scores, harm, seed)
    parts = [edit.port.part for edit in knob.edits]
    coords = {"strength": steps} | ({"condition": list(others)} if others else {})
    return Result(variables | found, coords=coords, notes=[*notes, *told], highlights=parts)


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


def _halves(task: Task, seed: int) -> tuple[list[int], list[int]]:
    """Places of the prompts of the two halves of `task.split`."""
    numbered = replace(task, labels={"place": range(len(task))})
    dev, test = numbered.split(0.5, seed)
    return list(dev.labels["place"]), list(test.labels["place"])


def _choice(
    task: Task,
    knob: Knob,
    steps: list[float],
    seen: dict[str, Tensor],
    controls: Tensor,
    harm: Tensor | None,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """Choose a strength on one half, report it on the other. seen [1 + strength, prompt], controls [draw, strength, prompt]."""
    if len(task) < 4 or (harm is not None and harm.shape[1] < 2):
        return {}, ["too few prompts or texts to choose a strength on one half and test it on the other"]
    dev, test = _halves(task, seed)
    near, rule = _near(task, seen, dev)
    if not near:
        return {}, ["no strength raises the share of right answers or the score on the choosing half: none was chosen"]
    cost = (torch.tensor(steps) - knob.neutral).abs().double() if harm is None else harm[:, ::2].mean(-1)
    at = min(near, key=lambda i: float(cost[i]))
    scores = seen["score"]
    few: list[str] = []
    values = {"test_effect": maths.paired_interval(scores[1 + at, test], scores[0, test], seed=seed)}
    values["test_right"], units = (
        maths.bootstrap_interval(seen["right"][1 + at, test], seed=seed),
        {"test_right": SHARE},
    )
    numbers = {"chosen": (steps[at], "strength")}
    if len(controls):
        plain, drawn = scores[0, test], controls[:, at][:, test]  # [prompt], [draw, prompt]
        values["test_against_random"] = maths.beyond_draws(scores[1 + at, test], drawn, seed=seed)
        p = maths.draws_p(values["test_effect"].mean, (drawn - plain).mean(1), two_sided=True)
        numbers["p"] = (p, "probability")
        if 1 / (1 + len(drawn)) > LEVEL:
            least = 1 / (1 + len(drawn))
            few = [f"{len(drawn)} random knobs: p is at least {least:.2g}, whatever the knob; draws=19 can show 0.05"]
    if harm is not None:
        values["test_kl"], units["test_kl"] = maths.bootstrap_interval(harm[at, 1::2], seed=seed), NATS
    for name, interval in values.items():
        ends = zip(("", "_low", "_high"), interval, strict=True)
        numbers |= {name + end: (value, units.get(name, task.unit)) for end, value in ends if value == value}
    found = {name: (torch.tensor(value, dtype=torch.float64), (), unit) for name, (value, unit) in numbers.items()}
    return found, [*few, _verdict(steps[at], rule, values, task, len(test))]


def _near(task: Task, seen: dict[str, Tensor], dev: list[int]) -> tuple[list[int], str]:
    """The strengths that do about as well as the best on some prompts, and by what measure; none where nothing gains."""
    right = seen["right"][:, dev].mean(-1)  # [1 + strength]
    if float(right[1:].max()) > float(right[0]) + POINTS:
        least = max(float(right[1:].max()) - POINTS, float(right[0]))
        return [i for i, share in enumerate(right[1:].tolist()) if share >= least], "share of right answers"
    gain = (seen["score"][1:] - seen["score"][0])[:, dev].mean(-1) * _sign(task)
    best = float(gain.max())
    return [i for i, g in enumerate(gain.tolist()) if best > 0 and g >= (1.0 - NEAR) * best], "gain in score"


def _sign(task: Task) -> float:
    """Of ranks, lower is better."""
    return -1.0 if task.metric == "rank" else 1.0


def _verdict(step: float, rule: str, values: Mapping[str, maths.Interval], task: Task, n_test: int) -> str:
    """What the test half says, in words."""
    judged = [values[name] for name in ("test_effect", "test_against_random") if name in values]
    holds = all(min(_sign(task) * interval.low, _sign(task) * interval.high) > 0 for interval in judged)
    effect = values["test_effect"]
    numbers = f"{effect.mean:+.3g} ({effect.low:+.3g} to {effect.high:+.3g}) {task.unit} on {n_test} prompts that chose nothing"
    against = " and more than random knobs" if "test_against_random" in values else ""
    outcome = f"an effect{against}" if holds else "NOT confirmed" + (against and ", or no more than random knobs")
    return f"strength {step:g}, chosen by {rule} on the other half, changes the score by {numbers}: {outcome}"
