"""Causal scrubbing: whether a hypothesis says all that matters, by giving each part what it writes on other prompts that it calls equal.

A hypothesis names parts (heads, MLPs, whole attentions) and for each what its output may depend on: labels of the task. From the first layer to the last, every
part p of every prompt x is given, in place of its own output, that of a prompt x' drawn at random

    p is claimed to depend on labels L:   x' with the same labels L as x            p is not named:   any x'

and what p writes on x' is itself what it writes under the parts that were scrubbed before it, drawn anew for x', and so on down. With
m the mean score over prompts, of the model, of the scrubbed runs, and of scrubbed runs under no claim at all (each part's output from any prompt):

    recovered = (m(scrubbed) - m(no claim)) / (m(model) - m(no claim))

1 where nothing that matters was left out, 0 where the hypothesis explains no more than none; "self" as a label claims everything (no
resampling), so that "self" for every part is 1 exactly. The embedding is each prompt's own. A part and a prompt have one draw for all that
read it, where the paper draws for each reader anew. `draws` whole scrubs; the control deals each claim's classes out anew among the prompts
(`null` [draw], `p`).

`moved` [part]: by how much the draws change what a named part writes, |z' - z| / |z|, and `others` [part], the share of prompts that another one was
drawn for. A claim passes for nothing where these are 0: a part whose output is always the same, or labels that no two prompts share.

Chan et al. 2022, "Causal Scrubbing: a method for rigorously testing interpretability hypotheses". It refutes hypotheses that say too little; one that claims more than
the model uses passes too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import check_draws, doubtful
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port, as_part, suggest
from patchbay.tasks.task import Task

SELF = "self"
Classes = list[object]  # of each prompt, what a part is claimed to depend on


@method(paper="chan2022")
def causal_scrubbing(
    model: Model,
    task: Task,
    hypothesis: dict[str, str | list[str]],
    *,
    draws: int = 10,
    batch_size: int = 64,
    seed: int = 0,
) -> Result:
    """The share of the score that is left when every part gets what it writes on other prompts that `hypothesis` calls equal.

    `hypothesis`: part -> the label or labels of the task that all its output depends on, or "self": {"L0.H1": "subject", "L2.mlp": "self"}.
    Main variable `recovered` with ends; `null` [draw], `p`, the scores `whole`, `scrubbed` and `no_claim`, and of each part `moved` and
    `others`. Prompts are of one length.

    `draws`: how often all parts are drawn anew, for the hypothesis, for no claim and for the control.
    """
    check_draws(draws)
    task.check(model.vocab_size)
    if len({len(ids) for ids in task.clean}) > 1 or len(task) < 2:
        raise PatchbayError(
            f"task {task.name}: what is written moves between prompts token by token, so that they are of one length, two or more"
        )
    units = _units(model)
    claims = _claims(model, task, hypothesis, units)
    alone: dict[Port, Classes] = {}
    rng = random.Random(f"causal_scrubbing-{seed}")
    whole = _score(model, task, [], batch_size)
    runs: dict[str, list[Tensor]] = {"scrubbed": [], "no_claim": [], "null": []}
    moved: list[Tensor] = []
    for _ in range(draws):
        scrubbed, change = _scrubbed(model, task, units, claims, rng, batch_size)
        runs["scrubbed"].append(scrubbed)
        moved.append(change)
        runs["no_claim"].append(_scrubbed(model, task, units, alone, rng, batch_size)[0])
        runs["null"].append(_scrubbed(model, task, units, _dealt(claims, rng), rng, batch_size)[0])
    means = {kind: torch.stack(rows).mean(0) for kind, rows in runs.items()}  # [prompt]
    over = task.sign * (whole - means["no_claim"])
    recovered = [
        float(end) for end in maths.intervals(task.sign * (means["scrubbed"] - means["no_claim"])[:, None], over)
    ]
    null = task.sign * torch.stack([(row - means["no_claim"]).mean() for row in runs["null"]]) / over.mean()
    p = maths.draws_p(recovered[0], null)
    parts = [as_part(text) for text in hypothesis]
    changes = torch.stack(moved).mean(0)  # [unit, (moved, others)]
    own = [[i for i, unit in enumerate(units) if unit in _ports_of(model, part)] for part in parts]
    share = "share of the score"
    values = {name: (value, (), share) for name, value in zip(("recovered", "low", "high"), recovered, strict=True)}
    return Result(
        values
        | {"null": (null, ("draw",), share), "p": (p, (), "probability")}
        | {
            name: (row.mean(), (), task.unit)
            for name, row in (("whole", whole), *((k, means[k]) for k in ("scrubbed", "no_claim")))
        }
        | {
            name: (torch.stack([changes[places, at].mean() for places in own]), ("part",), unit)
            for at, (name, unit) in enumerate((("moved", "share of its length"), ("others", "share of prompts")))
        },
        parts=parts,
        notes=_notes(task, recovered, p, null, over, parts, changes, own),
    )


# --- the hypothesis -------------------------------------------------------------------------------------


def _units(model: Model) -> list[Port]:
    """What is scrubbed, in the order of the forward pass: every head's z (or a mixer's output), then the MLP's output."""
    found = []
    for layer in range(model.n_layers):
        signals = model.signals(layer)
        heads = range(model.n_heads(layer)) if "attn.z" in signals else ()
        found += [Port("attn.z", layer, head) for head in heads] or [Port("attn.out", layer)]
        found += [Port("mlp.out", layer)] if "mlp.out" in signals else []
    return found


def _ports_of(model: Model, part: Part) -> list[Port]:
    """The units of a part: a head's or an MLP's own, of an attention all heads."""
    layer = part.layer or 0
    if part.kind == "attn" and "attn.z" in model.signals(layer):
        return [Port("attn.z", layer, head) for head in range(model.n_heads(layer))]
    return [part.port()]


def _claims(model: Model, task: Task, hypothesis: dict[str, str | list[str]], units: list[Port]) -> dict[Port, Classes]:
    """Of each unit that is named, the class of every prompt."""
    found: dict[Port, Classes] = {}
    for text, labels in hypothesis.items():
        names = [labels] if isinstance(labels, str) else list(labels)
        known = [SELF, *task.labels]
        for name in names:
            if name not in known:
                raise PatchbayError(
                    f"hypothesis {text!r}: no label {name!r}; task {task.name} has {', '.join(known)}"
                    + suggest(name, known)
                )
        ports = _ports_of(model, as_part(text))
        for port in ports:
            if port not in units:
                raise PatchbayError(
                    f"hypothesis {text!r}: scrubbed are heads, attentions and MLPs, such as {', '.join(str(u.part) for u in units[:3])}"
                )
            found[port] = [
                tuple(i if name == SELF else task.labels[name][i] for name in names) for i in range(len(task))
            ]
    return found


def _dealt(claims: dict[Port, Classes], rng: random.Random) -> dict[Port, Classes]:
    """The same classes, dealt out anew among the prompts, for each unit by itself."""
    return {port: rng.sample(classes, len(classes)) for port, classes in claims.items()}


def _drawn(classes: Classes | None, n: int, rng: random.Random) -> list[int]:
    """For each prompt one that counts as equal, or any where nothing is claimed."""
    if classes is None:
        return [rng.randrange(n) for _ in range(n)]
    members: dict[object, list[int]] = {}
    for i, one in enumerate(classes):
        members.setdefault(one, []).append(i)
    return [rng.choice(members[one]) for one in classes]


# --- the runs -------------------------------------------------------------------------------------------


def _score(model: Model, task: Task, edits: Sequence[Edit], batch_size: int) -> Tensor:
    """Score of each prompt, [prompt]; edits hold a value for every one of them."""
    trace = run(model, task, edits=edits, logits=task.reads, batch_size=batch_size)
    reference = run(model, task, logits="last", batch_size=batch_size).last_logits if task.metric == "kl" else None
    return task.score(trace.read(task.reads), reference).double().cpu()


def _scrubbed(
    model: Model, task: Task, units: list[Port], claims: dict[Port, Classes], rng: random.Random, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Scores [prompt] with every unit drawn anew, and of each unit how far it moved and for how many prompts another was drawn."""
    edits: list[Edit] = []
    change = torch.zeros(len(units), 2, dtype=torch.float64)
    groups: dict[tuple[int | None, str], list[int]] = {}
    for i, unit in enumerate(units):
        groups.setdefault((unit.layer, unit.signal), []).append(i)
    for (layer, signal), places in groups.items():
        whole = Port(signal, layer)
        held = run(model, task, taps=[whole], edits=edits, logits="last", batch_size=batch_size)[
            whole
        ]  # [prompt, position, ...]
        new = held.clone()
        for place in places:
            own = _drawn(claims.get(units[place]), len(task), rng)
            index = units[place].index
            before = held if index is None else held[:, :, index]
            after = before[own]
            if index is None:
                new = after
            else:
                new[:, :, index] = after
            change[place, 0] = float((after - before).norm() / before.norm().clamp(min=1e-12))
            change[place, 1] = sum(a != b for a, b in enumerate(own)) / len(task)
        edits.append(edit.replace(whole, new))
    return _score(model, task, edits, batch_size), change


def _notes(
    task: Task,
    recovered: list[float],
    p: float,
    null: Tensor,
    over: Tensor,
    parts: list[Part],
    changes: Tensor,
    own: list[list[int]],
) -> list[str]:
    notes = [
        f"the hypothesis recovers {recovered[0]:.3g} of the score{maths.between(recovered[1], recovered[2])}, the same claims with their classes dealt out anew "
        f"{float(null.mean()):.3g} (p = {p:.2g})"
    ]
    still = [str(part) for part, places in zip(parts, own, strict=True) if float(changes[places, 0].max()) < 1e-3]
    if still:
        notes.append(
            f"{', '.join(still[:6])}: nothing moved when drawn anew (a constant output, or classes of one prompt), so that the claim passes for nothing"
        )
    if unsure := doubtful(over, task.unit):
        notes.append(f"the model does not score clearly better than no claim at all (gap {unsure}): shares mean little")
    return notes
