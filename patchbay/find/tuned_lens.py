"""Tuned lens: what the stream would answer at each layer, read through an affine map that was learned for that layer.

    logits[layer, position] = unembed(final_norm(h + A h + b)),  A and b least in KL(model || lens)

`train.tuned_lens` learns the maps and writes them to a folder, or one of the tuned-lens package is given whose pickle was converted.
Read as `find.logit_lens` reads: probability, rank and KL of each layer; the last row is the model itself. With A = 0 and b = 0 it is the logit
lens bit for bit. One forward pass, and one unembedding of `positions` positions per layer.

Beside it, of a task, `aligned` [layer]: the cosine, at the last position, between the gradients of two log-probabilities of the
model's most likely token by the stream of that layer: of the model's own, through the layers that are left, and of the lens's. 1 where the lens
reads what the model goes on to use; random directions have about 0, within 2 / sqrt(d_model) in 95 of 100. One more pass with its backward.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".

The maps are learned: a lens can use what the model does not. A low divergence shows that the answer can be read there by an affine
map, not that the model has it there; `aligned` says how far both look the same way, and `prove.activation_patching` what is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.features.lens import TUNED, Lens, depths, load, stream_ports
from patchbay.find._lens import of_one_length, read, unembedded
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.tasks.task import Task


@method(paper="belrose2023", unit="probability")
def tuned_lens(
    model: Model,
    task: Task | str,
    lens: str,
    *,
    answer: str | None = None,
    positions: int | None = None,
    batch_size: int = 8,
) -> Result:
    """The right answer's probability after each layer through a trained lens, at the last `positions` positions, mean over prompts.

    `lens`: the folder of a lens, as `train.tuned_lens` writes it. Variables and tables are those of `find.logit_lens`, and of a task
    `aligned` [layer] with its ends over prompts.

    `task`: a task, or one text, which needs no answer. `answer`: of a text, a token whose `answer_probability`, `answer_logit` and
    `rank` are read beside it. `positions`: how many of the last positions are read; by default 8 of a task, all of a text.
    """
    maps = load(lens, model, TUNED)
    if not isinstance(task, Task):
        return read(model, task, answer, positions, batch_size, maps)
    cosines = torch.cat(
        [_aligned(model, rows, maps) for rows in of_one_length(task.clean, batch_size)]
    )  # [prompt, row]
    mean, low, high = maths.intervals(cosines)
    ends = {"aligned_low": low, "aligned_high": high} if len(cosines) > 1 else {}
    more = {name: (value, ("layer",), "cosine") for name, value in ({"aligned": mean} | ends).items()}
    return read(model, task, answer, positions, batch_size, maps, more, [_said(model, mean)])


def _said(model: Model, aligned: Tensor) -> str:
    bound = 2 / model.d_model**0.5
    apart = [name for name, value in zip(depths(model)[:-1], aligned.tolist(), strict=False) if value < bound]
    if not apart:
        return "at every layer the lens and the model look the same way, further than random directions would"
    return (
        f"at {', '.join(apart)} the lens looks another way than the model does (cosine below {bound:.2f}): what it says there need not be "
        "used by the model"
    )


def _aligned(model: Model, prompts: list[list[int]], lens: Lens) -> Tensor:
    """Cosines [prompt, row] of the model's and the lens's gradient at the last position; 1 in the last row, which is the model."""
    ports = stream_ports(model)
    trace = run(model, prompts, taps=ports, logits="last", grad=True)
    with torch.enable_grad():
        said = trace.last_logits.float()
        token = said.argmax(-1, keepdim=True)
        own = trace.gradient(said.log_softmax(-1).gather(1, token).sum(), *ports)
    rows = []
    for row, port in enumerate(ports):
        state = trace[port][:, -1].detach().requires_grad_()
        with torch.enable_grad():
            read_there = unembedded(model, lens(row, state)).float().log_softmax(-1).gather(1, token).sum()
            theirs = torch.autograd.grad(read_there, state)[0]
        rows.append(maths.cosine(own[row][:, -1].double().cpu(), theirs.double().cpu()))
    return torch.stack(rows, 1)
