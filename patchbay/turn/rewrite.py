"""Rewrite: a knob that gives facts another answer by a change of the fewest dimensions of one down projection (ROME, MEMIT).

With W [neuron, d_model] the down projection of layer L, k the mean of its input `mlp.act` at the subject's last token over all
prompts that ask for one fact, m = k W, and C the mean of a a^T over the tokens a of `texts` (its diagonal raised by a thousandth of
its mean, so that few texts do):

    v* = m + delta,  delta by Adam on  -log p(new answer) + 1/16 KL(law after the subject, before | after) + 1/10 |delta|^2 / |m|^2,
                     with |delta| <= 4 |m|, at the subject's last token of every prompt of the fact
    W' = W + C^-1 K^T (weight I + K C^-1 K^T)^-1 (V* - K W),    K [fact, neuron] the keys, V* their targets

`weight` = 0 is ROME for one fact: K W' = V* exactly, the change has rank 1 a fact, and a key a with a C^-1 K^T = 0 is left as it
was; above 0 it is MEMIT's lambda. With several layers (MEMIT) delta is found at the last, and each layer in turn takes 1 / (layers
left) of what its stream still lacks. One k stands on both sides (r-ROME): the published code divides by another one than it
multiplies by. As an edit it is a linear map of `mlp.act`, so that the knob turns, saves and exports (W' in a checkpoint).

Evidence `rewriting` [condition]: `success`, the share of prompts whose right answer is above their wrong ones (of all tokens, where
they have none), of the task itself and of each of `others` (paraphrases; neighbours with their own answers), with ends, and `before`. The control writes the
same changes under other keys, drawn from the texts: `null_mean`, `p`. Cost: steps runs with gradients a layer tried.

Meng, Bau, Andonian and Belinkov 2022, "Locating and Editing Factual Associations in GPT"; Meng et al. 2023, "Mass-Editing Memory in
a Transformer"; one k after Gupta et al. 2024. The old answer is overwritten where this subject is read, not removed from what
follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.weights import matrix
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.checks import marked
from patchbay.tasks.task import Task

DRIFT, DECAY, MOST, STEP = (
    1 / 16,
    0.1,
    4.0,
    0.2,
)  # weights of the objective; |delta| / |m| at most; of Adam, in sizes of m
RAISED = 1e-3  # of C's mean diagonal, added to its diagonal
ALIKE = 1e-9  # the least weight of drawn keys, of which two may be the same


@method(paper="meng2022")
def rewrite(
    model: Model,
    task: Task,
    texts: list[str] | list[list[int]],
    *,
    layers: list[int] | None = None,
    weight: float = 0.0,
    steps: int = 25,
    others: dict[str, Task] | None = None,
    draws: int = 20,
    batch_size: int = 32,
) -> Knob:
    """A knob that makes the model answer `task` with its right answers, which are the new ones, where their subject is read.

    `task`: prompts with the mark "subject", new answers of one token as right and mostly the old ones as wrong; several prompts of
    one subject and one answer are one fact. `texts`: whose tokens say which keys are to stay as they are. Evidence `rewriting`.

    `layers`: whose down projection is changed; without, the one where the objective ends lowest. `weight`: how much the keys of
    the texts count against the facts; 0 is exact. `steps`: of Adam. `others`: tasks by name on which the change is measured too.
    `draws`: changes of the same values under other keys, as the control.
    """
    if weight < 0 or steps < 1 or draws < 1:
        raise PatchbayError(
            f"weight={weight}, steps={steps}, draws={draws}: a weight of 0 or more, at least one step and one draw"
        )
    facts, tried = _facts(model, task), _tried(model, layers)
    found = {at: _deltas(model, task, facts, at, steps) for at in (tried if layers is None else tried[-1:])}
    last = min(found, key=lambda at: float(found[at][1]))
    chosen = [last] if layers is None else tried
    delta = found[last][0]  # [fact, d_model]
    keys = _acts(model, texts, chosen, batch_size)
    written = _written(model, task, facts, chosen, delta, _moments(keys), weight, batch_size)
    knob = Knob(
        f"rewrite {len(facts)} fact{'s' * (len(facts) != 1)} at {', '.join(f'L{at}' for at in chosen)}",
        [one.edit() for one in written],
        1.0,
        provenance={"fitted": [list(ids) for ids in task.clean]},
    )
    sets = {"asked": task} | (others or {})
    return knob.with_evidence(rewriting=_evidence(model, sets, knob, written, keys, draws, batch_size))


# --- facts ----------------------------------------------------------------------------------------------


def _facts(model: Model, task: Task) -> list[list[int]]:
    """The prompts of each fact: those of one subject, token by token, and one answer."""
    task.check(model.vocab_size)
    if task.answers:
        raise PatchbayError(
            f"task {task.name} has answers of several tokens: rewrite takes answers of one; task.steps() has them token by token"
        )
    spans = marked(task, "subject")
    facts: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, (ids, span, right) in enumerate(zip(task.clean, spans, task.right, strict=True)):
        facts.setdefault((tuple(ids[at] for at in span), right), []).append(i)
    return list(facts.values())


def _ends(task: Task) -> Tensor:
    """Where each prompt's subject ends, [prompt]."""
    return torch.tensor([span[-1] for span in marked(task, "subject")])


def _tried(model: Model, layers: list[int] | None) -> list[int]:
    """The layers to change, in order. Raises PatchbayError where one has no down projection that a change could be written into."""
    has = [i for i in range(model.n_layers) if "mlp.act" in model.signals(i)]
    if not has:
        model.require(Port("mlp.act", 0))  # raises: no layer has it
    tried = has if layers is None else sorted(set(layers))
    if lacking := [i for i in tried if i not in has]:
        raise PatchbayError(f"layers {lacking} have no down projection here; possible are {', '.join(map(str, has))}")
    if not tried:
        raise PatchbayError(f"layers={layers}: at least one of {', '.join(map(str, has))}")
    for i in tried:
        at = model.modules[i]
        if len(tried) > 1 and layers is not None and at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj:
            raise PatchbayError(
                f"layers={layers}: in {model.family.name} a norm stands between a down projection and the stream, so that several layers "
                "cannot share what the stream lacks; give one layer"
            )
    return tried


def _down(model: Model, layer: int) -> tuple[Tensor, Tensor]:
    """W [neuron, d_model] in float64, and its pseudoinverse [d_model, neuron], with which any change of W is a map of its input."""
    W = matrix(model.modules[layer].mlp_proj).detach().double().cpu()  # type: ignore[arg-type]
    inverse = torch.linalg.pinv(W)
    off = float((inverse @ W - torch.eye(W.shape[1], dtype=W.dtype)).abs().max())
    if off > 1e-6:
        raise PatchbayError(
            f"L{layer}: its down projection [{W.shape[0]}, {W.shape[1]}] does not reach every direction of the stream (rank "
            f"{int(torch.linalg.matrix_rank(W))}), so that a change of it is no map of its input; give another layer"
        )
    return W, inverse


# --- the new value --------------------------------------------------------------------------------------


def _deltas(model: Model, task: Task, facts: list[list[int]], layer: int, steps: int) -> tuple[Tensor, Tensor]:
    """delta of each fact [fact, d_model], and what the objective ends at, its mean."""
    found = [_delta(model, task[prompts], layer, steps) for prompts in facts]
    return torch.stack([delta for delta, _ in found]), torch.stack([loss for _, loss in found]).mean()


def _delta(model: Model, some: Task, layer: int, steps: int) -> tuple[Tensor, Tensor]:
    """delta [d_model] of one fact, and its objective at the last step that was taken."""
    port, ends, rows = Port("mlp.act", layer), _ends(some), torch.arange(len(some))
    W, inverse = _down(model, layer)
    plain = run(model, some, taps=[port])
    value = plain[port][rows, ends].double().cpu().mean(0) @ W
    size = value.norm().clamp(min=1e-12)
    law = plain.logits[rows, ends].log_softmax(-1)
    mask = torch.zeros(plain.ids.shape, dtype=torch.bool)
    mask[rows, ends] = True
    back, right = inverse.to(plain.logits), torch.tensor(some.right, device=plain.logits.device)
    with torch.enable_grad():
        scaled = torch.zeros_like(value, requires_grad=True)
        adam = torch.optim.Adam([scaled], lr=STEP)
        for _ in range(steps):
            delta = scaled * size / len(value) ** 0.5
            added = edit.add(port, delta.to(back) @ back, positions=mask)
            trace = run(model, some, edits=[added], grad=True)
            new = trace.last_logits.log_softmax(-1)[rows, right].mean()
            after = trace.logits[rows, ends].log_softmax(-1)
            drift = (law.exp() * (law - after)).sum(-1).mean()
            loss = -new + DRIFT * drift + DECAY * (delta.norm() / size) ** 2
            scaled.grad = torch.autograd.grad(loss, scaled)[0]
            adam.step()
            with torch.no_grad():
                over = scaled.norm() / len(value) ** 0.5 / MOST
                scaled /= over.clamp(min=1.0)
    return (scaled * size / len(value) ** 0.5).detach(), loss.detach().double().cpu()


# --- the change -----------------------------------------------------------------------------------------


@dataclass
class Change:
    """What one layer's down projection takes: `left` [neuron, fact] C^-1 K^T (weight I + K C^-1 K^T)^-1, `right` [fact, d_model]."""

    layer: int
    left: Tensor
    right: Tensor
    inverse: Tensor  # of W
    moment: Tensor  # C
    weight: float

    def under(self, keys: Tensor) -> Change:
        """The same values under other keys [fact, neuron]."""
        return replace(self, left=_solved(self.moment, keys, self.weight or ALIKE))

    def edit(self) -> Edit:
        """a (I + left right W^-1) W = a (W + left right), as a map of `mlp.act`."""
        change = self.left @ (self.right @ self.inverse)  # [neuron, neuron]
        matrix_ = torch.eye(len(change), dtype=change.dtype) + change
        return Edit("project", Port("mlp.act", self.layer), matrix_.T.float().contiguous())


def _solved(moment: Tensor, keys: Tensor, weight: float) -> Tensor:
    """C^-1 K^T (weight I + K C^-1 K^T)^-1 [neuron, fact]. Raises PatchbayError where two facts have one key and both must hold."""
    spread = torch.linalg.solve(moment, keys.T)  # [neuron, fact]
    gram = keys @ spread
    scale = gram.diagonal().clamp(min=1e-300).rsqrt()
    least = float(torch.linalg.eigvalsh(gram * scale[:, None] * scale[None, :])[0])
    if weight == 0.0 and least < 1e-9:
        raise PatchbayError(
            "two facts have the same key (one subject, two answers), so that both cannot hold: give one answer for a subject, or a weight above 0"
        )
    return spread @ torch.linalg.inv(gram + weight * torch.eye(len(gram), dtype=gram.dtype))


def _acts(model: Model, texts: object, layers: list[int], batch_size: int) -> dict[int, Tensor]:
    """The down projection's input at every token of the texts, by layer: [token, neuron]."""
    ports, rows = [Port("mlp.act", at) for at in layers], model.encode(texts)
    pieces: dict[int, list[Tensor]] = {at: [] for at in layers}
    for start in range(0, len(rows), batch_size):
        trace = run(model, rows[start : start + batch_size], taps=ports, logits="last")
        for port in ports:
            seen = trace[port].double().cpu().flatten(0, 1)
            pieces[port.layer or 0].append(seen[~seen[:, 0].isnan()])
    return {at: torch.cat(some) for at, some in pieces.items()}


def _moments(acts: dict[int, Tensor]) -> dict[int, Tensor]:
    """C of each layer: the mean of a a^T over tokens, its diagonal raised."""
    out = {}
    for at, seen in acts.items():
        moment = seen.T @ seen / len(seen)
        out[at] = moment + RAISED * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return out


def _written(
    model: Model,
    task: Task,
    facts: list[list[int]],
    layers: list[int],
    delta: Tensor,
    moments: dict[int, Tensor],
    weight: float,
    batch_size: int,
) -> list[Change]:
    """The change of each layer in turn, under those of the layers before it."""
    last = Port("resid_out", layers[-1])
    several = len(layers) > 1
    aim = _at_ends(model, task, facts, [last], [], batch_size)[0] + model.residual_scale * delta if several else delta
    changes: list[Change] = []
    for n, layer in enumerate(layers):
        made = [one.edit() for one in changes]
        keys, now = _at_ends(model, task, facts, [Port("mlp.act", layer), last], made, batch_size)
        lacks = (aim - now) / (model.residual_scale * (len(layers) - n)) if several else delta
        _, inverse = _down(model, layer)
        changes.append(Change(layer, _solved(moments[layer], keys, weight), lacks, inverse, moments[layer], weight))
    return changes


def _at_ends(
    model: Model, task: Task, facts: list[list[int]], ports: list[Port], edits: list[Edit], batch_size: int
) -> list[Tensor]:
    """Each signal's mean over the prompts of a fact at the end of its subject, [fact, feature]."""
    ends, rows = _ends(task), [torch.zeros(0)] * len(task)
    values: list[list[Tensor]] = [list(rows) for _ in ports]
    for start in range(0, len(task), batch_size):
        prompts = list(range(start, min(start + batch_size, len(task))))
        trace = run(model, task[prompts], taps=ports, edits=edits, logits="last")
        for held, port in zip(values, ports, strict=True):
            for row, prompt in enumerate(prompts):
                held[prompt] = trace[port][row, ends[prompt]].double().cpu()
    return [torch.stack([torch.stack([held[i] for i in prompts]).mean(0) for prompts in facts]) for held in values]


# --- what is known of it --------------------------------------------------------------------------------


def _success(model: Model, task: Task, edits: list[Edit], batch_size: int) -> Tensor:
    """Whether the right answer is above the wrong ones, or above all tokens where there are none, [prompt]."""
    judged = task.with_metric("option_accuracy" if task.wrong and all(task.wrong) else "accuracy")
    pieces = [
        run(model, task[i : i + batch_size], edits=edits, logits="last").last_logits
        for i in range(0, len(task), batch_size)
    ]
    return judged.score(torch.cat(pieces)).double().cpu()


def _elsewhere(change: Change, keys: Tensor, generator: torch.Generator) -> Edit:
    """The same values under keys drawn from those of the texts."""
    places = torch.randint(len(keys), (len(change.right),), generator=generator)
    return change.under(keys[places]).edit()


def _evidence(
    model: Model,
    sets: dict[str, Task],
    knob: Knob,
    written: list[Change],
    keys: dict[int, Tensor],
    draws: int,
    batch_size: int,
) -> Result:
    """Success on each set of prompts, before, under the knob, and under the same values with drawn keys."""
    generator = torch.Generator().manual_seed(0)
    drawn = [[_elsewhere(one, keys[one.layer], generator) for one in written] for _ in range(draws)]
    columns: dict[str, list[float]] = {name: [] for name in ("success", "low", "high", "before", "null_mean", "p")}
    for task in sets.values():
        own = _success(model, task, list(knob.edits), batch_size)
        null = torch.stack([_success(model, task, edits, batch_size).mean() for edits in drawn])
        mean, low, high = (float(end) for end in maths.intervals(own[:, None]))
        before = float(_success(model, task, [], batch_size).mean())
        found = (mean, low, high, before, float(null.mean()), maths.draws_p(mean, null))
        for column, number in zip(columns.values(), found, strict=True):
            column.append(number)
    said = [
        f"{name}: {columns['success'][i]:.0%} of {len(task)} prompts ({columns['before'][i]:.0%} before, {columns['null_mean'][i]:.0%} "
        "with the same change under other keys)"
        for i, (name, task) in enumerate(sets.items())
    ]
    units = {"p": "probability"}
    return Result(
        {
            name: (torch.tensor(row).double(), ("condition",), units.get(name, "share of prompts"))
            for name, row in columns.items()
        },
        coords={"condition": list(sets)},
        notes=said,
        provenance={"method": "turn.rewrite", "task": sets["asked"].to_json()},
    )
