"""Importance: what `head_importance` and `neuron_importance` share, the true loss increase and its agreement with a score."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.find._chance import rank_agreement, standard_error
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.arrays import on_grid
from patchbay.signal.port import Part, PatchbayError


def texts(model: Model, prompts: Any, what: str) -> list[list[int]]:
    """Token ids of prompts that have a next token to be right about."""
    encoded = model.encode(prompts)
    short = next((i for i, ids in enumerate(encoded) if len(ids) < 2), None)
    if short is not None:
        raise PatchbayError(f"{what}: prompt {short} has one token; the loss needs a next one, so 2 or more")
    return encoded


def token_mean(signal: Tensor, lengths: Tensor) -> Tensor:
    """[prompt, position, ...] as each prompt's mean over its own positions, [prompt, ...] in float64."""
    real = (torch.arange(signal.shape[1]) < lengths[:, None]).to(signal.device)
    real = real.reshape(*real.shape, *[1] * (signal.ndim - 2))
    return (signal.double().masked_fill(~real, 0.0).sum(1) / real.sum(1)).cpu()


def losses(trace: Trace) -> Tensor:
    """Mean loss of each prompt's next tokens, [prompt], in nats per token."""
    said = trace.logits[:, :-1].float().log_softmax(-1)  # [prompt, position, vocab]
    found = said.gather(2, trace.ids[:, 1:, None].to(said.device))[..., 0].double()
    real = (torch.arange(1, trace.ids.shape[1]) < trace.lengths[:, None]).to(found.device)
    return (-found.masked_fill(~real, 0.0).sum(1) / real.sum(1)).cpu()


def increases(model: Model, prompts: list[list[int]], parts: list[Part], batch_size: int) -> tuple[Tensor, Tensor]:
    """How much the loss rises when each part alone is set to 0, [prompt, part], and the loss as it is, [prompt]."""
    base = torch.cat([losses(run(model, prompts[i : i + batch_size])) for i in range(0, len(prompts), batch_size)])
    risen = torch.zeros(len(prompts), len(parts), dtype=torch.float64)
    cells = [(i, at) for i in range(len(prompts)) for at in range(len(parts))]
    for start in range(0, len(cells), 4 * batch_size):
        some = cells[start : start + 4 * batch_size]
        rows: dict[int, list[int]] = {}
        for row, (_, at) in enumerate(some):
            rows.setdefault(at, []).append(row)
        edits = [edit.zero(parts[at].port(), rows=which) for at, which in rows.items()]
        loss = losses(run(model, [prompts[i] for i, _ in some], edits=edits))
        places = torch.tensor(some)
        risen[places[:, 0], places[:, 1]] = loss - base[places[:, 0]]
    return risen, base


def drawn(parts: list[Part], n: int, seed: int) -> list[Part]:
    """All parts, or `n` random ones of them, in order."""
    if len(parts) <= n:
        return parts
    return sorted(random.Random(f"importance-{seed}").sample(parts, n))


def removals(
    model: Model,
    prompts: list[list[int]],
    parts: list[Part],
    scores: dict[str, Tensor],
    n: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """What the removal of `n` of the parts costs, placed on the grid of the scores [prompt, layer, index], and how each score agrees
    with it: variables, and a note.
    """
    n_layers, width = next(iter(scores.values())).shape[1:]
    parts = drawn(parts, n, seed)
    risen, base = increases(model, prompts, parts, batch_size)
    axes = ("layer", parts[0].kind)
    values: dict[str, Any] = {
        "loss_increase": (on_grid(parts, risen.mean(0), n_layers, width), axes, "nats"),
        "loss_error": (on_grid(parts, standard_error(risen), n_layers, width), axes, "nats"),
        "loss": (base.mean(), (), "nats"),
    }
    found, notes = agreement(scores, risen, parts, seed)
    return values | found, notes


def agreement(
    scores: dict[str, Tensor], risen: Tensor, parts: list[Part], seed: int
) -> tuple[dict[str, tuple[float, tuple[()], str]], list[str]]:
    """Spearman of each score [prompt, layer, index] with the loss increase [prompt, part], as scalar variables, and a line
    that says it. Prompts are drawn anew, score and increase together.
    """
    place = torch.tensor([[part.layer or 0, part.index or 0] for part in parts]).T
    variables: dict[str, tuple[float, tuple[()], str]] = {}
    said = []
    for name, score in scores.items():
        found = rank_agreement(score[:, place[0], place[1]], risen, seed=seed)
        prefix = "spearman" if not variables else f"spearman_{name}"
        names = {"rho": prefix, "low": f"{prefix}_low", "high": f"{prefix}_high", "p": f"{prefix}_p"}
        names["null_high"] = f"{prefix}_null_high"
        units = {"p": "probability"}
        variables |= {label: (found[key], (), units.get(key, "correlation")) for key, label in names.items()}
        said.append(
            f"{name} {found['rho']:.2f}{maths.between(found['low'], found['high'], '.2f')} (p {found['p']:.2g}; "
            f"random order {found['null_high']:.2f} at its 95th percentile)"
        )
    return variables, [f"Spearman with the true loss increase over {len(parts)} parts: {'; '.join(said)}"]
