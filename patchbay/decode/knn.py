"""kNN language model: the model's law mixed with the tokens that followed the nearest states of a store.

    P(v) = l sum over the k nearest 1[value = v] softmax(-|query - key|^2 / temperature) + (1 - l) p(v)

and of P the likeliest token is taken. A key is a state inside the model at a position of a text, its value the token that came next: the
input of the last layer's MLP, `L-1.mlp.in`, in the paper; a store is a trace in a folder, which `pb.run(model, texts, taps=[...],
folder=...)` writes, and goes on with where it was stopped. Weight 0 is greedy text of the model, exactly. One pass for a token, and a look
through the store: "exact" compares with all keys, "cells(n, probes)" with those of the nearest cells, "faiss" as FAISS does it.

`logq` is the log-probability under the mixture and `score` its sum; `nearest` the probability that the neighbours alone give each token and
`distance` the squared distance of the nearest one. The table `neighbours` shows, for each new token, the context that was nearest.

Khandelwal et al. 2020, "Generalization through Memorization: Nearest Neighbor Language Models".

It says what stood in similar places. Where text gets likelier, `decode.knn_parts` tells by how much, by which tokens, and what simpler means do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, asked
from patchbay.decode._neighbours import Store, read_store
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

NEIGHBOURS = 1024  # the published ones


def mixture(logits: Tensor, near: Tensor, weight: float) -> Tensor:
    """log P [row, vocab] of logits and the neighbours' law; tokens that processors have barred stay so."""
    own = torch.log_softmax(logits.double(), -1)
    if weight == 0:
        return own
    near = near.masked_fill(own == -math.inf, 0.0)
    near = near / near.sum(-1, keepdim=True)
    mixed = torch.logaddexp(math.log(weight) + near.log(), own + (math.log1p(-weight) if weight < 1 else -math.inf))
    return torch.where(
        near.isnan().any(-1, keepdim=True), own, mixed
    )  # where none of the neighbours' tokens may be said


def decode(
    call: Call,
    *,
    store: Any,
    weight: float = 0.25,
    temperature: float = 1.0,
    neighbours: int | None = None,
    index: str = "exact",
    seen: dict[tuple[int, int], int] | None = None,
) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call. `seen`: filled with the place of the nearest key for each prompt and new token."""
    held = store if isinstance(store, Store) else read_store(store, call.model, call.edits)
    k = _checked(held, weight, temperature, neighbours)
    drafts = [[Draft()] for _ in call.prompts]
    for members in call.batches():
        with call.rows(members, taps=[held.port]) as rows:

            def run(tokens: Tensor | None, rows: Any = rows) -> tuple[Tensor, Tensor]:
                passed = rows.run(tokens)
                return passed.last, passed.taps[held.port][:, -1]

            def choose(ids: Tensor, logits: Tensor, queries: Tensor, rows: Any = rows) -> Chosen:
                apart, found = held.nearest(queries.cpu(), k, index)
                near = held.law(apart, found, temperature, logits.shape[-1]).to(logits.device)
                law = mixture(logits, near, weight)
                tokens = law.argmax(-1)
                if seen is not None:
                    step = ids.shape[1] - rows.start
                    closest = found.gather(1, apart.argmin(1, keepdim=True))[:, 0].tolist()
                    seen.update({(prompt, step): place for prompt, place in zip(rows.of, closest, strict=True)})
                said, given = (one.gather(1, tokens[:, None])[:, 0] for one in (law, near))
                return Chosen(tokens, said, said, {"nearest": given, "distance": apart.amin(1)})

            stepwise(call, rows, run, choose, drafts)
    return drafts


def _checked(store: Store, weight: float, temperature: float, neighbours: int | None) -> int:
    """How many neighbours; refuses what cannot be meant."""
    if not 0.0 <= weight <= 1.0:
        raise PatchbayError(f"weight={weight}: of the neighbours, from 0, the model alone, to 1")
    if not temperature > 0:
        raise PatchbayError(f"temperature={temperature}: above 0")
    k = min(NEIGHBOURS, len(store)) if neighbours is None else neighbours
    if not 1 <= k <= len(store):
        raise PatchbayError(f"neighbours={k}: from 1 to the {len(store)} keys of the store")
    return k


@method(paper="khandelwal2020")
def knn(
    model: Model,
    store: str | Any,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    weight: float = 0.25,
    temperature: float = 1.0,
    neighbours: int | None = None,
    index: str = "exact",
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued by the likeliest token of model and neighbours together, with `score` the sum of `logq` in nats.

    Beside it `nearest` and `distance` [prompt, draft, position], and the table `neighbours`. The rest as every decoder returns it. Texts
    end where the model's generation config says.

    `store`: the folder of a trace with one signal of the stream's width. `weight`: of the neighbours. `temperature`: of their distances, to be
    set beside the mean squared distance, which a model's width and scale decide. `neighbours`: how many are looked at, 1024 or the whole
    store where it is smaller. `index`: "exact", "cells(64, 8)" (cells, and those looked into), "faiss", "faiss('IVF64,Flat', 8)".
    """
    call = asked(model, prompts, max_new_tokens, None, batch_size)
    held = read_store(store, model, call.edits)
    seen: dict[tuple[int, int], int] = {}
    drafts = decode(
        call, store=held, weight=weight, temperature=temperature, neighbours=neighbours, index=index, seen=seen
    )
    result = as_result(call, drafts, units={"nearest": "probability", "distance": "squared distance"})
    result.tables["neighbours"] = [
        {
            "prompt": prompt,
            "position": step,
            "token": _said(model, [drafts[prompt][0].tokens[step]]),
            **_context(model, held, place),
        }
        for (prompt, step), place in sorted(seen.items())
    ]
    return result


def _context(model: Model, store: Store, place: int) -> dict[str, str]:
    before, value = store.context(place)
    return {"nearest context": _said(model, before), "its next token": _said(model, [value])}


def _said(model: Model, ids: list[int]) -> str:
    return " ".join(map(str, ids)) if model.tokenizer is None else str(model.tokenizer.decode(ids))


published(knn, decode)
