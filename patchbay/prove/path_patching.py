"""Path patching: what one part tells another part, or the logits, by the path between them alone.

A sender's output is taken from the twin run while every other head (attention or mixer) keeps the output that it had,
so that the change reaches a receiver only along the stream:

    run 1   sender <- twin; all other attention frozen; MLPs recomputed (or frozen: the stream alone)
    direct  the score of run 1: the sender's path to the logits
    run 2   a plain run in which the receivers' q, k, v (or an MLP's input) are what they were in run 1

    noising     base run clean, sender from the corrupted twin: effect = score(base) - score(patched)
    denoising   base run corrupted, sender from the clean one:  effect = score(patched) - score(base)

both positive where the path carries the answer (turned round for rank and kl). `relative` = (p(patched) - p(base)) /
p(base), p the probability of the right answer: negative under noising where the path is needed. `share` = effect over
the whole gap between the clean and the corrupted run. A sender that comes after every receiver has no path and no
value (NaN). `joint` patches all senders at once. Rows of one batch are senders by prompts, each
compared with an unpatched row at its own place of a batch: as many forward passes as there are senders and one batch
more, twice that with receivers. Intervals are 95 % bootstraps over prompts; `p` flips signs prompt by prompt,
`p_adjusted` holds the share of false finds over all senders.

Goldowsky-Dill, MacLeod, Sato and Arora 2023, "Localizing Model Behavior with Path Patching"; receivers as in Wang et
al. 2022, "Interpretability in the Wild". With MLPs recomputed a "direct" path may pass through MLPs: compare with
`mlps="frozen"`. Frozen heads keep outputs that may no longer fit the stream; a path that carries little may stand in
for another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.prove._cells import at_end, batches, check_twins, intervals, p_values, rounding
from patchbay.results.arrays import heads_and_mlps
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port, as_part
from patchbay.tasks.task import Task

Mlps = Literal["recomputed", "frozen"]
Way = Literal["noising", "denoising"]
Senders = tuple[Part, ...]
RECEIVED = {"head": ("q", "k", "v"), "group": ("k", "v"), "mlp": ("in",)}  # what a receiver reads, by kind of part
WHERE = {"attn.q": 0.0, "attn.k": 0.0, "attn.v": 0.0, "mlp.in": 0.5}  # where in its layer it is read
SENT = {"head": 0.25, "attn": 0.25, "mlp": 0.75}  # where in its layer a part writes


@method(paper="goldowskydill2023")
def path_patching(
    model: Model,
    task: Task,
    *,
    senders: list[Part] | None = None,
    receivers: list[str] | None = None,
    mlps: Mlps = "recomputed",
    way: Way = "noising",
    batch_size: int = 64,
) -> Result:
    """What each sender tells the receivers directly, sender by sender: the effect on the score when that alone changes.

    `senders`: heads, MLPs or whole attentions; without, every head, and every MLP in the variable `mlp` [layer].
    `receivers`: None is the logits; else parts and ports, "L2.H1" (its q, k and v), "L2.H1.q", "L1.mlp"; keys and
    values belong to a whole group of grouped-query heads. Main variable `effect` with `low` and `high`, in the task's
    unit; `share`, `relative`, `p`, `p_adjusted`; `joint` with its ends, and the scores `clean` and `corrupted`.

    `mlps`: let MLPs on the way be "recomputed", or keep them "frozen". `way`: the sender from the corrupted twin into
    the clean run ("noising"), or the other way ("denoising").
    """
    one_of("mlps", mlps, ("recomputed", "frozen"))
    one_of("way", way, ("noising", "denoising"))
    check_twins(model, task)
    given = _senders(model, senders)
    ports = _receivers(model, receivers)
    heard = [part for part in given if _reaches(model, part, ports)]
    if not heard:
        raise PatchbayError(
            f"no sender comes before the receivers {', '.join(map(str, ports))}: there is no path to patch"
        )
    if senders is None and all(part.kind == "mlp" for part in heard):
        raise PatchbayError(
            f"no head comes before the receivers {', '.join(map(str, ports))}; MLPs do and can be named: "
            f"senders=[{', '.join(map(repr, map(str, heard)))}]"
        )
    conditions: list[Senders] = [*((part,) for part in heard), tuple(heard)]
    seen = _measure(model, task, conditions, ports, mlps == "frozen", way, batch_size)
    effects = seen.effect[:, :-1]  # [prompt, sender]
    named = dict(zip(("effect", "low", "high"), intervals(effects), strict=True))
    gap = task.sign * (seen.clean - seen.corrupted)
    named["share"] = intervals(effects, gap)[0]
    named["relative"] = seen.relative[:, :-1].mean(0)
    named["p"], named["p_adjusted"] = p_values(effects, rounding(seen.clean, seen.corrupted))
    units = {
        "share": "share of the gap",
        "relative": "relative change",
        "p": "probability",
        "p_adjusted": "probability",
    }
    joint = [float(x) for x in intervals(seen.effect[:, -1])]
    values, parts = _arranged(model, given, heard, named, listed=senders is not None)
    return Result(
        {name: (value, axes, units.get(name.removeprefix("mlp_"), task.unit)) for name, (value, axes) in values.items()}
        | {name: (x, (), task.unit) for name, x in zip(("joint", "joint_low", "joint_high"), joint, strict=True)}
        | {"clean": (seen.clean.mean(), (), task.unit), "corrupted": (seen.corrupted.mean(), (), task.unit)},
        parts=parts,
        notes=_notes(model, ports, heard, named, joint, mlps, way),
    )


# --- senders and receivers ----------------------------------------------------------------------------


def _senders(model: Model, senders: list[Part] | None) -> list[Part]:
    if senders is None:
        if not any("attn.z" in model.signals(layer) for layer in range(model.n_layers)):
            model.require(Port("attn.z", 0))  # raises: no layer has it
        layers = range(model.n_layers)
        heads = [Part(i, "head", h) for i in layers if "attn.z" in model.signals(i) for h in range(model.n_heads(i))]
        return heads + [Part(i, "mlp") for i in layers if "mlp.out" in model.signals(i)]
    chosen = list(dict.fromkeys(senders))
    if not chosen:
        raise PatchbayError("no senders were given")
    for part in chosen:
        if part.kind not in SENT:
            raise PatchbayError(
                f"{part}: a sender is a head, an MLP or a whole attention, such as L3.H5, L3.mlp or L3.attn"
            )
        model.require(part.port())
    return chosen


def _receivers(model: Model, receivers: list[str] | None) -> list[Port]:
    """The ports that read; none means the logits."""
    asked = ["logits"] if receivers is None else [receivers] if isinstance(receivers, str) else list(receivers)
    if any(str(item) == "logits" for item in asked):
        if len(asked) > 1:
            raise PatchbayError("receivers: the logits alone, or parts alone; measure the two paths apart")
        return []
    ports: list[Port] = []
    for item in asked:
        ports += _read(model, item)
    if not ports:
        raise PatchbayError(
            "no receivers were given; possible are L2.H1, L2.H1.q, L2.KV0.k, L1.mlp, or None for the logits"
        )
    return list(dict.fromkeys(ports))


def _read(model: Model, item: object) -> list[Port]:
    """The ports of one receiver, from its text, a Part, a Port or a view."""
    if isinstance(item, Port) or (isinstance(item, str) and item.rpartition(".")[2] in ("q", "k", "v", "in")):
        port = model.port(str(item))
        if port.signal not in WHERE:
            raise PatchbayError(f"{item}: a receiver reads q, k, v or an MLP's input")
        return [port]
    part = as_part(item)  # type: ignore[arg-type]
    if part.kind not in RECEIVED:
        raise PatchbayError(
            f"{part}: a receiver is a head, a key/value group or an MLP, such as L2.H1, L2.H1.q, L1.mlp"
        )
    return [model.port(f"{part}.{signal}") for signal in RECEIVED[part.kind]]


def _reaches(model: Model, part: Part, receivers: Sequence[Port]) -> bool:
    """Whether the part writes before any receiver reads; where blocks run side by side, an MLP reads what attention
    reads.
    """
    if not receivers:
        return True
    sent = (part.layer or 0) + SENT[part.kind]
    return any(
        sent < (port.layer or 0) + (0.0 if model.modules[port.layer or 0].mid is None else WHERE[port.signal])
        for port in receivers
    )


# --- the runs -----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Effects in the task's metric and relative changes of p(answer) [prompt, condition]; scores [prompt]."""

    effect: Tensor
    relative: Tensor
    clean: Tensor
    corrupted: Tensor


def _measure(
    model: Model, task: Task, conditions: list[Senders], receivers: list[Port], frozen: bool, way: str, size: int
) -> Seen:
    n = len(task)
    blank = torch.zeros(n, len(conditions), dtype=torch.float64)
    seen = Seen(blank, blank.clone(), torch.zeros(n).double(), torch.zeros(n).double())
    for prompts in batches(task, max(1, size // 16)):
        some, certain = task[prompts], task[prompts].with_metric("probability")
        clean, corrupted = [list(ids) for ids in some.clean], [list(ids) for ids in some.corrupted or ()]
        base, twin = (clean, corrupted) if way == "noising" else (corrupted, clean)
        paths = Paths(model, base, twin, receivers, frozen, task.reads)
        logits = (paths.base.read(task.reads), paths.twin.read(task.reads))
        reference = logits[0] if way == "noising" else logits[1]
        for side, of in ((seen.clean, 0 if way == "noising" else 1), (seen.corrupted, 1 if way == "noising" else 0)):
            side[prompts] = some.score(logits[of], reference).double().cpu()
        for which, *both in paths.run(conditions, max(1, size // len(prompts))):
            plain, patched = (torch.stack([some.score(row, reference).double().cpu() for row in side]) for side in both)
            before, after = (torch.stack([certain.score(at_end(row)).double().cpu() for row in side]) for side in both)
            change = task.sign * (plain - patched if way == "noising" else patched - plain)  # [condition, prompt]
            place = (torch.tensor(prompts)[:, None], torch.tensor(which))
            seen.effect[place], seen.relative[place] = change.T, ((after - before) / before).T
    return seen


class Paths:
    """Prompts of one length, the signals of their base and twin runs, and the edits that open one path and no other."""

    def __init__(
        self,
        model: Model,
        base: list[list[int]],
        twin: list[list[int]],
        receivers: list[Port],
        frozen: bool,
        reads: str,
    ) -> None:
        self.model, self.prompts, self.receivers, self.frozen, self.reads = model, base, receivers, frozen, reads
        taps = [
            Port(s, i)
            for i in range(model.n_layers)
            for s in ("attn.z", "attn.out", "mlp.out")
            if s in model.signals(i)
        ]
        self.base = run(model, base, taps=taps, logits=reads)
        self.twin = run(model, twin, taps=taps, logits=reads)

    def run(self, conditions: list[Senders], n_at_once: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Places of some conditions, and logits [condition, prompt, vocab], or of all positions, of unpatched rows and patched.

        All batches have one shape (the last goes back over some conditions): a row is compared with an unpatched one at
        its own place in a batch, where rounding is the same.
        """
        n = min(n_at_once, len(conditions))
        plain = self._logits([()] * n)
        for start in range(0, len(conditions), n):
            which = list(range(min(start, len(conditions) - n), min(start + n, len(conditions))))
            yield which, plain, self._logits([conditions[i] for i in which])

    def _logits(self, conditions: list[Senders]) -> Tensor:
        """What the metric reads, [condition, prompt, ...]; with receivers, of the run in which they alone are changed."""
        rows = [(condition, prompt) for condition in conditions for prompt in range(len(self.prompts))]
        ids = [self.prompts[prompt] for _, prompt in rows]
        trace = run(self.model, ids, taps=self.receivers, edits=self.edits(rows), logits=self.reads)
        if self.receivers:
            heard = [edit.replace(port, trace[port]) for port in self.receivers]
            trace = run(self.model, ids, edits=heard, logits=self.reads)
        return trace.read(self.reads).unflatten(0, (-1, len(self.prompts)))

    def edits(self, rows: list[tuple[Senders, int]]) -> list[Edit]:
        """Each row: all attention (and frozen MLPs) from the base run, then what its senders write, from the twin."""
        made: list[Edit] = []
        for layer in range(self.model.n_layers):
            sending: dict[Part, list[int]] = {}
            for row, (senders, _) in enumerate(rows):
                for part in senders:
                    if part.layer == layer:
                        sending.setdefault(part, []).append(row)
            attn, mlp = sending.pop(Part(layer, "attn"), []), sending.pop(Part(layer, "mlp"), [])
            offered, every = self.model.signals(layer), range(len(rows))
            frozen = "attn.z" if "attn.z" in offered else "attn.out"
            made += self._put(Port(frozen, layer), self.base, every, rows)
            for part, some in sorted(sending.items()):
                made += self._put(part.port(), self.twin, some, rows)
            made += self._put(Port("attn.out", layer), self.twin, attn, rows)
            if self.frozen and "mlp.out" in offered:
                made += self._put(Port("mlp.out", layer), self.base, every, rows)
            made += self._put(Port("mlp.out", layer), self.twin, mlp, rows)
        return made

    def _put(self, port: Port, source: Trace, which: Sequence[int], rows: list[tuple[Senders, int]]) -> list[Edit]:
        """That signal of the source run, each row its own prompt's; nothing for no rows."""
        if not which:
            return []
        return [edit.replace(port, source[port][[rows[row][1] for row in which]], rows=which)]


# --- the result ---------------------------------------------------------------------------------------


def _arranged(
    model: Model, given: list[Part], heard: list[Part], named: dict[str, Tensor], *, listed: bool
) -> tuple[dict[str, tuple[Tensor, tuple[str, ...]]], list[Part] | None]:
    """Values [heard sender] on the axes of the result: (part), or (layer, head) with MLPs beside on (layer)."""
    if listed:
        at = {part: i for i, part in enumerate(heard)}
        full = {
            name: torch.stack([value[at[part]] if part in at else value.new_tensor(torch.nan) for part in given])
            for name, value in named.items()
        }
        return {name: (value, ("part",)) for name, value in full.items()}, given
    widest = 1 + max(part.index or 0 for part in given)
    out: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
    beside: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
    for name, value in named.items():
        heads, mlp = heads_and_mlps(heard, value, model.n_layers, widest)
        out[name] = (heads, ("layer", "head"))
        if name in ("effect", "low", "high", "p_adjusted"):
            beside["mlp" if name == "effect" else f"mlp_{name}"] = (mlp, ("layer",))
    return out | (beside if any(part.kind == "mlp" for part in heard) else {}), None


def _notes(
    model: Model,
    ports: list[Port],
    heard: list[Part],
    named: dict[str, Tensor],
    joint: list[float],
    mlps: str,
    way: str,
) -> list[str]:
    effect = named["effect"]
    best = int(effect.abs().argmax())
    clear = maths.clear(named["p_adjusted"], "senders")
    to = ", ".join(map(str, ports)) or "the logits"
    notes = [
        f"{way}, to {to}, MLPs {mlps}: {heard[best]} has the largest effect, {float(effect[best]):.3g}; all senders "
        f"together {joint[0]:.3g}" + (f"; {clear}" if clear else "")
    ]
    for port in ports:
        layer = port.layer or 0
        shared = model.n_heads(layer) // model.n_groups(layer) if port.signal in ("attn.k", "attn.v") else 1
        if shared > 1:
            notes.append(f"{port} belongs to {shared} query heads: what it receives reaches all of them")
    return notes
