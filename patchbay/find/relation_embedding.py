"""Relation embedding: a relation as one affine map from a subject's stream to the answer's, o = beta J s + b.

    J = mean over examples of d o / d s      b = mean over examples of (o - J s)

s is the stream `at` some layer at the subject's last token, o the last layer's at the prompt's end, read by the model's own final norm and
unembedding. beta is chosen on prompts that are neither examples nor reported (the largest share of the model's own answers). On half of the
prompts, which nothing was chosen on, `accuracy` [condition] is the share for which the map says what the model says (`faithful`); for `constant`,
the mean o of the examples alone; for `other`, the map of another prompt's subject; and the share for which the model itself, its subject's stream
moved by the low-rank inverse of J times the difference between another prompt's o and its own, says that prompt's answer (`edited`), beside random moves of the
same length (`random`). Cost: d_model backward passes over `examples` prompts, and four runs over the others.

`toward` [feature, d_model] holds, for each answer of the examples (table `answers`), the inverse of its mean o: `pb.add(at, toward[i] - toward[j], positions=...)` is
the edit from answer j to answer i, as a knob.

Hernandez et al. 2023, "Linearity of Relation Decoding in Transformer Language Models". It shows that a map exists, not that the model
uses one; a beta chosen on what is reported would flatter it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.find._lens import unembedded
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

BETAS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
SHARE = "share of prompts"
ROUNDING = 1e-5  # of gradients in single precision


@method(paper="hernandez2023", unit=SHARE)
def relation_embedding(
    model: Model,
    task: Task,
    at: Port,
    *,
    subject: str = "last",
    rank: int | None = None,
    examples: int = 8,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """The share of held-out prompts for which an affine map of the subject's stream says what the model says, beside its controls.

    `at`: a stream, such as L1.resid_out. `subject`: the mark whose last token is the subject, or "last". `rank`: singular values of J that its inverse keeps; all
    without. `examples`: prompts that J and b are means over. Variables `accuracy` [condition] with ends, `beta`, and `toward` [feature, d_model].
    """
    if at.signal not in ("resid_in", "resid_mid", "resid_out"):
        raise PatchbayError(f"at={at}: a subject is read from a stream, such as L1.resid_out")
    model.require(at)
    task.check(model.vocab_size)
    if subject != "last" and subject not in task.marks:
        raise PatchbayError(
            f"subject={subject!r}: task {task.name} has the marks {', '.join(task.marks) or 'none'}; possible is also last"
        )
    if examples < 1 or (rank is not None and not 1 <= rank <= model.d_model) or len(task) < 6:
        raise PatchbayError(
            f"examples={examples}, rank={rank}, {len(task)} prompts: 1 or more examples, a rank of 1 to {model.d_model}, and 6 or more prompts"
        )
    dev, test = task.split(0.5, seed)
    n = min(examples, len(dev) - 1)
    weight, bias, mean_o, answers = _fitted(model, dev[:n], at, subject, batch_size)
    tuned, held = (_states(model, some, at, subject, batch_size) for some in (dev[n:], test))
    beta = max(
        BETAS, key=lambda value: (_says(model, value * tuned[0] @ weight.T + bias, tuned[2]).mean(), -abs(value - 1))
    )
    s, o, said, places = held
    order = torch.arange(len(s)).roll(1)
    inverse = _inverse(weight, rank)
    moves = (o[order] - o) @ inverse.T
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(moves.shape, generator=generator, dtype=moves.dtype)
    drawn = drawn * moves.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
    right = {
        "faithful": _says(model, beta * s @ weight.T + bias, said),
        "constant": _says(model, mean_o.expand_as(o), said),
        "other": _says(model, beta * s[order] @ weight.T + bias, said),
        "edited": _moved(model, test, at, places, moves, said[order], batch_size),
        "random": _moved(model, test, at, places, drawn, said[order], batch_size),
    }
    toward = torch.stack([mean for _, mean in answers]) @ inverse.T
    return _result(right, beta, toward, [token for token, _ in answers], model, n)


def _states(
    model: Model, task: Task, at: Port, subject: str, batch_size: int
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Subjects' streams and last streams [prompt, d_model] in double precision, what the model says [prompt], and each subject's place."""
    last = Port("resid_out", model.n_layers - 1)
    places = [len(ids) - 1 if subject == "last" else max(task.marks[subject][i]) for i, ids in enumerate(task.clean)]
    found: list[tuple[Tensor, Tensor, int]] = [None] * len(task)  # type: ignore[list-item]
    for rows in by_length(task.clean, batch_size):
        trace = run(model, task[rows], taps=[at, last], logits="last")
        said = trace.last_logits.argmax(-1).tolist()
        for j, i in enumerate(rows):
            found[i] = (trace[at][j, places[i]].double().cpu(), trace[last][j, -1].double().cpu(), said[j])
    s, o = (torch.stack([one[k] for one in found]) for k in (0, 1))  # type: ignore[misc]
    return s, o, torch.tensor([one[2] for one in found]), places


def _fitted(
    model: Model, task: Task, at: Port, subject: str, batch_size: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, Tensor]]]:
    """J [d_model out, d_model], b and the mean o of the examples, and the mean o of each answer among them."""
    last, d = Port("resid_out", model.n_layers - 1), model.d_model
    s, o, said, places = _states(model, task, at, subject, batch_size)
    total = torch.zeros(d, d, dtype=torch.float64)
    for rows in by_length(task.clean, batch_size):
        trace = run(model, task[rows], taps=[at, last], logits="last", grad=True)
        for i in range(d):
            with torch.enable_grad():
                target = trace[last][:, -1, i].sum()
            gradient = trace.gradient(target, at)[0]
            total[i] += torch.stack([gradient[j, places[row]].double().cpu() for j, row in enumerate(rows)]).sum(0)
    weight = total / len(task)
    answers = [(token, o[said == token].mean(0)) for token in dict.fromkeys(said.tolist())]
    return weight, (o - s @ weight.T).mean(0), o.mean(0), answers


def _inverse(weight: Tensor, rank: int | None) -> Tensor:
    """The inverse of the largest singular values; what is rounding beside the first counts as 0."""
    u, sigma, v = torch.linalg.svd(weight)
    kept = int((sigma[:rank] > ROUNDING * sigma[0]).sum())
    return (v[:kept].T / sigma[:kept]) @ u[:, :kept].T


@torch.no_grad()
def _says(model: Model, o: Tensor, said: Tensor) -> Tensor:
    """Whether each last stream says what the model says, [prompt]."""
    logits = unembedded(model, o.to(model.device, model.dtype))
    return (logits.argmax(-1).cpu() == said).double()


def _moved(
    model: Model, task: Task, at: Port, places: list[int], moves: Tensor, wanted: Tensor, batch_size: int
) -> Tensor:
    """Whether the model says the wanted token with each subject's stream moved, [prompt]."""
    found = torch.zeros(len(task), dtype=torch.float64)
    for rows in by_length(task.clean, batch_size):
        mask = torch.zeros(len(rows), len(task.clean[rows[0]]), dtype=torch.bool)
        mask[torch.arange(len(rows)), torch.tensor([places[i] for i in rows])] = True
        move = edit.add(at, moves[rows][:, None].to(model.dtype), positions=mask)
        said = run(model, task[rows], edits=[move], logits="last").last_logits.argmax(-1).cpu()
        found[rows] = (said == wanted[rows]).double()
    return found


def _result(right: dict[str, Tensor], beta: float, toward: Tensor, tokens: list[int], model: Model, n: int) -> Result:
    ends = [maths.bootstrap_interval(x) for x in right.values()]
    variables: dict[str, Any] = {
        name: (torch.tensor([float(end[i]) for end in ends], dtype=torch.float64), ("condition",), SHARE)
        for i, name in enumerate(("accuracy", "low", "high"))
    }
    variables |= {"beta": (beta, (), "ratio"), "toward": (toward, ("feature", "d_model"), "stream")}
    told = ", ".join(f"{name} {float(end[0]):.2f}" for name, end in zip(right, ends, strict=True))
    text = [model.decode([token]) if model.tokenizer is not None else str(token) for token in tokens]
    return Result(
        variables,
        coords={"condition": list(right)},
        tables={"answers": [{"feature": i, "token": token, "text": text[i]} for i, token in enumerate(tokens)]},
        notes=[
            f"{n} examples, beta {beta:g} chosen on others; of {len(next(iter(right.values())))} held-out prompts: {told}"
        ],
    )
