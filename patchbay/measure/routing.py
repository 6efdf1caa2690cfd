"""Routing: how much is gained by sending each text to the one of two models that is expected to do best on it.

    value = (best single - router) / (best single - oracle),    each the mean cost over texts, cost = nats per byte + `size_weight` x size

The router predicts both models' costs by ridge from the first model's mean state over the text, each fifth of the texts from the other four. The
oracle takes the better one every time. 1: as good as the oracle; 0: no better than always taking the better model; below 0: worse. `null`: a coin; p by sign
flips of what the router gains over the best single model, text by text. Size is parameters over those of the larger model. Two forward passes.

Hari and Thomson 2023, "Tryage: Real-time, intelligent Routing of User Prompts to Large Language Models". Higher is better. Two models that are alike in what they find hard
leave nothing to route: see `oracle` beside `single`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._runs import refuse_by_row
from patchbay.measure._texts import given_texts, losses, whole_texts
from patchbay.model.model import Model
from patchbay.model.states import depth, mean_states
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

FOLDS = 5
COST = "nats per byte"


@method(paper="hari2023")
def routing(
    model: Model,
    items: Items,
    other: Model,
    *,
    size_weight: float = 0.0,
    ridge: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """The share of the oracle's gain over the better model that a router on states makes.

    `single`, `oracle`, `random` and `router`, mean costs; `picked`, how often the router takes the better model, and `single_best`, how often the better model
    on average is; `cost` and `cost_other` [prompt].

    `items`: texts with a tokenizer that both models have, or of their own. `other`: the second model. `size_weight`: what the size of the larger model
    costs, in nats per byte. `ridge`: of the router, on states of spread 1.
    """
    texts, names, _, said = given_texts(resolved(model, items))
    if len(texts) < 2 * FOLDS or not ridge > 0 or not all(isinstance(text, str) for text in texts):
        raise PatchbayError(
            f"{len(texts)} items: {2 * FOLDS} texts or more, as text (models may have other tokens); ridge={ridge} is above 0"
        )
    refuse_by_row(model)
    sizes = [float(sum(p.numel() for p in one.hf.parameters())) for one in (model, other)]
    columns = []
    for one, size in zip((model, other), sizes, strict=True):
        read = whole_texts(one, texts, names)
        nats = torch.stack([loss.sum() for loss in losses(one, read, batch_size=batch_size)])
        n_bytes = torch.tensor([float(each.n_bytes or 0) for each in read], dtype=torch.float64)  # of what is scored
        columns.append(nats / n_bytes + size_weight * size / max(sizes))
    cost = torch.stack(columns, 1)  # [text, model]
    port = depth(model, "resid_out")[1][-1]
    states = mean_states(model, model.encode(list(texts)), [port], batch_size)[0]
    chosen = routed(states, cost, ridge, seed)
    single = cost[:, int(cost.mean(0).argmin())]
    router, oracle = cost.gather(1, chosen[:, None])[:, 0], cost.amin(1)
    means = {"single": single, "router": router, "oracle": oracle, "random": cost.mean(1)}
    possible = float((single - oracle).sum())
    best = cost.argmin(1)
    more: dict[str, Any] = {name: (values.mean(), (), COST) for name, values in means.items()}
    more |= {
        "picked": ((chosen == best).double().mean(), (), "share of texts"),
        "single_best": ((best == int(cost.mean(0).argmin())).double().mean(), (), "share of texts"),
        "cost": (cost[:, 0], ("prompt",), COST),
        "cost_other": (cost[:, 1], ("prompt",), COST),
    }
    notes = [] if possible else ["one model is better on every text: there is nothing to gain, and no value"]
    return reading(
        {"gained": single - router, "possible": single - oracle},
        "share of the oracle's gain",
        better="higher",
        made="ratio",
        null=float((single - cost.mean(1)).sum()) / possible if possible else None,
        p=float(maths.sign_flip_p((single - router)[:, None], seed=seed)[0]) if possible else None,
        more=more,
        units={"gained": COST, "possible": COST},
        notes=[*said, *notes, f"costs of {model.source or 'the model'} and {other.source or 'the other'}"],
        seed=seed,
    )


def routed(states: Tensor, cost: Tensor, ridge: float, seed: int) -> Tensor:
    """The model of least predicted cost for each text, [text]; no text is predicted by a fit that saw it."""
    order = torch.randperm(len(cost), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(cost), dtype=torch.long)
    for fold in order.tensor_split(FOLDS):
        seen = torch.ones(len(cost), dtype=torch.bool)
        seen[fold] = False
        x, y = states[seen], cost[seen]
        spread = x.std(0, correction=0).clamp_min(1e-12)
        z, mean = (x - x.mean(0)) / spread, y.mean(0)
        fit = torch.linalg.solve(z.T @ z / len(z) + ridge * torch.eye(z.shape[1], dtype=torch.float64), z.T @ (y - mean) / len(z))  # fmt: skip
        chosen[fold] = (mean + (states[fold] - x.mean(0)) / spread @ fit).argmin(1)
    return chosen
