"""Jacobian lens: what a stream is disposed to make the model say later, by the mean Jacobian from that layer to the last.

    J[l] = mean over texts of (1 / |V|) sum over t in V, t' >= t in V of d h_last[t'] / d h_l[t]
    logits[layer, position] = unembed(final_norm(J[l] h_l))

V are a text's positions but the first `skip`, whose streams are unlike others, and the last. J of the last layer is I: its row is the model
itself. Where blocks are linear and look at no other token, J[l] is the product of (I + W) of the blocks that are left; J = I is the logit lens.
Cost: d_model backward passes for every text, once (`folder` keeps the lens); then one forward pass.

Beside it `agreement` [layer]: the cosine between the Jacobians of two halves of the texts, and `agreement_rest`, that of J - I, since the
stream carries its own I into both. Low ones say that more texts are needed.

Gurnee, Sofroniew, Lindsey et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models" (sums over targets, means over
sources, as in the code beside it).

Do not rank it by its divergence from the next token: it reads what will be said later, and by that measure the logit lens beats it at
middle layers. It is one linear map for all prompts: what depends on the prompt (attention, gates) is averaged away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.features.lens import JACOBIAN, Lens, depths, described, load, save, stream_ports
from patchbay.find._lens import of_one_length, read
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

KNOWN = "not to be ranked by kl: this lens reads what will be said later, not the next token (the logit lens can be nearer to that)"


@method(paper="gurnee2026", unit="probability")
def jacobian_lens(
    model: Model,
    task: Task | str,
    *,
    texts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    skip: int = 16,
    folder: str | None = None,
    answer: str | None = None,
    positions: int | None = None,
    batch_size: int = 8,
) -> Result:
    """The right answer's probability after each layer through mean Jacobians, at the last `positions` positions, mean over prompts.

    Variables and tables are those of `find.logit_lens`, with `agreement` and `agreement_rest` [layer] of the Jacobians where there are two texts
    or more.

    `task`: a task, or one text, which needs no answer. `texts`: what the Jacobians are means over. `skip`: positions at the start of each text that are
    left out. `folder`: where the lens is kept; one that lies there is read, and has to be of the same model, texts and `skip`. `answer`: of a
    text, a token whose `answer_probability`, `answer_logit` and `rank` are read beside it. `positions`: how many of the last positions are read.
    """
    lens = _lens(model, texts, skip, folder, batch_size)
    agreed = lens.made.get("agreement", {})
    more = {name: (torch.tensor(values, dtype=torch.float64), ("layer",), "cosine") for name, values in agreed.items()}
    notes = [KNOWN]
    if agreed:
        least = min(range(model.n_layers), key=lambda i: agreed["agreement"][i])
        notes.append(
            f"Jacobians of two halves of the {lens.made['texts']} texts agree least at {depths(model)[least]}: cosine "
            f"{agreed['agreement'][least]:.2f}, {agreed['agreement_rest'][least]:.2f} without the stream's own I"
        )
    return read(model, task, answer, positions, batch_size, lens, more, notes)


def _lens(model: Model, texts: Any, skip: int, folder: str | None, batch_size: int) -> Lens:
    """The lens of a folder, or of texts, which is then kept there."""
    lies = folder is not None and Path(folder).exists()
    if texts is None:
        if folder is None or not lies:
            raise PatchbayError("the lens is made of texts: give texts=[...], or folder= with a lens that was kept")
        return load(folder, model, JACOBIAN)
    encoded = model.encode(texts)
    request = hashlib.sha256(json.dumps([skip, encoded]).encode()).hexdigest()
    if folder is not None and lies:
        lens = load(folder, model, JACOBIAN)
        if lens.made.get("request") != request:
            raise PatchbayError(
                f"{folder} holds a lens of other texts or another skip: give another folder, or no texts"
            )
        return lens
    lens = _made(model, encoded, skip, batch_size, request)
    if folder is not None:
        save(lens, folder)
    return lens


def _made(model: Model, encoded: list[list[int]], skip: int, batch_size: int, request: str) -> Lens:
    """Mean Jacobians of the texts, and how far those of two halves of them agree."""
    if skip < 0:
        raise PatchbayError(f"skip={skip}: positions that are left out, 0 or more")
    long = [ids for ids in encoded if len(ids) > skip + 1]
    if not long:
        raise PatchbayError(
            f"no text has more than skip + 1 = {skip + 1} tokens (the longest has {max(map(len, encoded), default=0)}), so that no position is "
            "left: give longer texts, or skip=0"
        )
    halves = [part for part in (long[::2], long[1::2]) if part]
    sums = [_summed(model, half, skip, batch_size) for half in halves]
    weight = torch.stack(sums).sum(0) / len(long)
    made = described(model) | {"request": request, "texts": len(long), "skip": skip}
    if len(halves) == 2:
        one, two = (total / len(half) for total, half in zip(sums, halves, strict=True))
        eye = torch.eye(weight.shape[-1], dtype=weight.dtype)
        rest = maths.cosine((one - eye).flatten(1), (two - eye).flatten(1))
        made["agreement"] = {
            "agreement": [*maths.cosine(one.flatten(1), two.flatten(1)).tolist(), 1.0],
            "agreement_rest": [*rest.tolist(), 1.0],
        }
    return Lens(weight.float(), torch.zeros(weight.shape[:2]), adds=False, made=made)


def _summed(model: Model, texts: list[list[int]], skip: int, batch_size: int) -> Tensor:
    """Jacobians summed over texts, [row, d_model of the last stream, d_model], float64."""
    ports = stream_ports(model)
    d = model.d_model
    total = torch.zeros(model.n_layers, d, d, dtype=torch.float64)
    for rows in of_one_length(texts, batch_size):
        trace = run(model, rows, taps=ports, logits="last", grad=True)
        last = trace[ports[-1]]
        valid = slice(skip, last.shape[1] - 1)
        for i in range(d):
            with torch.enable_grad():
                target = last[:, valid, i].sum()
            for row, gradient in enumerate(trace.gradient(target, *ports[:-1])):
                total[row, i] += gradient[:, valid].double().mean(1).sum(0).cpu()
    return total
