"""What `interchange` and `fit_mechanisms` share: candidates and their roles, runs with a twin's stream put in at one token.

A depth is an index: d < n_layers is the stream entering block d, n_layers is the stream that leaves the last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import batches, check_twins
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

MECHANISMS = ("positional", "lexical", "reflexive")
ROLES = (*MECHANISMS, "asked")


class Candidates(NamedTuple):
    """The tokens that may be the answer, in the order of their pairs [prompt, token], and the place of each role [prompt]."""

    ids: Tensor
    places: dict[str, Tensor]


def candidates(model: Model, task: Task) -> Candidates:
    """The candidates and roles of a task, or PatchbayError that says what the task lacks."""
    check_twins(model, task)
    missing = [role for role in ROLES if role not in task.labels]
    if missing:
        raise PatchbayError(
            f"task {task.name} lacks the labels {', '.join(missing)}, places among the candidates (found: "
            f"{', '.join(task.labels) or 'none'}); tasks.binding_counterfactuals makes such a task, or label your own"
        )
    counts = sorted({1 + len(wrong) for wrong in task.wrong})
    if len(counts) > 1 or counts[0] < 4:
        raise PatchbayError(
            f"task {task.name} has {' or '.join(map(str, counts))} candidates (right and wrong answers); interchange needs "
            "the same number for every prompt, 4 or more, so that each role has its own"
        )
    places = {role: torch.tensor([int(place) for place in task.labels[role]]) for role in ROLES}
    for i in range(len(task)):
        here = [int(places[role][i]) for role in ROLES]
        if len(set(here)) < 4 or not all(0 <= place < counts[0] for place in here):
            raise PatchbayError(
                f"task {task.name}, prompt {i}: {', '.join(f'{r} {p}' for r, p in zip(ROLES, here, strict=True))}; the four "
                f"are different places among 0..{counts[0] - 1}, or an outcome would not tell them apart"
            )
    asked = places["asked"].tolist()
    rows = [[*w[:q], right, *w[q:]] for right, w, q in zip(task.right, task.wrong, asked, strict=True)]
    return Candidates(torch.tensor(rows), places)


def depths_of(model: Model, layers: Sequence[int] | None) -> list[int]:
    """The depths asked for, each once and in order; all of them by default."""
    every = list(range(model.n_layers + 1))
    if layers is None:
        return every
    if not layers or any(layer not in every for layer in layers):
        raise PatchbayError(
            f"layers={list(layers)}: possible are 0 to {model.n_layers}: the stream entering a block, and {model.n_layers} "
            "for the stream that leaves the last one"
        )
    return sorted(set(layers))


def _port(model: Model, depth: int) -> Port:
    return Port("resid_in", depth) if depth < model.n_layers else Port("resid_out", model.n_layers - 1)


def places_at(task: Task, at: str) -> list[int]:
    """The position of the patched token in every prompt, and in its twin: the last one, or the only one of the mark `at`."""
    if at == "last":
        return [len(ids) - 1 for ids in task.clean]
    marks = task.marks.get(at)
    if marks is None or any(len(places) != 1 for places in marks) or not task.options.get("aligned", True):
        single = [name for name, groups in task.marks.items() if all(len(places) == 1 for places in groups)]
        found = (
            "no mark of that name" if marks is None else "not one position of a twin of equal length in every prompt"
        )
        raise PatchbayError(f"at={at!r}: task {task.name} has {found}; possible: {', '.join(['last', *single])}")
    return [places[0] for places in marks]


def twin_streams(model: Model, task: Task, depths: Sequence[int], batch_size: int, at: str = "last") -> Tensor:
    """The stream of every twin at its last position, or at the mark `at`, [depth, prompt, d_model]."""
    here = places_at(task, at)
    ports = [_port(model, depth) for depth in depths]
    streams = torch.zeros(len(depths), len(task), model.d_model, dtype=model.dtype)
    for prompts in batches(task, batch_size):
        trace = run(model, [list((task.corrupted or ())[i]) for i in prompts], taps=ports, logits="last")
        for row, port in enumerate(ports):
            streams[row, prompts] = trace[port][range(len(prompts)), [here[i] for i in prompts]].cpu()
    return streams


def clean_distribution(model: Model, task: Task, found: Candidates, batch_size: int) -> Tensor:
    """Probability of each candidate among the candidates, nothing patched, float64 [prompt, token]."""
    out = torch.zeros(found.ids.shape, dtype=torch.float64)
    for prompts in batches(task, batch_size):
        logits = run(model, [list(task.clean[i]) for i in prompts], logits="last").last_logits
        out[prompts] = _among(logits, found.ids[prompts])
    return out


def distributions(
    model: Model,
    task: Task,
    found: Candidates,
    depths: Sequence[int],
    streams: Tensor,
    batch_size: int,
    at: str = "last",
) -> Tensor:
    """The same with `streams` [depth, prompt, d_model] put in at that position, float64 [depth, prompt, token]."""
    here = torch.tensor(places_at(task, at))
    out = torch.zeros(len(depths), *found.ids.shape, dtype=torch.float64)
    for prompts in batches(task, batch_size):
        clean = [list(task.clean[i]) for i in prompts]
        put_at = torch.nn.functional.one_hot(here[prompts], max(map(len, clean))).bool()  # [prompt, position]
        for row, depth in enumerate(depths):
            put = edit.replace(_port(model, depth), streams[row, prompts][:, None], positions=put_at)
            out[row, prompts] = _among(run(model, clean, edits=[put], logits="last").last_logits, found.ids[prompts])
    return out


def _among(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.cpu().double().gather(1, ids).softmax(-1)  # [prompt, token]
