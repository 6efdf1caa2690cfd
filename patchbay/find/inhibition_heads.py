"""Inhibition heads (S-inhibition): heads that tell the movers' queries which of the candidates not to look at.

    preference(run)   = mean over movers m of A_m[last, right] - A_m[last, wrong]
    inhibition[l, h]  = mean over prompts of preference(clean) - preference(clean, m's query told what h says on the
    twin)

The head's output at the last position is taken from the corrupted twin and carried to the movers' queries by the
stream alone (all other heads and all MLPs as they were): the path from h to the query of m. Positive: what the head
says there turns the movers from the wrong answer's places to the right one's. With the same queries set in a plain
run, `effect` is what the score loses. `random` is the inhibition of a random direction as long as the head's change
(the mean of `draws`): what any push of that size does. Beside it where the head itself looks: `looks_at_wrong`,
attention from the last position to the last place of a wrong answer (S2), `without_first`, the same as a share of
what is not paid to the first token, and `looks_at_right`. p flips signs prompt by prompt; `p_adjusted` over all heads
that come before a mover. Two forward passes per head, prompt and draw, in batches. Heads at or after every mover have
no value.

Wang, Variengien, Conmy, Shlegeris and Steinhardt 2022, "Interpretability in the Wild".

Movers are given, or chosen by `find.name_mover_heads` on half of the prompts, and everything is measured on the other
half. It shows who can change these queries directly: an inhibition through an MLP or through keys is not seen, and a
head that only carries what an earlier one found scores as high as one that found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.find._chance import standard_error
from patchbay.find._direct import head_layers, normed_after, places
from patchbay.find._movers import best_movers
from patchbay.model.given import by_length
from patchbay.model.linear import bias_of
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.arrays import on_grid
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

WHAT = "inhibition_heads"
N_MOVERS = 3


@method(paper="wang2022", unit="attention")
def inhibition_heads(
    model: Model, task: Task, *, movers: list[Part] | None = None, draws: int = 2, batch_size: int = 32, seed: int = 0
) -> Result:
    """What each head, by the stream alone, does to the attention of the movers: from wrong to right, mean over prompts.

    `movers`: heads whose queries are watched; without, up to 3 name movers, chosen on one half of the prompts and
    watched on the other. Needs corrupted twins of equal length, and prompts that contain their right and their wrong
    answers.

    `draws`: random directions pushed in each head's place, as the null.
    """
    layers = head_layers(model, WHAT)
    if draws < 1:
        raise PatchbayError(f"draws={draws}: at least 1 random direction is needed to compare with")
    _check(model, task)
    chosen, tested, notes = _movers(model, task, movers, batch_size, seed)
    last = max(part.layer or 0 for part in chosen)
    senders = [Part(i, "head", h) for i in layers if i < last for h in range(model.n_heads(i))]
    if not senders:
        raise PatchbayError(
            f"{WHAT}: no head comes before the movers {_listed(chosen)}, so none can change their queries"
        )
    seen = _measure(model, tested, senders, chosen, draws, batch_size, seed)
    widest = max(model.n_heads(i) for i in range(model.n_layers))
    found = {
        name: on_grid(senders, value, model.n_layers, widest) for name, value in seen.items()
    }  # [prompt, layer, head]
    p = maths.sign_flip_p(found["inhibition"], floor=1e-6)
    axes, unit = ("layer", "head"), {"effect": task.unit}
    score = found["inhibition"].mean(0)
    clear = (maths.benjamini_hochberg(p) <= 0.05) & (score > found["random"].mean(0))
    return Result(
        {
            "inhibition": (score, axes, "attention"),
            "standard_error": (standard_error(found["inhibition"]), axes, "attention"),
            **{
                name: (found[name].mean(0), axes, unit.get(name, "attention")) for name in found if name != "inhibition"
            },
            "p": (p, axes, "probability"),
            "p_adjusted": (maths.benjamini_hochberg(p), axes, "probability"),
        },
        notes=[
            *notes,
            *(
                [f"{int((clear & (score > 0)).sum())} of {len(senders)} heads at adjusted p <= 0.05 and above random"]
                if len(found["inhibition"]) > 1
                else []
            ),
        ],
        highlights=chosen,
    )


# --- what is asked ------------------------------------------------------------------------------------


def _check(model: Model, task: Task) -> None:
    task.check(model.vocab_size)
    if task.corrupted is None or any(len(a) != len(b) for a, b in zip(task.clean, task.corrupted, strict=True)):
        raise PatchbayError(
            f"{WHAT}: task {task.name} has no corrupted twins of equal length, from which to take what a head says otherwise"
        )
    rows = zip(task.clean, task.right, task.wrong, strict=True)
    lacking = [i for i, (ids, right, wrong) in enumerate(rows) if right not in ids or not set(wrong) & set(ids)]
    if lacking:
        raise PatchbayError(
            f"{WHAT}: {len(lacking)} of {len(task)} prompts lack their right or their wrong answer (first: prompt {lacking[0]}), "
            "so there is nothing to look at or away from; use a task such as indirect_object"
        )


def _movers(
    model: Model, task: Task, movers: list[Part] | None, batch_size: int, seed: int
) -> tuple[list[Part], Task, list[str]]:
    """The heads to watch, the prompts to watch them on, and a note on the choice."""
    if movers is not None:
        chosen = list(dict.fromkeys(movers))
        for part in chosen:
            if part.kind != "head":
                raise PatchbayError(f"{part}: a mover is a head, such as L2.H1")
            model.require(part.port("q"))
        if not chosen:
            raise PatchbayError(f"{WHAT}: no movers were given; leave movers out to have them chosen")
        return chosen, task, [f"watched: {_listed(chosen)}, given"]
    if len(task) < 4:
        raise PatchbayError(
            f"{WHAT}: {len(task)} prompts cannot be halved to choose movers on one half; give 4 or more, or movers="
        )
    dev, test = task.split(0.5, seed)
    rows = best_movers(model, dev, WHAT, n=N_MOVERS, batch_size=batch_size)
    chosen = [Part(layer, "head", head) for layer, head, _, _ in rows]
    said = ", ".join(f"L{i}.H{h} ({logits:.2g} logits, p {p:.2g})" for i, h, logits, p in rows)
    return chosen, test, [f"watched: {said}, chosen on {len(dev)} prompts and watched on the other {len(test)}"]


def _listed(parts: list[Part]) -> str:
    return ", ".join(map(str, parts))


# --- the runs -------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Prompts of one length with their clean and twin runs."""

    ids: list[list[int]]
    clean: Trace
    twin: Trace


def _measure(
    model: Model, task: Task, senders: list[Part], movers: list[Part], draws: int, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Each measured number [prompt, sender]."""
    names = ("inhibition", "effect", "random", "looks_at_wrong", "without_first", "looks_at_right")
    out = {name: torch.zeros(len(task), len(senders), dtype=torch.float64) for name in names}
    generator = torch.Generator().manual_seed(seed)
    for prompts in by_length(task.clean, batch_size):
        some = task[prompts]
        pair = _pair(model, some, movers, senders)
        right = places(model, pair.ids, [(token,) for token in some.right])
        wrong = places(model, pair.ids, list(some.wrong)) & ~right
        every = slice(None)
        base = _preference(pair.clean, every, movers, right, wrong)
        reference = pair.clean.last_logits
        score = some.score(reference, reference).double().cpu()
        sign = task.sign
        changes = torch.stack([_said(model, pair, sender) for sender in senders])  # [sender, prompt, d_model]
        noise = torch.randn((draws, *changes.shape), generator=generator).to(changes)
        noise = noise * changes.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        told = partial(_told, model, pair, movers=movers, n_at_once=max(1, batch_size // len(prompts)))
        for at, row, trace in told(senders, changes):
            out["inhibition"][prompts, at] = base - _preference(trace, row, movers, right, wrong)
            logits = trace.last_logits[row]
            out["effect"][prompts, at] = sign * (score - some.score(logits, reference).double().cpu())
        for draw in noise:
            for at, row, trace in told(senders, draw):
                out["random"][prompts, at] += (base - _preference(trace, row, movers, right, wrong)) / draws
        for at, sender in enumerate(senders):
            for name, value in _looks(pair.clean, sender, right, wrong).items():
                out[name][prompts, at] = value
    return out


def _pair(model: Model, task: Task, movers: list[Part], senders: list[Part]) -> Pair:
    layers = sorted({part.layer or 0 for part in senders})
    taps = [Port("attn.z", i) for i in layers] + [Port("resid_in", i) for i in sorted({m.layer or 0 for m in movers})]
    looks = [Port("attn.pattern", i, None, (-1,)) for i in sorted({part.layer or 0 for part in (*senders, *movers)})]
    ids = [list(prompt) for prompt in task.clean]
    clean = run(model, ids, taps=[*taps, *looks], logits="last")
    return Pair(
        ids, clean, run(model, [list(p) for p in task.corrupted or ()], taps=taps[: len(layers)], logits="last")
    )


def _said(model: Model, pair: Pair, sender: Part) -> Tensor:
    """What the stream gains at the last position when the head alone says what it says on the twin, [prompt, d_model]."""
    layer, head = sender.layer or 0, sender.index or 0
    at, w_o = model.modules[layer], model.W_O(layer).detach()
    z, other = (side.last(Port("attn.z", layer)) for side in (pair.clean, pair.twin))
    change = (other[:, head] - z[:, head]) @ w_o[head]
    if normed_after(model, layer):
        bias = bias_of(at.attn_proj)
        total = torch.einsum("phd,hdm->pm", z, w_o) + (0.0 if bias is None else bias.detach())
        assert at.attn_added is not None
        with torch.no_grad():
            change = at.attn_added.forward(total + change) - at.attn_added.forward(total)
    return change * model.residual_scale


def _told(
    model: Model, pair: Pair, senders: list[Part], changes: Tensor, *, movers: list[Part], n_at_once: int
) -> Iterator[tuple[int, slice, Trace]]:
    """Plain runs but for the movers' queries, which read the stream with a sender's change [sender, prompt, d_model] at its end.

    Several senders go in one batch: the place of each, its rows, and the trace. Movers that come before a sender read
    the stream as it was.
    """
    looks = [Port("attn.pattern", i, None, (-1,)) for i in sorted({m.layer or 0 for m in movers})]
    n = len(pair.ids)
    for start in range(0, len(senders), n_at_once):
        some = range(start, min(start + n_at_once, len(senders)))
        ids, told = pair.ids * len(some), []
        for layer in sorted({m.layer or 0 for m in movers}):
            port = Port("resid_in", layer)
            heads = [Port("attn.q", layer, m.index) for m in movers if m.layer == layer]
            stream = pair.clean.last(port)
            streams = [stream + changes[at] if (senders[at].layer or 0) < layer else stream for at in some]
            moved = edit.replace(port, torch.cat(streams)[:, None], positions=[-1])
            trace = run(model, ids, taps=heads, edits=[moved], logits="last")
            told += [edit.replace(head, trace.last(head)[:, None], positions=[-1]) for head in heads]
        trace = run(model, ids, taps=looks, edits=told, logits="last")
        yield from ((at, slice(k * n, (k + 1) * n), trace) for k, at in enumerate(some))


def _row(trace: Trace, part: Part) -> Tensor:
    """A head's attention from the last position, [prompt, key]."""
    return trace[Port("attn.pattern", part.layer, None, (-1,))][:, part.index or 0, 0].double().cpu()


def _preference(trace: Trace, rows: slice, movers: list[Part], right: Tensor, wrong: Tensor) -> Tensor:
    """Attention of the movers to the right answer's places minus the wrong ones', mean over movers, of some rows [prompt]."""
    paid = [_row(trace, mover)[rows] for mover in movers]
    return torch.stack([(row * right).sum(1) - (row * wrong).sum(1) for row in paid]).mean(0)


def _looks(trace: Trace, sender: Part, right: Tensor, wrong: Tensor) -> dict[str, Tensor]:
    """Where the sender itself looks from the last position, each [prompt]."""
    row = _row(trace, sender)
    last = wrong & (wrong.flip(1).cumsum(1).flip(1) == 1)  # the last place of a wrong answer
    rest = (row.sum(1) - row[:, 0]).clamp_min(1e-9)  # a row may sum to less or more than 1
    return {
        "looks_at_wrong": (row * last).sum(1),
        "without_first": (row * last)[:, 1:].sum(1) / rest,
        "looks_at_right": (row * right).sum(1),
    }
