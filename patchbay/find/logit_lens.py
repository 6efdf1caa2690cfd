"""Logit lens: what the stream would answer if the model stopped at each layer.

    logits[layer, position] = unembed(final_norm(stream after that layer))

read as the answer's probability, logit and rank, and as the divergence KL(model || lens) in nats from what the model itself
says at that position. The first row is the embedding, the last one the model itself: there the divergence is 0. Positions
count from each prompt's end, -1 the last, where the answer is asked; earlier ones show where on the way it appears. A text
alone will do: then each cell is the token that is most likely there, with its probability. One forward pass, and one unembedding of `positions` positions per layer.

nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong).

The final norm and unembedding were trained for the last layer alone: a low probability does not show that the answer is
not there, only that it is not there in the last layer's code. A divergence that stays high until the end says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

UNITS = {"probability": "probability", "logit": "logits", "rank": "rank", "kl": "nats", "logit_diff": "logits"}
UNITS |= {"token_id": "token id", "answer_probability": "probability", "answer_logit": "logits"}


@method(paper="nostalgebraist2020", unit="probability")
def logit_lens(
    model: Model,
    task: Task | str,
    *,
    answer: str | None = None,
    positions: int | None = None,
    batch_size: int = 8,
) -> Result:
    """The right answer's probability in the stream after each layer, at the last `positions` positions, mean over prompts.

    Prompts shorter than `positions` set the number of positions for all. Beside it `logit`, `rank` (0 is the top), `kl` and,
    where every prompt has wrong answers, `logit_diff`. The table `most_likely` holds the first prompt's best token everywhere.
    Of a text, the most likely token of each cell and its probability: `token_id`, and the table `cells` with the token as text.

    `task`: a task, or one text, which needs no answer. `answer`: of a text, a token whose `answer_probability`,
    `answer_logit` and `rank` are read beside it. `positions`: how many of the last positions are read; by default 8 of a task,
    all of a text.
    """
    if positions is not None and positions < 1:
        raise PatchbayError(f"positions={positions}: at least 1, the last")
    if not isinstance(task, Task):
        return _of_text(model, task, answer, positions)
    if answer is not None:
        raise PatchbayError(f"answer={answer!r} is for a text; the task {task.name} has its own answers")
    task.check(model.vocab_size)
    n = min(positions or 8, *(len(ids) for ids in task.clean))
    rows = _rows(model)
    sums: dict[str, Tensor] = {}
    best: list[dict[str, Any]] = []
    for start in range(0, len(task), batch_size):
        piece = task[start : start + batch_size]
        for row, lens, said in _lenses(model, piece, n):
            for name, values in _read(piece, lens, said).items():
                sums.setdefault(name, torch.zeros(len(rows), n, dtype=torch.float64))[row] += values.sum(0)
            if start == 0:
                best += [{"layer": rows[row], **cell} for cell in _best(model, lens[0])]
    return Result(
        {name: (total / len(task), ("layer", "position"), UNITS[name]) for name, total in sums.items()},
        coords={"layer": rows, "position": list(range(-n, 0))},
        tables={"most_likely": best, "tokens": _shared_tokens(model, task.clean, n)},
    )


def _of_text(model: Model, text: str, answer: str | None, positions: int | None) -> Result:
    """The most likely token in every cell of one prompt, and where an answer stands there."""
    encoded = model.encode(text)
    n = min(positions or len(encoded[0]), len(encoded[0]))
    right = None if answer is None else torch.tensor([model.token_id(answer)])
    rows, cells = _rows(model), []
    found: dict[str, list[Tensor]] = {}
    for row, lens, said in _lenses(model, encoded, n):
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
        {name: (torch.stack(values), ("layer", "position"), UNITS[name]) for name, values in found.items()},
        coords={"layer": rows, "position": list(range(-n, 0))},
        tables={"cells": cells, "tokens": _shared_tokens(model, encoded, n)},
    )


def _rows(model: Model) -> list[str]:
    return ["embed", *(f"L{i}" for i in range(model.n_layers))]


def _lenses(model: Model, prompts: Any, n: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each row its number, the lens logits [prompt, n, vocab], and what the model itself says there, which is the last
    row where no edits are in force."""
    taps = [Port("resid_in", 0), *(Port("resid_out", i) for i in range(model.n_layers))]
    trace = run(model, prompts, taps=taps)
    said = _tail(trace.logits, trace, n)
    for row, port in enumerate(taps):
        if row == len(taps) - 1 and not model.active_edits():
            yield row, said, said
            continue
        with torch.no_grad():  # forward, not a call: edits of an enclosing `edited` block belong to runs of the model
            yield row, model.unembed_logits(model.final_norm_module.forward(_tail(trace[port], trace, n))), said


def _shared_tokens(model: Model, rows: Sequence[Sequence[int]], n: int) -> list[dict[str, Any]]:
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
