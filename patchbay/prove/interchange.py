"""Interchange: what a token's stream holds of what was asked, depth by depth: a place, a key, or the answer.

Each prompt has a counterfactual twin over the same pairs in which place, key and answer point at three different pairs
(see `tasks.binding_counterfactuals`). The stream of the twin's last token, entering block d, is put into the clean run,
which goes on from there; the candidate that then has the highest logit is the outcome:

    positional   the clean answer at the place that the twin asks about       (the stream held a place)
    lexical      the clean answer of the key that the twin asks with          (it held the key)
    reflexive    the answer of the twin, wherever that stands in the clean prompt (it held a pointer to it, or itself)
    none         still the clean answer                                       (what was patched did not matter yet)
    other        any other candidate

`share` counts them, with 95 % bootstraps over prompts; `probability` is the mean probability of the same candidates,
the softmax taken over the candidates alone. Control: the same patch with the stream of another prompt's twin, drawn at
random; `p` flips the signs of the paired differences from it, `p_adjusted` holds the share of false finds over all
depths and mechanisms. Entering block 0 the last token's stream is its embedding, the same word in both: everything is
"none"; after the last block it is all there is, and the outcome is the twin's own answer. Cost: 2 + 2 x (number of
depths) forward passes.

`at` names another token by its mark. A shallow model may look the pair up at the word that is asked with, and bring only the
answer to the end: then the last token holds nothing before it holds the answer, and `at="query"`, the question's key,
shows how. There the embedding is the key itself, so entering block 0 the outcome is "lexical" in a model that uses it.

Gur-Arieh, Geva and Geiger 2025, "Mixing Mechanisms: How Language Models Retrieve Bound Entities In-Context". It
shows what the later blocks make of the stream, not which parts wrote it; where shares are mixed, `prove.fit_mechanisms`
fits how the mechanisms add up.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.prove._cells import intervals, p_values
from patchbay.prove._interchanged import (
    MECHANISMS,
    ROLES,
    Candidates,
    candidates,
    clean_distribution,
    depths_of,
    distributions,
    twin_streams,
)
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.tasks.task import Task

OUTCOMES = (*MECHANISMS, "none", "other")


@method(paper="gurarieh2025")
def interchange(
    model: Model,
    task: Task,
    *,
    layers: list[int] | None = None,
    at: str = "last",
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """The share of each outcome when the twin's stream at one token is put into the clean run, depth by depth.

    `at`: the last token, or a mark of one token, such as "query". `layers`: only these depths; d is the stream entering block d, and the number of layers means the stream that leaves
    the last block. Main variable `share` [layer, condition] with `low`, `high`, `control` (a random twin's stream), `p`
    and `p_adjusted`; `probability`; `base` [condition], nothing patched; `distribution` [layer, prompt, token] over the
    candidates and `clean_distribution`; and each role's place [prompt].
    """
    found, depths = candidates(model, task), depths_of(model, layers)
    streams = twin_streams(model, task, depths, batch_size, at)
    own = distributions(model, task, found, depths, streams, batch_size, at)
    clean = clean_distribution(model, task, found, batch_size)
    hits, probability = _outcomes(own, found)  # [depth, prompt, condition]
    share, low, high = intervals(hits.transpose(0, 1))
    grid, size = ("layer", "condition"), (len(depths), len(OUTCOMES))
    control, p, adjusted = (torch.full(size, torch.nan, dtype=torch.float64) for _ in range(3))
    if len(task) > 1:
        other = distributions(model, task, found, depths, streams[:, _others(len(task), seed)], batch_size, at)
        random_hits = _outcomes(other, found)[0]
        control = random_hits.mean(1)
        n = len(MECHANISMS)
        p[:, :n], adjusted[:, :n] = p_values((hits - random_hits)[..., :n].transpose(0, 1), 0.0)
    base = _outcomes(clean[None], found)[0].mean(1)[0]
    return Result(
        {
            "share": (share, grid, "share of prompts"),
            "low": (low, grid, "share of prompts"),
            "high": (high, grid, "share of prompts"),
            "control": (control, grid, "share of prompts"),
            "p": (p, grid, "probability"),
            "p_adjusted": (adjusted, grid, "probability"),
            "probability": (probability.mean(1), grid, "probability"),
            "base": (base, ("condition",), "share of prompts"),
            "distribution": (own, ("layer", "prompt", "token"), "probability"),
            "clean_distribution": (clean, ("prompt", "token"), "probability"),
            **{role: (found.places[role], ("prompt",), "place") for role in ROLES},
        },
        coords={"layer": depths, "condition": OUTCOMES},
        notes=_notes(depths, share, low, high, control, adjusted, base),
    )


def _outcomes(distribution: Tensor, found: Candidates) -> tuple[Tensor, Tensor]:
    """1 for the outcome and 0 for the others, and the probability of each, [depth, prompt, condition]."""
    places = torch.stack([found.places[role] for role in ROLES], -1)  # [prompt, role]; "asked" is the outcome "none"
    top = distribution.argmax(-1)[..., None]  # [depth, prompt, 1]
    hits = (top == places).double()
    probability = distribution.gather(-1, places.expand(len(distribution), -1, -1))
    return tuple(torch.cat([x, (1.0 - x.sum(-1, keepdim=True)).clamp_min(0.0)], -1) for x in (hits, probability))  # type: ignore[return-value]


def _others(n: int, seed: int) -> list[int]:
    """For each prompt another one, drawn from the seed; none is its own."""
    order = list(range(n))
    random.Random(f"interchange-{seed}").shuffle(order)
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [after[i] for i in range(n)]


def _notes(
    depths: list[int], share: Tensor, low: Tensor, high: Tensor, control: Tensor, adjusted: Tensor, base: Tensor
) -> list[str]:
    notes = []
    for m, name in enumerate(MECHANISMS):
        clear = [i for i in range(len(depths)) if adjusted[i, m] <= 0.05 and share[i, m] > control[i, m]]
        if clear:
            best = clear[int(share[clear, m].argmax())]
            notes.append(
                f"{name}: clear of random twins entering {', '.join(str(depths[i]) for i in clear)}; most at {depths[best]}, "
                f"{share[best, m]:.2f} ({low[best, m]:.2f} to {high[best, m]:.2f}) against {control[best, m]:.2f}"
            )
    if not notes and bool((~adjusted.isnan()).any()):  # one prompt has no p
        notes.append("no mechanism is clear of random twins at any depth (Benjamini-Hochberg, 0.05)")
    right = float(base[OUTCOMES.index("none")])
    if right < 0.9:
        notes.append(f"unpatched, only {right:.2f} of the prompts are answered right among their candidates")
    return notes
