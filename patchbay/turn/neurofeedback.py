"""Neurofeedback: a knob along an activation axis, and whether the model can report and control that axis by itself.

A sentence scores w . (mean over its tokens of the stream after one layer), w a unit vector: component k of the sentences' states, or
the normal of a logistic probe for given labels. Its label is 1 where the score is at or above the mean. Axis and examples come
from one half of the sentences, everything that is reported from the other. From N sentences with their labels in context,

    report    accuracy of [logit of mark 1 > logit of mark 0] after a new sentence; its null deals the same labels to other
              examples, and `linear` is what the nearest class mean makes of the same examples' states
    control   Cohen's d of the scores of a given sentence after mark 1 and after mark 0, the example labels also shown flipped
              and the two averaged, so that a mark's own effect is 0; its null are random axes at right angles

`accuracy` and `d` have 95 % intervals (bootstrap; 1.96 sqrt((n + m) / n m + d^2 / 2 (n + m))) and p by sign flips over
sentences against the dealt labels or 0, Benjamini-Hochberg over N. The knob adds strength x w x the standard deviation of the
scores to that layer: what turning the axis by hand does. Cost: one pass over the sentences, and 6 prompts for each held-out sentence and N.

Ji-An, Xiong, Wilson, Mattar and Benna 2025, "Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal
Activations". Their control by free generation is not here: the sentence to control is given, their implicit case.

A right report can come from the words, without any look inward: `linear` near the report says that the label was easy. A model
that has not learned to learn from examples shows nothing, whatever it holds. An effect of the knob is not the model's own control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.tokens import start_ids
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task
from patchbay.turn._contrast import _probe

N_RANDOM = 20  # axes at right angles, for the null of control


class Sentences(NamedTuple):
    """Ids without start tokens, states [sentence, d_model], scores and labels [sentence] of one half."""

    ids: list[list[int]]
    states: Tensor
    scores: Tensor
    labels: Tensor


class Setting(NamedTuple):
    """What report and control share: `drawn` [shot][sentence] are the examples, `pair` the marks and where they differ."""

    model: Model
    shown: Sentences
    held: Sentences
    drawn: list[list[list[int]]]
    pair: tuple[list[int], list[int], int]
    start: list[int]
    batch_size: int
    seed: int

    def mark(self, label: int) -> list[int]:
        return self.pair[1] if label else self.pair[0]


@method(paper="jian2025")
def neurofeedback(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    axis: int | Sequence[Any] = 1,
    layer: int | None = None,
    shots: Sequence[int] = (2, 8),
    marks: Sequence[Any] = (" [Score: 0]", " [Score: 1]"),
    seed: int = 0,
    batch_size: int = 16,
) -> Knob:
    """A knob along an axis of sentence states, with evidence `report` and `control`: what the model does with it from examples.

    `axis`: k for component k (1 the largest), or two kinds of labels, one for each sentence. `layer`: the middle one without.
    `shots`: even numbers of examples. `marks`: what is written at a sentence for label 0 and 1 (texts or ids), different in one token.
    """
    encoded, at = model.encode(prompts), model.n_layers // 2 if layer is None else layer
    port = model.layers[at].resid_out
    counts = [int(n) for n in shots]
    if not counts or any(n < 2 or n % 2 for n in counts) or len(encoded) < 4:
        raise PatchbayError(f"shots={counts}, {len(encoded)} sentences: even numbers of 2 or more, and 4 sentences")
    start = list(start_ids(model.tokenizer)) if model.tokenizer is not None else []
    bare = [
        ids[len(start) :] if start and ids[: len(start)] == start and len(ids) > len(start) else ids for ids in encoded
    ]
    pair = _marks(model, marks)
    states = _means(model, port, [[*start, *ids] for ids in bare], [len(ids) for ids in bare], batch_size)
    order = torch.randperm(len(bare), generator=torch.Generator().manual_seed(seed)).tolist()
    fit, test = order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]
    w, what = _axis(states, fit, axis)
    centre = float((states[fit] @ w).mean())
    shown, held = (_half(bare, states, which, w, centre) for which in (fit, test))
    held, notes = _balanced(held)
    drawn = [_examples(shown.labels, n, len(held.ids), seed + n) for n in counts]  # [shot][sentence][example]
    setting = Setting(model, shown, held, drawn, pair, start, batch_size, seed)
    report, control = _report(setting), _control(setting, port, w)
    labels = {"condition": [f"{n} examples" for n in counts]}
    evidence = {
        "report": Result(report, coords=labels, notes=notes),
        "control": Result(control, coords=labels, notes=notes),
    }
    size = float(shown.scores.std())
    made = edit.add(port, (size * w).float())
    return Knob(f"axis {what} at L{at}", [made], 1.0, evidence=evidence)


def _marks(model: Model, marks: Sequence[Any]) -> tuple[list[int], list[int], int]:
    """Ids of the marks of 0 and 1, and the one place where they differ."""
    listed = []
    for mark in marks:
        if isinstance(mark, str):
            if model.tokenizer is None:
                raise PatchbayError("marks are texts and this model has no tokenizer: give lists of ids")
            listed.append(list(model.tokenizer(mark, add_special_tokens=False)["input_ids"]))
        else:
            listed.append([int(token) for token in (mark if isinstance(mark, list | tuple) else [mark])])
    if len(listed) != 2 or len(listed[0]) != len(listed[1]):
        raise PatchbayError(f"marks {listed}: two of equal length in tokens are needed")
    differ = [i for i, (a, b) in enumerate(zip(*listed, strict=True)) if a != b]
    outside = [token for ids in listed for token in ids if not 0 <= token < model.vocab_size]
    if len(differ) != 1 or outside:
        raise PatchbayError(
            f"marks {listed}: they differ at {len(differ)} places, one is needed; ids are 0..{model.vocab_size - 1}"
        )
    return listed[0], listed[1], differ[0]


def _means(model: Model, port: Port, prompts: list[list[int]], spans: list[int], batch_size: int) -> Tensor:
    """Mean of the port over the last `span` tokens of each prompt, [prompt, d_model] in float64."""
    _fits(model, prompts)
    out = []
    for first in range(0, len(prompts), batch_size):
        piece = prompts[first : first + batch_size]
        states = run(model, piece, taps=[port], logits="last")[port]
        for state, ids, span in zip(states, piece, spans[first : first + batch_size], strict=True):
            out.append(state[len(ids) - span : len(ids)].double().mean(0).cpu())
    return torch.stack(out)


def _fits(model: Model, prompts: list[list[int]]) -> None:
    longest = max(map(len, prompts))
    if model.longest_prompt is not None and longest > model.longest_prompt:
        raise PatchbayError(
            f"a prompt with its examples has {longest} tokens, the model takes {model.longest_prompt}: fewer shots"
        )


def _axis(states: Tensor, fit: list[int], axis: int | Sequence[Any]) -> tuple[Tensor, str]:
    """The unit axis from the fitting half, and its name."""
    centred = states[fit] - states[fit].mean(0)
    if isinstance(axis, int):
        parts = torch.linalg.svd(centred, full_matrices=False)
        rank = int(parts.S.gt(1e-9 * parts.S[0].clamp_min(1e-300)).sum())
        if not 1 <= axis <= rank:
            raise PatchbayError(
                f"axis={axis}: the {len(fit)} sentences of the fitting half have components 1 to {rank}"
            )
        w: Tensor = parts.Vh[axis - 1]
        return w * torch.sign(w[w.abs().argmax()]), f"component {axis}"
    kinds = sorted({str(label) for label in axis})
    if len(axis) != len(states) or len(kinds) != 2:
        raise PatchbayError(
            f"axis: {len(axis)} labels of kinds {kinds[:4]} for {len(states)} sentences; two kinds, one for each"
        )
    one = torch.tensor([str(axis[i]) == kinds[1] for i in fit])
    if not bool(one.any()) or bool(one.all()):
        raise PatchbayError(
            f"axis: the fitting half of the sentences has one kind of label alone ({kinds}); give more sentences"
        )
    return _probe(states[fit][one], states[fit][~one]), f"{kinds[0]} to {kinds[1]}"


def _half(bare: list[list[int]], states: Tensor, which: list[int], w: Tensor, centre: float) -> Sentences:
    scores = states[which] @ w - centre
    return Sentences([bare[i] for i in which], states[which], scores, (scores >= 0).long())


def _balanced(held: Sentences) -> tuple[Sentences, list[str]]:
    """As many sentences of either label, the first ones, so that chance is one half; all where one label is missing."""
    sides = [(held.labels == label).nonzero()[:, 0].tolist() for label in (0, 1)]
    least = min(map(len, sides))
    if not least:
        return held, ["all held-out sentences have one label: chance is not 0.5, read the null"]
    keep = sorted([*sides[0][:least], *sides[1][:least]])
    return Sentences([held.ids[i] for i in keep], held.states[keep], held.scores[keep], held.labels[keep]), []


def _examples(labels: Tensor, n: int, times: int, seed: int) -> list[list[int]]:
    """For each held-out sentence n examples, half of either label, in random order."""
    sides = [(labels == label).nonzero()[:, 0] for label in (0, 1)]
    if min(map(len, sides)) < n // 2:
        raise PatchbayError(
            f"{n} examples: the half that they are drawn from has {[len(s) for s in sides]} of the labels 0 and 1"
        )
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(times):
        picked = torch.cat([side[torch.randperm(len(side), generator=generator)[: n // 2]] for side in sides])
        out.append(picked[torch.randperm(n, generator=generator)].tolist())
    return out


def _report(given: Setting) -> dict[str, Any]:
    """Accuracy of the reported label for each number of examples, its null and the linear competitor, [condition]."""
    shown, held = given.shown, given.held
    rows, ps = [], []
    generator = torch.Generator().manual_seed(given.seed)
    for examples in given.drawn:
        right = {}
        dealt = [torch.tensor([int(shown.labels[i]) for i in row]) for row in examples]
        mixed = [row[torch.randperm(len(row), generator=generator)] for row in dealt]
        for name, labels in (("own", dealt), ("dealt", mixed)):
            prompts = []
            for row, its, ids in zip(examples, labels, held.ids, strict=True):
                said = [[*shown.ids[i], *given.mark(int(label))] for i, label in zip(row, its, strict=True)]
                prompts.append(
                    [*given.start, *(token for piece in said for token in piece), *ids, *given.pair[0][: given.pair[2]]]
                )
            right[name] = (_gap(given, prompts) > 0).long().eq(held.labels).double()
        linear = []
        for row, its, state, label in zip(examples, dealt, held.states, held.labels, strict=True):
            means = [shown.states[row][its == side].mean(0) for side in (0, 1)]
            linear.append(float(int((state - means[0]).norm() > (state - means[1]).norm()) == int(label)))
        mean, low, high = maths.bootstrap_interval(right["own"])
        ps.append(maths.permutation_p(right["own"], right["dealt"], n=4000))
        rows.append([mean, low, high, float(right["dealt"].mean()), sum(linear) / len(linear)])
    table = torch.tensor(rows, dtype=torch.float64).T
    names = ("accuracy", "low", "high", "null_mean", "linear")
    found = {name: (row, ("condition",), "share of sentences") for name, row in zip(names, table, strict=True)}
    return found | {"p": (maths.benjamini_hochberg(torch.tensor(ps)), ("condition",), "p value")}


def _gap(given: Setting, prompts: list[list[int]]) -> Tensor:
    """Logit of mark 1's own token minus mark 0's after each prompt, [prompt]."""
    _fits(given.model, prompts)
    zero, one, at = given.pair
    step = given.batch_size
    runs = [run(given.model, prompts[i : i + step], logits="last").last_logits for i in range(0, len(prompts), step)]
    logits = torch.cat(runs).double().cpu()
    return logits[:, one[at]] - logits[:, zero[at]]


def _control(given: Setting, port: Port, w: Tensor) -> dict[str, Any]:
    """Cohen's d along the axis, with interval, and along random axes at right angles, for each number of examples, [condition]."""
    shown, held = given.shown, given.held
    others = torch.randn(N_RANDOM, len(w), generator=torch.Generator().manual_seed(given.seed), dtype=torch.float64)
    others = others - (others @ w)[:, None] * w
    axes = torch.cat([w[None], others / others.norm(dim=1, keepdim=True)])  # [1 + N_RANDOM, d_model]
    rows, ps = [], []
    for examples in given.drawn:
        scores = {}
        for flip in (0, 1):
            for asked in (0, 1):
                prompts = []
                for row, ids in zip(examples, held.ids, strict=True):
                    said = [[*given.mark(int(shown.labels[i]) ^ flip), *shown.ids[i]] for i in row]
                    prompts.append([*given.start, *(t for piece in said for t in piece), *given.mark(asked), *ids])
                states = _means(given.model, port, prompts, [len(ids) for ids in held.ids], given.batch_size)
                scores[flip, asked] = states @ axes.T
        one, zero = (scores[0, 1] + scores[1, 0]) / 2.0, (scores[0, 0] + scores[1, 1]) / 2.0  # [sentence, axis]
        d = cohens_d(one, zero)
        half = 1.96 * (2.0 / len(one) + float(d[0]) ** 2 / (4.0 * len(one))) ** 0.5
        ps.append(maths.permutation_p(one[:, 0], zero[:, 0], n=4000))
        off = d[1:].abs()
        rows.append([float(d[0]), float(d[0]) - half, float(d[0]) + half, float(off.mean()), float(off.quantile(0.95))])
    table = torch.tensor(rows, dtype=torch.float64).T
    names = ("d", "low", "high", "null_mean", "null_high")
    found = {name: (row, ("condition",), "standard deviations") for name, row in zip(names, table, strict=True)}
    return found | {"p": (maths.benjamini_hochberg(torch.tensor(ps)), ("condition",), "p value")}


def cohens_d(one: Tensor, zero: Tensor) -> Tensor:
    """Difference of means over the pooled standard deviation, column by column of [sentence, axis]; 0 where nothing varies."""
    if len(one) < 2:
        return torch.zeros(one.shape[1], dtype=one.dtype)
    pooled = ((one.var(0) + zero.var(0)) / 2.0).sqrt()
    gap = one.mean(0) - zero.mean(0)
    return torch.where(pooled > 1e-12, gap / pooled.clamp_min(1e-12), 0.0)
