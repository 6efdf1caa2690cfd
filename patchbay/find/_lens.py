"""Lenses: what the streams of all layers say once a map, if there is one, has put them in the last layer's terms.

Shared by the logit lens (no map), the tuned lens (learned maps) and the Jacobian lens (mean Jacobians): one reading, so that they differ
by the map alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.features.lens import Lens, depths, stream_ports
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

UNITS = {"probability": "probability", "logit": "logits", "rank": "rank", "kl": "nats", "logit_diff": "logits"}
UNITS |= {"token_id": "token id", "answer_probability": "probability", "answer_logit": "logits"}


def read(
    model: Model, task: Task | str, answer: str | None, positions: int | None, batch_size: int, lens: Lens | None = None,
    more: dict[str, Any] | None = None, notes: Sequence[str] = (),
) -> Result:  # fmt: skip
    """What the lens says after each layer at the last `positions` positions, of a task or of one text; `more`: variables beside."""
    if positions is not None and positions < 1:
        raise PatchbayError(f"positions={positions}: at least 1, the last")
    if not isinstance(task, Task):
        return _of_text(model, task, answer, positions, lens, more or {}, notes)
    if answer is not None:
        raise PatchbayError(f"answer={answer!r} is for a text; the task {task.name} has its own answers")
    task.check(model.vocab_size)
    n = min(positions or 8, *(len(ids) for ids in task.clean))
    rows = depths(model)
    sums: dict[str, Tensor] = {}
    best: list[dict[str, Any]] = []
    for start in range(0, len(task), batch_size):
        piece = task[start : start + batch_size]
        for row, said_here, said in _lenses(model, piece, n, lens):
            for name, values in _read(piece, said_here, said).items():
                sums.setdefault(name, torch.zeros(len(rows), n, dtype=torch.float64))[row] += values.sum(0)
            if start == 0:
                best += [{"layer": rows[row], **cell} for cell in _best(model, said_here[0])]
    return Result(
        {name: (total / len(task), ("layer", "position"), UNITS[name]) for name, total in sums.items()} | (more or {}),
        coords={"layer": rows, "position": list(range(-n, 0))},
        tables={"most_likely": best, "tokens": shared_tokens(model, task.clean, n)},
        notes=notes,
    )


def _of_text(
    model: Model, text: str, answer: str | None, positions: int | None, through: Lens | None, more: dict[str, Any],
    notes: Sequence[str],
) -> Result:  # fmt: skip
    """The most likely token in every cell of one prompt, and where an answer stands there."""
    encoded = model.encode(text)
    n = min(positions or len(encoded[0]), len(encoded[0]))
    right = None if answer is None else torch.tensor([model.token_id(answer)])
    rows, cells = depths(model), []
    found: dict[str, list[Tensor]] = {}
    for row, lens, said in _lenses(model, encoded, n, through):
        best = _best(model, lens[0])
        cells += [{"layer": rows[row], **cell} for cell in best]
        read = {
            "probability": torch.tensor([cell["probability"] for cell in best], dtype=torch.float64),
            "token_id": torch.tensor([cell["token"] for cell in best]),
            "kl": maths.kl(said[0], lens[0]),
        }
        if right is not None:
            ids = right.to(lens.device).expand(n)
            read |= {"answer_probability": maths.probability(lens[0], ids), "rank": maths.rank(lens[0], ids),
                     "answer_logit": lens[0].gather(1, ids[:, None])[:, 0]}  # fmt: skip
        for name, values in read.items():
            found.setdefault(name, []).append(values.detach().cpu() if name == "token_id" else values.double().cpu())
    return Result(
        {name: (torch.stack(values), ("layer", "position"), UNITS[name]) for name, values in found.items()} | more,
        coords={"layer": rows, "position": list(range(-n, 0))},
        tables={"cells": cells, "tokens": shared_tokens(model, encoded, n)},
        notes=notes,
    )


def _lenses(model: Model, prompts: Any, n: int, lens: Lens | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each row its number, the lens logits [prompt, n, vocab], and what the model itself says there, which is the last
    row where no edits are in force."""
    taps = stream_ports(model)
    trace = run(model, prompts, taps=taps)
    said = _tail(trace.logits, trace, n)
    for row, port in enumerate(taps):
        if row == len(taps) - 1 and not model.active_edits():
            yield row, said, said
            continue
        with torch.no_grad():  # forward, not a call: edits of an enclosing `edited` block belong to runs of the model
            state = _tail(trace[port], trace, n)
            yield row, unembedded(model, state if lens is None else lens(row, state)), said


def unembedded(model: Model, state: Tensor) -> Tensor:
    """Logits of a stream [..., d_model] as if it were the last layer's."""
    return model.unembed_logits(model.final_norm_module.forward(state))


def of_one_length(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[list[int]]]:
    """Prompts in batches that all have one length: a gradient of one depends on no other then, whatever the family."""
    return [[list(prompts[i]) for i in rows] for rows in by_length(prompts, batch_size)]


def shared_tokens(model: Model, rows: Sequence[Sequence[int]], n: int) -> list[dict[str, Any]]:
    """The token at each of the last n positions, where all prompts have the same."""
    places = range(-n, 0)
    shared = {place: {ids[place] for ids in rows} for place in places}
    text = {
        place: model.decode([*ids]) if model.tokenizer is not None else str(*ids)
        for place, ids in shared.items()
        if len(ids) == 1
    }
    return [{"position": place, "token": text[place]} for place in places if place in text]


def _tail(signal: Tensor, trace: Trace, n: int) -> Tensor:
    """The last `n` positions of each prompt: [prompt, position, ...] -> [prompt, n, ...]."""
    place = trace.lengths[:, None] - n + torch.arange(n)  # [prompt, n]
    return signal[torch.arange(len(signal))[:, None], place.to(signal.device)]


def _read(task: Task, lens: Tensor, said: Tensor) -> dict[str, Tensor]:
    """The readings of lens logits [prompt, position, vocab], each [prompt, position] in float64."""
    shape, flat = lens.shape[:2], lens.flatten(0, 1)  # [prompt * position, vocab]
    right = torch.tensor(task.right, device=lens.device).repeat_interleave(shape[1])
    found = {
        "probability": maths.probability(flat, right),
        "logit": flat.gather(1, right[:, None])[:, 0],
        "rank": maths.rank(flat, right),
        "kl": maths.kl(said.flatten(0, 1), flat),
    }
    if all(task.wrong):
        widest = max(map(len, task.wrong))
        wrong = torch.tensor([ids + (-1,) * (widest - len(ids)) for ids in task.wrong], device=lens.device)
        found["logit_diff"] = maths.logit_diff(flat, right, wrong.repeat_interleave(shape[1], 0))
    return {name: values.double().cpu().reshape(shape) for name, values in found.items()}


def _best(model: Model, lens: Tensor) -> list[dict[str, Any]]:
    """The most likely token at each position of lens logits [position, vocab]."""
    likely, tokens = lens.float().softmax(-1).max(-1)
    cells = []
    for place, (token, probability) in enumerate(zip(tokens.tolist(), likely.tolist(), strict=True), start=-len(lens)):
        text = model.decode([token]) if model.tokenizer is not None else str(token)
        cells.append({"position": place, "token": token, "text": text, "probability": probability})
    return cells
