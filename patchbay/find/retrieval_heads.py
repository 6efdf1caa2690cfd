"""Retrieval heads: attention heads that, while the model says a needle from a long text, look at the token it is saying.

The model continues each prompt greedily. At a step in which it says w, a head has copied w when the position j to which it
attends most holds w and lies in the needle. With k the needle's tokens and g_h those that head h copied,

    mode "set":   score_h = |g_h and k| / |k|                        each token once
    mode "count": score_h = number of steps with a copy / |k|        as the authors' code counts: repeats count again

mean over the runs whose answer names more than half of the needle (all runs with `all_runs`). Note that j is the place of the
token itself: of an induction head, the place after the match. Equal attention counts as attention to the first of the
equals. `activation` is the share of runs in which a head copies anything; a head with a score of 0.1 or more is a retrieval
head by the paper's rule, and `retrieval_share` the share of such heads. `without_first` is the score when the first position
is left out.

Null: a head that always looks the same distance back has a perfect score where needles lie at a fixed distance. So each
run's needle is dealt to another run, at its distance from the end: `null` is the score over all such pairs, `p` the share
of 1,000 deals that score as high (counting), `p_adjusted` over all heads. `low` and `high` are 95 % bootstraps over runs. As
many forward passes as tokens are said.

Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality".

A score of 1 does not say that the model needs the head: several may do the same, and then taking away any one changes nothing.
Use `prove.knockout_curve` on the set. What is looked at most is not all that is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.find._attention import GRID, held_out, pattern_layers
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

Mode = Literal["set", "count"]
SCORE = "share of the needle"
SHARE = "share of runs"
RULE = 0.1
DRAWS = 1000


@method(paper="wu2024", unit="share of the needle")
def retrieval_heads(
    model: Model,
    task: Task,
    *,
    mode: Mode = "set",
    n_tokens: int | None = None,
    all_runs: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> Result:
    """How much of the needle each head copies while the model says it, mean over the runs that succeed.

    `task` has the mark needle, as `pb.tasks.needle_retrieval(model)` has; join several lengths with `pb.Task.joined`.
    `n_tokens`: how many to say (without a value, as many as the needle has). Main variable `score`, with `low`, `high`,
    `null`, `p`, `p_adjusted`, `count` and `set` (both modes), `activation`, `without_first`; `success` (share of runs),
    `n_runs`, `retrieval_share`, `held_out`; the table `grid` has a row for each length and depth.

    `mode`: count each copied token once ("set"), or at every step ("count"). `all_runs`: also count runs whose answer
    misses the needle.
    """
    one_of("mode", mode, ("set", "count"))
    pattern_layers(model, "retrieval_heads")
    needles = _needles(model, task, n_tokens)
    pieces = [
        _say(model, [list(ids) for ids in task.clean[i : i + batch_size]], n_tokens or max(map(len, needles)))
        for i in range(0, len(task), batch_size)
    ]
    runs = [_run(task, needles, i, *row) for i, row in enumerate(row for piece in pieces for row in piece)]
    counted = [one for one in runs if one.success or all_runs]
    if not counted:
        raise PatchbayError(
            f"retrieval_heads: the model named more than half of the needle in none of {len(runs)} runs, and only those are "
            "scored; possible: a model that can do the task, shorter prompts, or all_runs=True"
        )
    return _report(task, runs, counted, mode, seed)


def _needles(model: Model, task: Task, n_tokens: int | None) -> list[tuple[int, ...]]:
    task.check(model.vocab_size)
    if "needle" not in task.marks or not all(task.marks["needle"]):
        raise PatchbayError(
            f"retrieval_heads needs the mark needle in every prompt; task {task.name} has the marks "
            f"{', '.join(task.marks) or 'none'}; possible: pb.tasks.needle_retrieval(model)"
        )
    if n_tokens is not None and n_tokens < 1:
        raise PatchbayError(f"n_tokens={n_tokens}: at least one token must be said")
    return [tuple(places) for places in task.marks["needle"]]


# --- runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run showed. `top`: the position that each head attends to most, [2 (with and without the first), step, layer, head],
    -1 where there is no head; `copied`: does it hold the token being said, inside the needle."""

    index: int
    success: bool
    query: Tensor  # [step]
    top: Tensor
    copied: Tensor  # bool, like top
    said: tuple[int, ...]
    needle: tuple[int, ...]  # token ids
    distances: Tensor  # [step, n]: how far back the needle's tokens that are said stand, -1 for none


def _say(model: Model, rows: list[list[int]], n_steps: int) -> list[tuple[list[int], Tensor]]:
    """Each prompt continued greedily, and where each head looked most at every step, [2, step, layer, head]."""
    layers = [i for i in range(model.n_layers) if "attn.pattern" in model.signals(i)]
    widest = max(map(model.n_heads, layers))
    taps = [Port("attn.pattern", i).rows(-1) for i in layers]
    looked = torch.full((len(rows), 2, n_steps, model.n_layers, widest), -1)
    rows = [list(ids) for ids in rows]
    for step in range(n_steps):
        trace = run(model, rows, taps=taps, logits="last")
        for tap, i in zip(taps, layers, strict=True):
            pattern = trace[tap][:, :, 0]  # [prompt, head, key]
            looked[:, 0, step, i, : pattern.shape[1]] = pattern.argmax(-1).cpu()
            if pattern.shape[-1] > 1:
                looked[:, 1, step, i, : pattern.shape[1]] = pattern[..., 1:].argmax(-1).cpu() + 1
        for ids, token in zip(rows, trace.last_logits.argmax(-1).tolist(), strict=True):
            ids.append(token)
    return list(zip(rows, looked, strict=True))


def _run(task: Task, needles: list[tuple[int, ...]], index: int, ids: list[int], top: Tensor) -> Run:
    n_steps, n_prompt = top.shape[1], len(task.clean[index])
    said, places = tuple(ids[n_prompt:]), needles[index]
    tokens = torch.tensor(ids)
    inside = torch.zeros(len(ids), dtype=torch.bool)
    inside[list(places)] = True
    step = torch.tensor(said)[None, :, None, None]
    at = top.clamp_min(0)
    copied = (top >= 0) & inside[at] & (tokens[at] == step)
    needle = tuple(ids[place] for place in places)
    query = n_prompt - 1 + torch.arange(n_steps)
    back = query[:, None] - torch.tensor(places)  # [step, place]
    distances = torch.where(torch.tensor(needle) == torch.tensor(said)[:, None], back, -1)
    left = list(needle)
    for token in said:
        if token in left:
            left.remove(token)
    recall = 1 - len(left) / len(needle)  # ROUGE-1 recall of the needle
    return Run(index, recall > 0.5, query, top, copied, said, needle, distances)


def _scores(one: Run, mode: str) -> Tensor:
    """[2 (with and without the first token), layer, head]."""
    if mode == "count":
        return one.copied.sum(1) / len(one.needle)
    found = [one.copied[:, [s == token for s in one.said]].any(1) for token in set(one.needle) & set(one.said)]
    total = torch.stack(found).sum(0) if found else torch.zeros_like(one.copied[:, 0], dtype=torch.long)
    return total / len(set(one.needle))


# --- the null -----------------------------------------------------------------------------------------


def _dealt(runs: Sequence[Run], seed: int) -> tuple[Tensor, Tensor]:
    """Score (counting) with the needle of another run, mean over all pairs, and p of the true pairing: [layer, head] each."""
    most = max(one.distances.shape[1] for one in runs)
    distances = torch.stack(
        [torch.nn.functional.pad(one.distances, (0, most - one.distances.shape[1]), value=-1) for one in runs]
    )  # [run, step, n]
    back = torch.stack([one.query[:, None, None] - one.top[0] for one in runs])  # [run, step, layer, head]
    looked = torch.where(torch.stack([one.top[0] for one in runs]) >= 0, back, -2)  # a missing head matches nothing
    sizes = torch.tensor([len(one.needle) for one in runs])
    hits = torch.stack(
        [
            (looked[..., None] == needle[None, :, None, None]).any(-1).sum(1) / size
            for needle, size in zip(distances, sizes, strict=True)
        ],
        1,
    )  # [run, whose needle, layer, head]
    n = len(runs)
    true = hits[torch.arange(n), torch.arange(n)].mean(0)
    null = (hits.sum((0, 1)) - true * n) / (n * (n - 1)) if n > 1 else torch.full_like(true, torch.nan)
    generator = torch.Generator().manual_seed(seed)
    reached = torch.zeros_like(true)
    for _ in range(DRAWS):
        deal = torch.randperm(n, generator=generator)
        reached += hits[torch.arange(n), deal].mean(0) >= true - 1e-6
    return null, (1 + reached) / (1 + DRAWS)


# --- the result ---------------------------------------------------------------------------------------


def _report(task: Task, runs: list[Run], counted: list[Run], mode: Mode, seed: int) -> Result:
    lacking = counted[0].top[0, 0] < 0  # [layer, head]: no such head
    by_mode = {
        name: torch.stack([_scores(one, name) for one in counted]).float().masked_fill(lacking, torch.nan)
        for name in ("set", "count")
    }  # each [run, 2, layer, head]
    scores = by_mode[mode][:, 0]
    _, low, high = maths.intervals(scores)
    null, p = (x.float().masked_fill(lacking, torch.nan) for x in _dealt(counted, seed))
    active = (scores > 0).float().masked_fill(lacking, torch.nan)
    mean = scores.mean(0)
    best, notes = held_out(scores, SCORE)
    found = (mean >= RULE) & ~lacking
    adjusted = maths.benjamini_hochberg(p)
    notes.append(
        f"{int(found.sum())} of {int((~lacking).sum())} heads score {RULE} or more, {int((found & (adjusted <= 0.05)).sum())} of "
        f"them clear of needles dealt to other runs (adjusted p <= 0.05); {sum(one.success for one in runs)} of {len(runs)} "
        f"runs named more than half of the needle" + ("; all are scored" if len(counted) == len(runs) else "")
    )
    values: dict[str, Any] = {
        "score": (mean, GRID, SCORE),
        "low": (low, GRID, SCORE),
        "high": (high, GRID, SCORE),
        "null": (null, GRID, SCORE),
        "p": (p, GRID, "probability"),
        "p_adjusted": (adjusted, GRID, "probability"),
        **{name: (by_mode[name][:, 0].mean(0), GRID, SCORE) for name in by_mode},
        "activation": (active.mean(0), GRID, SHARE),
        "without_first": (by_mode[mode][:, 1].mean(0), GRID, SCORE),
        "success": (sum(one.success for one in runs) / len(runs), (), SHARE),
        "n_runs": (float(len(counted)), (), "runs"),
        "retrieval_share": (found.sum() / (~lacking).sum(), (), "share of heads"),
        **best,
    }
    return Result(values, notes=notes, tables={"grid": _grid(task, runs, counted, scores, found)})


def _grid(task: Task, runs: list[Run], counted: list[Run], scores: Tensor, found: Tensor) -> list[dict[str, Any]]:
    """For every length and depth: runs, successes, and the mean score of the heads found, and of the best of them."""
    cells: dict[tuple[int, float | None], list[Run]] = {}
    for one in runs:
        cells.setdefault(_cell(task, one.index), []).append(one)
    place = {one.index: row for row, one in enumerate(counted)}
    rows = []
    for (length, depth), some in sorted(cells.items(), key=lambda item: (item[0][0], item[0][1] or 0.0)):
        which = [place[one.index] for one in some if one.index in place]
        values = scores[which][:, found].mean(0) if which and bool(found.any()) else torch.tensor([torch.nan])
        success = sum(one.success for one in some)
        row: dict[str, Any] = {"length": length, "depth": depth, "runs": len(some), "success": success}
        rows.append(row | {"mean_score": float(values.mean()), "best_score": float(values.max())})
    return rows


def _cell(task: Task, index: int) -> tuple[int, float | None]:
    """Length asked for (else the prompt's tokens) and depth to one digit (None where the task does not say)."""
    options = task.options
    if "joined" in options and "task" in task.labels:
        options = options["joined"][task.labels["task"][index]]["options"]
    length = options.get("length", len(task.clean[index]))
    depth = round(float(task.labels["depth"][index]), 1) if "depth" in task.labels else None
    return int(length), depth
