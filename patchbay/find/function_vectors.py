"""Function vectors: the heads that carry a task shown by examples, and the vector that they write together.

    z_h     = mean of head h's z at the last token, over prompts whose examples show the task
    AIE_h   = mean gain in score when z_h enters, at the last token, prompts whose examples are shuffled
    v       = sum of z_h W_O[h] over the `top` heads of the largest AIE

A task's prompts are the clean ones, its corrupted twins the same questions after examples with shuffled labels. Heads are ranked on half
of the prompts; v, their mean outputs, is made there too, and added to the stream leaving `layer` at the last token of the other half's
twins: `gain` with ends, beside as many other random heads (`random`, `p_gain`; of all, where fewer others are left), and at every other layer
(`gain_by_layer`, `random_by_layer`: the paper adds it near a third of the depth, and shows that later layers read it no more). The null puts in the means of the shuffled prompts
themselves (`null`): what a head's mean does without the task. Means of one head are exact: z by head, W_O by head, whatever the width
of a head is (nothing assumes d_model / heads). The factor by which a family scales what enters the stream is in v.

As a knob: `pb.Knob("task", [pb.add(f"L{layer}.resid_out", found["vector"], positions="last")], 1.0)`.

Todd et al. 2023, "Function Vectors in Large Language Models", sections 2.3 and 3. The paper's metric is the probability of the answer. A vector
that raises the answer need not be the task: raise its strength and watch other prompts (`measure.dose_response`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.sweeps.sweep import sweep
from patchbay.tasks.task import Task

FEW = 5  # of the draws, at all layers


@method(paper="todd2023")
def function_vectors(
    model: Model,
    task: Task,
    *,
    top: int = 10,
    layer: int | None = None,
    draws: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """The gain of each head's mean output in prompts that do not show the task, and the sum of those of the best heads.

    Main variable `effect` [layer, head] with `low`, `high`, `p`, `p_adjusted` and `null`; `vector` [d_model]; `gain`, `gain_low`,
    `gain_high`, `random` [draw], `p_gain`, `gain_by_layer` and `random_by_layer` [layer].

    `top`: how many heads make the vector (all, where there are fewer). `layer`: where it is added; without, a third of the way up.
    `draws`: sums of as many random heads, as the control.
    """
    heads, at = _asked(model, task, top, layer, draws)
    task.check(model.vocab_size)
    dev, test = task.split(seed=seed)
    means = _means(model, [list(ids) for ids in dev.clean], heads, batch_size)
    effects = _effects(model, dev, heads, means)  # [prompt, head]
    null = _effects(model, dev, heads, _means(model, [list(ids) for ids in dev.corrupted or ()], heads, batch_size))
    outs = torch.stack([_out(model, head, z) for head, z in zip(heads, means, strict=True)])  # [head, d_model]
    order = effects.mean(0).argsort(descending=True, stable=True).tolist()
    chosen = [heads[i] for i in order[:top]]
    vectors = outs[torch.tensor(_sets(order, min(top, len(heads)), draws, seed))].sum(
        1
    )  # the best heads', then the draws'
    gains = _gains(model, test, [at], vectors)[0]  # [set, prompt]
    every = _gains(model, test, list(range(model.n_layers)), vectors[: 1 + FEW])  # [layer, set, prompt]
    added = _of_vector(gains, every, task.unit)
    said = (
        f"{', '.join(map(str, chosen[:6]))}{', ...' if len(chosen) > 6 else ''}: their mean outputs, added at L{at}, move {len(test)} other prompts by "
        f"{added['gain'][0]:.3g} {task.unit}{maths.between(added['gain_low'][0], added['gain_high'][0])}, random heads by {float(gains[1:].mean()):.3g} "
        f"(p = {added['p_gain'][0]:.2g}); most at L{int(every[:, 0].mean(1).argmax())} ({float(every[:, 0].mean(1).max()):.3g})"
    )
    return Result(
        _of_heads(model, heads, effects, null, task.unit) | {"vector": (vectors[0], ("d_model",), "stream")} | added,
        highlights=chosen,
        notes=[said, *_normed(model, chosen)],
    )


def _asked(model: Model, task: Task, top: int, layer: int | None, draws: int) -> tuple[list[Part], int]:
    """All heads, and the layer where the vector is added; refuses what cannot be asked."""
    heads = [
        Part(i, "head", h)
        for i in range(model.n_layers)
        if "attn.z" in model.signals(i)
        for h in range(model.n_heads(i))
    ]
    if not heads:
        model.require(Port("attn.z", 0))  # raises: no layer has it
    if task.corrupted is None:
        raise PatchbayError(
            f"task {task.name} has no corrupted twins: a function vector needs prompts whose examples are shuffled"
        )
    at = model.n_layers // 3 if layer is None else layer
    if top < 1 or draws < 1 or not 0 <= at < model.n_layers:
        raise PatchbayError(
            f"top={top}, draws={draws}, layer={layer}: at least one of both, and layers are 0 to {model.n_layers - 1}"
        )
    return heads, at


def _sets(order: list[int], n: int, draws: int, seed: int) -> list[list[int]]:
    """The n best heads, and as many other random ones for each draw; of all, where fewer others are left."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(order[n:] if len(order) >= 2 * n else order)
    return [order[:n], *(pool[torch.randperm(len(pool), generator=generator)[:n]].tolist() for _ in range(draws))]


def _of_heads(model: Model, heads: list[Part], effects: Tensor, null: Tensor, unit: str) -> dict[str, Any]:
    """What is told of each head: effect with its ends, null and p."""
    p = maths.sign_flip_p(effects, floor=1e-6)
    mean, low, high = maths.intervals(effects)
    named = {"effect": mean, "low": low, "high": high, "null": null.mean(0), "p": p}
    named["p_adjusted"] = maths.benjamini_hochberg(p)
    units = {"p": "probability", "p_adjusted": "probability"}
    return {
        name: (_grid(model, heads, value), ("layer", "head"), units.get(name, unit)) for name, value in named.items()
    }


def _of_vector(gains: Tensor, every: Tensor, unit: str) -> dict[str, Any]:
    """What is told of the vector, [set, prompt] at its layer and [layer, set, prompt] at each: gain with its ends beside random heads."""
    gain = [float(end) for end in maths.intervals(gains[0][:, None])]
    drawn = gains[1:].mean(1)
    found: dict[str, Any] = {
        name: (value, (), unit) for name, value in zip(("gain", "gain_low", "gain_high"), gain, strict=True)
    }
    found |= {"random": (drawn, ("draw",), unit), "p_gain": (maths.draws_p(gain[0], drawn), (), "probability")}
    found["gain_by_layer"] = (every[:, 0].mean(1), ("layer",), unit)
    return found | {"random_by_layer": (every[:, 1:].mean((1, 2)), ("layer",), unit)}


def _means(model: Model, prompts: list[list[int]], heads: list[Part], batch_size: int) -> list[Tensor]:
    """Each head's mean z at the last token, [d_head]."""
    ports = [Port("attn.z", layer) for layer in dict.fromkeys(head.layer for head in heads)]
    sums: dict[int | None, Tensor | float] = {port.layer: 0.0 for port in ports}
    for start in range(0, len(prompts), batch_size):
        trace = run(model, prompts[start : start + batch_size], taps=ports, logits="last")
        for port in ports:
            sums[port.layer] = sums[port.layer] + trace.last(port).double().sum(0).cpu()
    return [torch.as_tensor(sums[head.layer])[head.index or 0] / len(prompts) for head in heads]


def _out(model: Model, head: Part, z: Tensor) -> Tensor:
    """What a head adds to the stream by its z, [d_model]."""
    W = model.W_O(head.layer or 0)[head.index or 0].detach().double().cpu()
    return z @ W * model.residual_scale


def _normed(model: Model, heads: list[Part]) -> list[str]:
    """A note where a family norms what attention adds, so that a head's own output is no term of the stream."""
    at = model.modules[heads[0].layer or 0]
    if at.attn_added is at.attn or at.attn_added is at.attn_proj:
        return []
    return [f"{model.family.name} norms what attention adds: the vector is the heads' sum before that norm"]


def _effects(model: Model, task: Task, heads: list[Part], means: list[Tensor]) -> Tensor:
    """Gain of each twin when a head's mean enters it at its last token, [prompt, head]."""
    entries = [edit.replace(head.port(), z.float(), positions=-1) for head, z in zip(heads, means, strict=True)]
    return _moved(model, task, entries).T


def _gains(model: Model, task: Task, layers: list[int], vectors: Tensor) -> Tensor:
    """Gain of each twin when a vector is added at its last token, leaving each layer: [layer, vector, prompt]."""
    entries = [edit.add(Port("resid_out", i), vector.float(), positions=-1) for i in layers for vector in vectors]
    return _moved(model, task, entries).unflatten(0, (len(layers), -1))


def _moved(model: Model, task: Task, entries: list[edit.Edit]) -> Tensor:
    task = task if task.metric != "kl" else task.with_metric("log_probability")
    swept = sweep(model, task, entries, on="corrupted")
    return task.sign * (swept["value"].double() - swept["base"].double())  # [edit, prompt]


def _grid(model: Model, heads: list[Part], values: Tensor) -> Tensor:
    grid = torch.full(
        (model.n_layers, max(model.n_heads(i) for i in range(model.n_layers))), torch.nan, dtype=torch.float64
    )
    for head, value in zip(heads, values, strict=True):
        grid[head.layer or 0, head.index or 0] = value
    return grid
