"""Cross-model activation patching (CMAP): which signals of a tuned model, copied into its base, bring its answers.

Both models, of one shape, run on the same prompts. A signal of named parts (z of heads, or their q, k, v; a layer's
stream; what attention or an MLP adds; ...) is copied from the tuned model's run into the base model's run, at all
positions:

    effect = score(base with the tuned signal) - score(base)         gap = score(tuned) - score(base)

in the task's unit, turned round for rank and kl, where more is worse (kl is taken from the tuned model's run): positive
means nearer to the tuned model where that is better. One by one, and all together (`joint`; `share` = joint / gap).
Controls: as many random other parts of the same layers, with the same signals (`p_joint` = (1 + draws that bring as
much) / (1 + draws)). Intervals are 95 % bootstraps over prompts; `p` flips the signs of a part's effects, `p_adjusted`
holds the share of false finds over the parts. Cost: 2 + (parts + 1 + draws) forward passes. Copying from the base
itself changes no bit.

Where the models number their tokens otherwise (a vocabulary that was exchanged, as by `corpus.transtokens`), each token of the task is told to the tuned model by its text, so that
positions are the same; a token that it has not got is refused, and so is a metric of whole laws. Models that cut a text into other tokens are refused: their positions are of other pieces of it.

Keys and values belong to a key/value group: where query heads share them, k or v of a head is that of its whole group,
and the other heads of the group are changed too. The result says so; `restore` gives those other heads the z of the
base's own run, so that only the named heads use what was copied.

Prakash, Rott Shaham, Haklay, Belinkov and Bau 2024, "Fine-Tuning Enhances Existing Mechanisms". It shows that a
difference between the models passes through the signal, not where it came from: a late signal carries what earlier
weights changed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.prove._cells import batches, check_draws, ends, intervals, listed, p_values, rounding
from patchbay.prove._removal import Set, given_parts, random_sets, too_few
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task


@dataclass(frozen=True)
class Copied:
    """What is copied with a part: its ports, and z of the heads of its groups that are not meant."""

    ports: tuple[Port, ...]
    shared: tuple[Port, ...]


@method(paper="prakash2024")
def cross_model_patching(
    model: Model,
    tuned: Model,
    task: Task,
    parts: Result | list[Part] | Part,
    *,
    signal: str | None = None,
    restore: bool = False,
    top: int | None = None,
    draws: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """What signals of `parts`, copied from `tuned` into `model` (the base), do to the base's answers on the clean prompts.

    `parts`: parts or their text, or a Result, of which the first `top` are taken. `signal`: a signal of the parts, or
    several, "q,k,v" (default: z of heads, v of groups, act of neurons, out of the rest; a layer needs one of resid_in,
    resid_mid, resid_out). Main variable `effect` [part] with `low`, `high`, `p` and `p_adjusted`; `joint`, `gap`,
    `share` with their ends; `random` [draw], `difference` from it with its ends, `p_joint`; scores and accuracies of
    base, tuned and joint.

    `tuned`: the model whose signals are copied into the base. `restore`: give the other heads of a shared key/value
    group what they had. `top`: how many of a Result's parts are taken. `draws`: random sets of other parts, as the
    control.
    """
    _check_shape(model, tuned)
    task.check(model.vocab_size)
    theirs, numbered = _task_of(model, tuned, task)
    check_draws(draws)
    chosen = given_parts(parts, top, "copy")
    names = [None] if signal is None else [name.strip() for name in signal.split(",")]
    sets, notes = _controls(model, chosen, names, draws, seed)
    conditions: list[Set] = [tuple(chosen), *((part,) for part in chosen), *sets]
    copied = {part: _copied(model, part, names) for part in sorted({part for parts in conditions for part in parts})}
    scores, right = _measure(model, tuned, (task, theirs), conditions, copied, restore, batch_size)
    effects = task.sign * (scores[2:] - scores[0])  # [condition, prompt]
    gap = task.sign * (scores[1] - scores[0])
    single = effects[1 : 1 + len(chosen)].T  # [prompt, part]
    effect, low, high = intervals(single)
    p, adjusted = p_values(single, rounding(scores))
    values = {
        "effect": (effect, ("part",), task.unit),
        "low": (low, ("part",), task.unit),
        "high": (high, ("part",), task.unit),
        "p": (p, ("part",), "probability"),
        "p_adjusted": (adjusted, ("part",), "probability"),
        **ends("joint", maths.bootstrap_interval(effects[0]), task.unit),
        **ends("gap", maths.bootstrap_interval(gap), task.unit),
        **ends("share", [x[0] for x in intervals(effects[0][:, None], gap)], "share of the gap"),
        **{f"score_{name}": (scores[i].mean(), (), task.unit) for i, name in enumerate(("base", "tuned", "joint"))},
        **{
            f"accuracy_{name}": (right[i].mean(), (), "share of prompts")
            for i, name in enumerate(("base", "tuned", "joint"))
        },
    }
    if sets:
        drawn = effects[1 + len(chosen) :]  # [draw, prompt]
        values |= ends("difference", maths.beyond_draws(effects[0], drawn), task.unit)
        values |= {
            "random": (drawn.mean(1), ("draw",), task.unit),
            "p_joint": (maths.draws_p(float(effects[0].mean()), drawn.mean(1)), (), "probability"),
        }
    notes = [_summary(task, chosen, effects, gap, sets), *_groups(model, chosen, copied, restore), *numbered, *notes]
    return Result(values, parts=chosen, notes=notes)


def _task_of(model: Model, tuned: Model, task: Task) -> tuple[Task, list[str]]:
    """The task in the numbers that the tuned model has for its tokens, and a note where these are others. PatchbayError where a token is none of its."""
    if model.tokenizer is None or tuned.tokenizer is None or model.tokenizer is tuned.tokenizer:
        return task, []
    theirs = tuned.tokenizer.get_vocab()
    used = sorted({i for ids in (*task.clean, *((task.right, *task.wrong) if task.right else ())) for i in ids})
    other = dict(zip(used, (_number(model.tokenizer, tuned.tokenizer, i, theirs) for i in used), strict=True))
    moved = [i for i in used if other[i] != i]
    if not moved and model.vocab_size == tuned.vocab_size:
        return task, []
    if lacking := [i for i in used if other[i] is None or other[i] >= tuned.vocab_size]:  # type: ignore[operator]
        told = ", ".join(repr(model.tokenizer.convert_ids_to_tokens(i)) for i in lacking[:4])
        raise PatchbayError(
            f"{len(lacking)} tokens of the task are none of the tuned model's ({told}): signals are copied position by position, so that both have to read the prompts "
            "in the same tokens, under whatever numbers; leave out the prompts that hold them"
        )
    if task.metric == "kl" or callable(task.metric):
        raise PatchbayError(
            f"base and tuned have other tokens or other numbers for them, and the metric {task.metric if isinstance(task.metric, str) else 'is a function, which'} "
            "compares whole next-token laws; give one of answers, such as logit_diff"
        )
    said = {i: n for i, n in other.items() if n is not None}
    again = replace(
        task,
        clean=tuple(tuple(said[i] for i in ids) for ids in task.clean),
        right=tuple(said[i] for i in task.right) if task.right else task.right,
        wrong=tuple(tuple(said[i] for i in ids) for ids in task.wrong) if task.right else task.wrong,
        corrupted=None,
    )
    note = f"{len(moved)} of the {len(used)} tokens of the task have other numbers in the tuned model: each is told by its text"
    return again, [note]


def _number(own: Any, other: Any, i: int, theirs: dict[str, int]) -> int | None:
    """The number of a token of one tokenizer in another: of its text there, or of the special token that does the same; its own where that is nobody's; None
    where it is another token's."""
    found = theirs.get(own.convert_ids_to_tokens(i))
    for name in ("bos", "eos", "pad", "unk"):
        if found is None and getattr(own, f"{name}_token_id", None) == i:
            found = getattr(other, f"{name}_token_id", None)
    return i if found is None and i not in theirs.values() else found


# --- what is copied -------------------------------------------------------------------------------------


def _check_shape(model: Model, tuned: Model) -> None:
    """Raise PatchbayError that names every size in which the two models differ."""
    unlike = []
    told = model.tokenizer is not None and tuned.tokenizer is not None  # a token is known by its text
    sizes = ("n_layers", "d_model") if told else ("n_layers", "d_model", "vocab_size")
    if model.family.name != tuned.family.name:
        unlike.append(f"family {model.family.name} and {tuned.family.name}")
    unlike += [
        f"{name} {getattr(model, name)} and {getattr(tuned, name)}"
        for name in sizes
        if getattr(model, name) != getattr(tuned, name)
    ]
    for layer in range(min(model.n_layers, tuned.n_layers)):
        mine, theirs = model.signals(layer), tuned.signals(layer)
        if mine != theirs:
            unlike.append(f"layer {layer}: signals {', '.join(sorted(set(mine) ^ set(theirs)))} in one alone")
            continue
        counts = ["n_heads", "n_groups", "d_head"] if "attn.z" in mine else []
        counts += [name for name, of in (("n_neurons", "mlp.act"), ("n_experts", "experts.out")) if of in mine]
        pairs = [(name, getattr(model, name)(layer), getattr(tuned, name)(layer)) for name in counts]
        unlike += [f"layer {layer}: {name} {a} and {b}" for name, a, b in pairs if a != b]
    if unlike:
        raise PatchbayError(
            f"signals are copied between models of one shape; base and tuned have {'; '.join(unlike[:6])}"
            + (f"; and {len(unlike) - 6} more" if len(unlike) > 6 else "")
        )


def _copied(model: Model, part: Part, names: Sequence[str | None]) -> Copied:
    ports, shared = [], []
    for name in names:
        port = part.port(name)
        if part.kind == "head" and port.signal in ("attn.k", "attn.v"):
            model.require(part.port("z"))
            port = model.port(f"{part}.{name}")  # of its group
            layer = part.layer or 0
            size = model.n_heads(layer) // max(1, model.n_groups(layer))
            heads = range((port.index or 0) * size, (port.index or 0) * size + size)
            shared += [Port("attn.z", layer, i) for i in heads if i != part.index]
        model.require(port)
        ports.append(port)
    return Copied(tuple(dict.fromkeys(ports)), tuple(dict.fromkeys(shared)))


def _controls(
    model: Model, chosen: list[Part], names: Sequence[str | None], draws: int, seed: int
) -> tuple[list[Set], list[str]]:
    """Random sets of as many other parts of the same kinds; none, and a note, where the model has too few.

    A set that holds a port of the chosen parts (another head of a group whose keys are copied) is no control.
    """
    layers = [part for part in chosen if part.kind == "layer"]
    others = [part for part in chosen if part.kind != "layer"]
    free = [Part(i, "layer") for i in range(model.n_layers) if Part(i, "layer") not in layers]
    if len(free) < len(layers):
        return [], [f"no random control: {len(layers)} layers were given, there are {len(free)} others"]
    try:
        sets = random_sets(model, others, 4 * draws, seed) if others else [()] * 4 * draws
    except PatchbayError as error:
        return [], [f"no random control: {error}"]
    rng = random.Random(f"cross_model_patching-{seed}")
    drawn = dict.fromkeys(tuple(sorted((*one, *rng.sample(free, len(layers))))) for one in sets)
    taken = {port for part in chosen for port in _copied(model, part, names).ports}
    found = [
        one for one in drawn if taken.isdisjoint(port for part in one for port in _copied(model, part, names).ports)
    ]
    return found[:draws], too_few(found, draws)


# --- the runs -------------------------------------------------------------------------------------------


def _measure(
    model: Model,
    tuned: Model,
    tasks: tuple[Task, Task],
    conditions: Sequence[Set],
    copied: dict[Part, Copied],
    restore: bool,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Score and rightness of every prompt: base, tuned, then the base with each condition's parts; [2 + condition, prompt]. `tasks`: the
    task in the numbers of the base's tokens, and of the tuned model's."""
    task, theirs = tasks
    scores, right = torch.zeros(2, 2 + len(conditions), len(task), dtype=torch.float64)
    ports = sorted({port for one in copied.values() for port in one.ports})
    spare = sorted({port for one in copied.values() for port in one.shared}) if restore else []
    for prompts in batches(task, batch_size):
        some, ids = task[prompts], [list(task.clean[i]) for i in prompts]
        donor = run(tuned, [list(theirs.clean[i]) for i in prompts], taps=ports, logits=task.reads)
        own = run(model, ids, taps=spare, logits=task.reads)
        values = {port: donor[port].movedim(port.tapped_axis, 1) for port in ports}
        kept = {port: own[port].movedim(port.tapped_axis, 1) for port in spare}

        def note(
            at: int, trace: Trace, some: Task = some, prompts: list[int] = prompts, of: Tensor = donor.last_logits
        ) -> None:
            logits, last = (x.to(of.device) for x in (trace.read(task.reads), trace.last_logits))
            asked = theirs[prompts] if at == 1 else some
            scores[at, prompts] = asked.score(logits, of if task.metric == "kl" else None).double().cpu()
            right[at, prompts] = asked.with_metric("accuracy").score(last).double().cpu()

        note(0, own)
        note(1, donor)
        for at, parts in enumerate(conditions):
            note(2 + at, run(model, ids, edits=_edits(parts, copied, values, kept), logits=task.reads))
    return scores, right


def _edits(parts: Set, copied: dict[Part, Copied], values: dict[Port, Tensor], kept: dict[Port, Tensor]) -> list[Edit]:
    """Tuned values at the parts' ports, and the base's own z at the heads that share a group with them unmeant."""
    meant = {Port("attn.z", part.layer, part.index) for part in parts if part.kind == "head"}
    ports = dict.fromkeys(port for part in parts for port in copied[part].ports)
    shared = dict.fromkeys(port for part in parts for port in copied[part].shared if port in kept and port not in meant)
    return [edit.replace(port, values[port]) for port in ports] + [edit.replace(port, kept[port]) for port in shared]


# --- words ----------------------------------------------------------------------------------------------


def _summary(task: Task, chosen: list[Part], effects: Tensor, gap: Tensor, sets: Sequence[Set]) -> str:
    text = f"from the tuned model, {listed(chosen)} together: {effects[0].mean():.3g} {task.unit} of a gap of {gap.mean():.3g}"
    if sets:
        text += f"; random parts {effects[1 + len(chosen) :].mean():.3g}"
    ends = maths.bootstrap_interval(gap)
    if len(gap) == 1:
        return text  # one prompt: no interval that could be clear of anything
    return text + ("; the gap itself is not clear of 0" if not (ends.low > 0.0 or ends.high < 0.0) else "")


def _groups(model: Model, chosen: Sequence[Part], copied: dict[Part, Copied], restore: bool) -> list[str]:
    """Which whole groups were copied, and with which heads."""
    groups: dict[Port, list[Port]] = {}
    for part in chosen:
        for port in copied[part].ports if copied[part].shared else ():
            if port.signal in ("attn.k", "attn.v"):
                groups.setdefault(port, []).extend(copied[part].shared)
    meant = {Port("attn.z", part.layer, part.index) for part in chosen}
    notes = []
    for port, shared in groups.items():
        others = sorted({other.part for other in shared if other not in meant})
        if others:
            fate = "which keep the base's own z" if restore else "which use it too"
            notes.append(f"{port} is the whole group's: it also serves {', '.join(map(str, others))}, {fate}")
    return notes
