"""Removal: what the methods that take parts away share. Random parts to compare with, and scores of every prompt without
each of many sets of parts, as rows of shared batches.

The ways are those of `ablation`: by zero, by the mean over the task's positions, or by the values on each prompt's twin.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.asked import n_parts
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.result import Result
from patchbay.signal.port import FEATURES, Part, PatchbayError, Port
from patchbay.tasks.task import Task

By = Literal["zero", "mean", "resample"]
WAYS = ("zero", "mean", "resample")
Set = tuple[Part, ...]
Activity = dict[tuple[str, int], Tensor]  # (kind, layer) -> share of tokens [feature]
NEAREST = 8  # features from which one that is active about as often is drawn


# --- parts ----------------------------------------------------------------------------------------


def check_top(top: int | None) -> None:
    if top is not None and top < 1:
        raise PatchbayError(f"top={top}: at least one part is needed")


def given_parts(parts: Result | list[Part] | Part, top: int | None, does: str) -> list[Part]:
    """The parts that were given, each once: the first `top` of them, which a Result needs to be told."""
    check_top(top)
    if isinstance(parts, Result):
        if top is None:
            raise PatchbayError("parts is a Result: say how many of its parts, top=3, or pass result.top(3)")
        parts = parts.top(top)
    found = list(dict.fromkeys([parts] if isinstance(parts, Part) else list(parts)[:top]))
    if not found:
        raise PatchbayError(f"no parts to {does} were given")
    return found


# --- random parts ---------------------------------------------------------------------------------


def others(model: Model, kind: str, layer: int, without: set[Part]) -> list[Part]:
    """Parts of that kind in that layer that were not chosen."""
    if Part(layer, kind, None).port().signal not in model.signals(layer):
        return []
    if kind in ("attn", "mlp"):
        every = [Part(layer, kind)]
    else:
        every = [Part(layer, kind, i) for i in range(n_parts(model, kind, layer)) if _alive(model, kind, layer, i)]
    return [part for part in every if part not in without]


def _alive(model: Model, kind: str, layer: int, index: int) -> bool:
    """Whether a feature is ever active, where its dictionary knows how often: those that never are would be no control."""
    density = getattr(model.dictionaries.get((layer, f"{kind}s")), "density", None)
    return density is None or float(density[index]) > 1e-9


def activity(model: Model, task: Task, parts: Sequence[Part], size: int) -> Activity:
    """Of the dictionaries that features among the parts belong to: the share of the task's tokens at which each feature is active."""
    places = sorted({(part.kind, part.layer or 0) for part in parts if part.kind in FEATURES})
    found: dict[tuple[str, int], Tensor] = {}
    for start in range(0, len(task), size) if places else ():
        ports = [Part(layer, kind, 0).port() for kind, layer in places]
        wholes = [Port(port.signal, port.layer) for port in ports]
        trace = run(model, [list(ids) for ids in task.clean[start : start + size]], taps=wholes, logits="last")
        for place, port in zip(places, wholes, strict=True):
            on = (trace[port].nan_to_num() != 0).double().sum((0, 1)).cpu() / sum(map(len, task.clean))
            found[place] = found.get(place, torch.zeros_like(on)) + on
    return found


def _alike(model: Model, chosen: list[Part], without: set[Part], share: Tensor, rng: random.Random) -> list[Part]:
    """For each feature another that is active, drawn from those that are so about as often; fewer where there are too few."""
    drawn: list[Part] = []
    for part in chosen:
        pool = others(model, part.kind, part.layer or 0, without | set(drawn))
        pool = [one for one in pool if float(share[one.index or 0]) > 0]
        size = share.clamp_min(float(share[share > 0].min()) / 2 if bool((share > 0).any()) else 1.0).log()
        pool.sort(key=lambda one: abs(float(size[one.index or 0] - size[part.index or 0])))
        drawn += [rng.choice(pool[:NEAREST])] if pool else []
    return drawn


def random_sets(model: Model, chosen: list[Part], draws: int, seed: int, active: Activity | None = None) -> list[Set]:
    """Up to `draws` different sets of as many other parts, of the same kinds, of the same layers where these have enough; of features,
    where `active` says how often each is active, ones that are so about as often."""
    rng, without = random.Random(f"ablation-{seed}"), set(chosen)
    places = sorted({(part.kind, part.layer or 0) for part in chosen})
    sets: dict[Set, None] = {}
    for _ in range(20 * draws):
        drawn: list[Part] = []
        for kind, layer in places:
            n = sum((part.kind, part.layer) == (kind, layer) for part in chosen)
            if active and (kind, layer) in active:
                mine = [part for part in chosen if (part.kind, part.layer) == (kind, layer)]
                found = _alike(model, mine, without | set(drawn), active[kind, layer], rng)
                if len(found) < n:
                    raise PatchbayError(
                        f"{n} features of layer {layer} were given, and too few others are active on these prompts for a random control of as many"
                    )
                drawn += found
                continue
            pool = others(model, kind, layer, without | set(drawn))
            if len(pool) < n:
                pool = [part for i in range(model.n_layers) for part in others(model, kind, i, without | set(drawn))]
            if len(pool) < n:
                raise PatchbayError(
                    f"{sum(part.kind == kind for part in chosen)} parts of kind {kind} were given, and the model has too few "
                    "others for a random control of as many; give fewer"
                )
            drawn += rng.sample(pool, n)
        sets[tuple(sorted(drawn))] = None
        if len(sets) == draws:
            break
    return list(sets)


def too_few(sets: Sequence[Set], draws: int) -> list[str]:
    """A note where there are not as many different random sets as were asked for."""
    if len(sets) >= draws:
        return []
    return [f"{draws} draws were asked; {len(sets)} different random sets were found: there are few other parts"]


# --- the runs -------------------------------------------------------------------------------------


def measured(
    model: Model, task: Task, conditions: Sequence[Set], by: By, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Score and rightness of every prompt without each condition's parts: two times [condition, prompt]."""
    task.check(model.vocab_size)
    needed = [{part.port() for part in parts} for parts in conditions]
    ports = sorted(set().union(*needed))
    means = _means(model, task, ports, batch_size) if by == "mean" else {}
    twins = _twins(task, seed) if by == "resample" else ()
    scores, right = torch.zeros(2, len(conditions), len(task), dtype=torch.float64)
    for prompts, which in _batches(task, len(conditions), batch_size):
        taken = {port: rows for port in ports if (rows := [i for i, at in enumerate(which) if port in needed[at]])}
        donors = _donors(model, task, prompts, twins, list(taken)) if by == "resample" and taken else {}
        edits = [_edit(port, by, rows, means, donors) for port, rows in taken.items()]
        trace = run(model, [list(task.clean[i]) for i in prompts], edits=edits, logits=task.reads)
        some = task[prompts]
        reference = run(model, some, logits="last").last_logits if task.metric == "kl" else None
        scores[which, prompts] = some.score(trace.read(task.reads), reference).double().cpu()
        right[which, prompts] = some.with_metric("accuracy").score(trace.last_logits).double().cpu()
    return scores, right


def _batches(task: Task, n_conditions: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, condition) of the rows of each batch; all prompts of a batch have one length, so that nothing is padded."""
    for same in by_length(task.clean):
        rows = [(i, c) for i in same for c in range(n_conditions)]
        for start in range(0, len(rows), size):
            prompts, which = zip(*rows[start : start + size], strict=True)
            yield list(prompts), list(which)


def _edit(port: Port, by: By, rows: list[int], means: dict[Port, Tensor], donors: dict[Port, Tensor]) -> Edit:
    if by == "zero":
        return edit.zero(port, rows=rows)
    if by == "mean":
        return edit.mean(port, means[port], rows=rows)
    return edit.replace(port, donors[port][rows], rows=rows)  # [row, position, ...]


def _means(model: Model, task: Task, ports: Sequence[Port], batch_size: int) -> dict[Port, Tensor]:
    """Each signal's mean over the positions of all prompts, [...feature]."""
    sums, count = dict.fromkeys(ports, torch.zeros(())), sum(map(len, task.clean))
    for start in range(0, len(task), batch_size):
        trace = run(model, task[start : start + batch_size], taps=ports, logits="last")
        for port in ports:
            sums[port] = sums[port] + trace[port].movedim(port.tapped_axis, 1).double().nansum((0, 1)).cpu()
    return {port: (total / count).float() for port, total in sums.items()}


def _twins(task: Task, seed: int) -> tuple[tuple[int, ...], ...]:
    """The prompt from which each prompt's signals are taken: its corrupted twin, or another prompt of the task."""
    if task.corrupted is not None and task.options.get("aligned", True):
        return task.corrupted
    if len(task) < 2:
        raise PatchbayError(
            f"resample needs corrupted twins of equal length, or a second prompt; task {task.name} has neither"
        )
    order = list(range(len(task)))
    random.Random(f"ablation-twins-{seed}").shuffle(order)
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return tuple(task.clean[after[i]] for i in range(len(task)))


def _donors(
    model: Model, task: Task, prompts: list[int], twins: Sequence[Sequence[int]], ports: list[Port]
) -> dict[Port, Tensor]:
    """Signals of each row's twin, lined up with the row's prompt at the end: [row, position, ...feature]."""
    unique = list(dict.fromkeys(prompts))
    trace = run(model, [list(twins[i]) for i in unique], taps=ports, logits="last")
    rows = torch.tensor([unique.index(i) for i in prompts])[:, None]  # [row, 1]
    n = len(task.clean[prompts[0]])
    place = (trace.lengths[rows] - n + torch.arange(n)).clamp_min(0)  # [row, position]
    return {port: trace[port].movedim(port.tapped_axis, 1)[rows, place] for port in ports}
