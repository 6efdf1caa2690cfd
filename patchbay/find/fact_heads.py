"""Fact heads: attention heads that tip a contradicted fact towards what the text says, or towards what the model remembers.

Of facts in context (`pb.tasks.facts_in_context`) the right answer is what the text says, the wrong one what the model remembers.
For each head,

    attribution = mean over prompts of z[last] W_O . (U[stated] - U[remembered]), the final norm frozen      one forward pass
    slope       = d rate / d alpha, rate the share of prompts answered with the stated fact,
                  alpha the number that the head's z (that is, its value vectors) is multiplied by at all positions

`slope` is the least-squares slope over `strengths`, prompt by prompt, with 95 % bootstraps over prompts; `memory_slope` is the
same of the share answered with the remembered fact. p by sign flips, adjusted over all heads and both slopes. **A head is
labelled by these alone**: 1 (context) where its slope is positive at adjusted p <= 0.05 and the larger of the two, -1 (memory)
where its memory slope is, 0 elsewhere. Attribution sees direct effects only; early heads work through later ones and can
have the wrong sign: `disagreements` counts the labelled heads whose attribution points the other way. Cost beside the
attribution: one restarted run for every head and strength but 1.

Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models".

Where heads stand in for one another no single slope is large. Of grouped queries only the one head's reading of the values is
scaled, not the group's. What a knob on a head does to other text is for `measure.dose_response` to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.find._attention import GRID, held_out
from patchbay.find.direct_logit_attribution import direct_logit_attribution
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.sweeps.sweep import sweep
from patchbay.tasks.task import Task

SLOPE = "share of prompts per unit"
SHARE = "share of prompts"
LABEL = "1 context, -1 memory"


@method(paper="yu2023", unit="share of prompts per unit")
def fact_heads(
    model: Model,
    task: Task,
    *,
    strengths: list[float] | tuple[float, ...] = (0.0, 1.0, 2.0),
    batch_size: int = 32,
) -> Result:
    """How the shares of stated and remembered answers move with each head's strength, and its direct attribution.

    Main variable `slope` (of the stated) with `low`, `high`, `p_adjusted`; `memory_slope`, `memory_p_adjusted`, `label`,
    `attribution`, `attribution_error`; `stated` and `remembered` [layer, head, strength] are the shares themselves, and
    `stated_without`, `remembered_without` those of the model as it is; `disagreements`, `held_out`. The table `labels` names the
    labelled heads.

    `strengths`: what each head's output is multiplied by in turn; 1 leaves it as it is.
    """
    steps = _steps(model, task, strengths, batch_size)
    direct = direct_logit_attribution(model, task, batch_size=batch_size)
    heads = [
        Part(i, "head", h)
        for i in range(model.n_layers)
        if "attn.z" in model.signals(i)
        for h in range(model.n_heads(i))
    ]
    said, plain = _answers(model, task, heads, steps)  # [prompt, layer, head, strength, 2], [prompt, 2]
    return _report(heads, steps, said, plain, direct)


def _steps(model: Model, task: Task, strengths: Sequence[float], batch_size: int) -> list[float]:
    if not any("attn.z" in model.signals(i) for i in range(model.n_layers)):
        model.require(Port("attn.z", 0))  # raises: no layer has it
    task.check(model.vocab_size)
    steps = [float(step) for step in strengths]
    if len(set(steps)) < 2 or len(set(steps)) < len(steps) or not all(map(math.isfinite, steps)):
        raise PatchbayError(f"strengths={list(strengths)}: two or more different numbers, to take a slope over")
    lacking = next((i for i, ids in enumerate(task.wrong) if not ids), None)
    if lacking is not None:
        raise PatchbayError(
            f"fact_heads: prompt {lacking} of task {task.name} has no wrong answer, which stands for what is remembered; possible: "
            "pb.tasks.facts_in_context(model), or a Task with one"
        )
    return steps


def _answers(model: Model, task: Task, heads: list[Part], steps: list[float]) -> tuple[Tensor, Tensor]:
    """1 where the stated (first) or the remembered fact (second) is the likeliest token, each head at each strength and as it is."""
    right = torch.tensor(task.right)
    widest = max(map(len, task.wrong))
    wrong = torch.tensor([ids + (-1,) * (widest - len(ids)) for ids in task.wrong])

    def kind(logits: Tensor, prompt: Tensor) -> Tensor:
        """0 another token, 1 stated, 2 remembered."""
        top = logits.argmax(-1).cpu()
        return (top == right[prompt]).float() + 2.0 * (top[:, None] == wrong[prompt]).any(1).float()

    turned = [step for step in steps if step != 1.0]
    cells = [edit.scale(head.port(), step) for head in heads for step in turned]
    seen = sweep(model, task, cells, kind)
    base = seen["base"]  # [prompt]
    kinds = seen["value"].T.unflatten(1, (len(heads), len(turned)))  # [prompt, head, turned]
    every = [kinds[..., turned.index(s)] if s in turned else base[:, None].expand(-1, len(heads)) for s in steps]
    found = torch.stack(every, 2)  # [prompt, head, strength]
    both = torch.stack([found == 1.0, found == 2.0], -1).float()
    n_layers, widest_layer = model.n_layers, 1 + max(head.index or 0 for head in heads)
    grid = torch.full((len(task), n_layers, widest_layer, len(steps), 2), torch.nan)
    for i, head in enumerate(heads):
        grid[:, head.layer or 0, head.index or 0] = both[:, i]
    return grid, torch.stack([base == 1.0, base == 2.0], -1).float()


def _report(heads: list[Part], steps: list[float], said: Tensor, plain: Tensor, direct: Result) -> Result:
    alpha = torch.tensor(steps) - sum(steps) / len(steps)
    slopes = (
        torch.einsum("plhsk,s->plhk", said, alpha) / alpha.square().sum()
    )  # [prompt, layer, head, stated or remembered]
    mean, low, high = maths.intervals(slopes)
    adjusted = maths.benjamini_hochberg(maths.sign_flip_p(slopes, floor=1e-6))
    clear = (adjusted <= 0.05) & (mean > 0)
    context = clear[..., 0] & (mean[..., 0] > mean[..., 1])
    memory = clear[..., 1] & (mean[..., 1] > mean[..., 0])
    label = (context.double() - memory.double()).where(mean[..., 0].isfinite(), torch.nan)
    attribution = direct["attribution"]
    against = [p for p in heads if label[p.layer, p.index] * attribution[p.layer, p.index] < 0]
    best, notes = held_out(slopes[..., 0], SLOPE)
    named = {
        kind: [p for p in heads if label[p.layer, p.index] == sign] for kind, sign in (("context", 1), ("memory", -1))
    }
    if maths.clear(adjusted):
        notes += [f"{kind} heads: {', '.join(map(str, some)) or 'none'}" for kind, some in named.items()]
    else:
        notes.append("no head is labelled: labels go by p over prompts, and this is one; read the slopes")
    if against:
        notes.append(f"attribution points the other way for {', '.join(map(str, against))}: labels are by slope")
    rows = [
        {
            "part": str(p),
            "label": kind,
            "slope": float(mean[p.layer, p.index, 0]),
            "memory_slope": float(mean[p.layer, p.index, 1]),
            "attribution": float(attribution[p.layer, p.index]),
        }
        for kind, some in named.items()
        for p in some
    ]
    curves = (*GRID, "strength")
    values: dict[str, Any] = {
        "slope": (mean[..., 0], GRID, SLOPE),
        "low": (low[..., 0], GRID, SLOPE),
        "high": (high[..., 0], GRID, SLOPE),
        "p_adjusted": (adjusted[..., 0], GRID, "probability"),
        "memory_slope": (mean[..., 1], GRID, SLOPE),
        "memory_p_adjusted": (adjusted[..., 1], GRID, "probability"),
        "label": (label, GRID, LABEL),
        "attribution": (attribution, GRID, "logits"),
        "attribution_error": (direct["standard_error"], GRID, "logits"),
        "stated": (said[..., 0].mean(0), curves, SHARE),
        "remembered": (said[..., 1].mean(0), curves, SHARE),
        "stated_without": (plain[:, 0].mean(), (), SHARE),
        "remembered_without": (plain[:, 1].mean(), (), SHARE),
        "disagreements": (float(len(against)), (), "heads"),
        **best,
    }
    return Result(
        values,
        coords={"strength": steps},
        notes=notes,
        highlights=[p for some in named.values() for p in some],
        tables={"labels": rows} if rows else {},
    )
