"""Logit lens: what the stream would answer if the model stopped at each layer.

    logits[layer, position] = unembed(final_norm(stream after that layer))

read as the answer's probability, logit and rank, and as the divergence KL(model || lens) in nats from what the model itself
says at that position. The first row is the embedding, the last one the model itself: there the divergence is 0. Positions
count from each prompt's end, -1 the last, where the answer is asked; earlier ones show where on the way it appears. One
forward pass, and one unembedding of `positions` positions per layer.

nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong).

The final norm and unembedding were trained for the last layer alone: a low probability does not show that the answer is
not there, only that it is not there in the last layer's code. A divergence that stays high until the end says so.
"""

from __future__ import annotations

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


@method(paper="nostalgebraist2020", unit="probability")
def logit_lens(model: Model, task: Task, *, positions: int = 8, batch_size: int = 8) -> Result:
    """The right answer's probability in the stream after each layer, at the last `positions` positions, mean over prompts.

    Prompts shorter than `positions` set the number of positions for all. Beside it `logit`, `rank` (0 is the top), `kl` and,
    where every prompt has wrong answers, `logit_diff`. The table `most_likely` holds the first prompt's best token everywhere.

    `positions`: how many of the last positions are read.
    """
    task.check(model.vocab_size)
    if positions < 1:
        raise PatchbayError(f"positions={positions}: at least 1, the last")
    n = min(positions, *(len(ids) for ids in task.clean))
    taps = [Port("resid_in", 0), *(Port("resid_out", i) for i in range(model.n_layers))]
    rows = ["embed", *(f"L{i}" for i in range(model.n_layers))]
    sums: dict[str, Tensor] = {}
    best: list[dict[str, Any]] = []
    for start in range(0, len(task), batch_size):
        piece = task[start : start + batch_size]
        trace = run(model, piece, taps=taps)
        said = _tail(trace.logits, trace, n)  # [prompt, position, vocab]
        for row, port in enumerate(taps):
            with (
                torch.no_grad()
            ):  # forward, not a call: edits of an enclosing `edited` block belong to runs of the model
                normed = model.final_norm_module.forward(_tail(trace[port], trace, n))
                lens = model.unembed_logits(normed)  # [prompt, position, vocab]
            for name, values in _read(piece, lens, said).items():
                sums.setdefault(name, torch.zeros(len(taps), n, dtype=torch.float64))[row] += values.sum(0)
            if start == 0:
                best += [{"layer": rows[row], **cell} for cell in _best(model, lens[0])]
    return Result(
        {name: (total / len(task), ("layer", "position"), UNITS[name]) for name, total in sums.items()},
        coords={"layer": rows, "position": list(range(-n, 0))},
        tables={"most_likely": best},
    )


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
