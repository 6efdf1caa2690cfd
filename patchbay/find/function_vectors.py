"""Function vectors: the heads that carry a task shown by examples, and the vector that they write together.

    z_h     = mean of head h's z at the last token, over prompts whose examples show the task
    AIE_h   = mean gain in score when z_h enters, at the last token, prompts whose examples are shuffled
    v       = sum of z_h W_O[h] over the `top` heads of the largest AIE

A task's prompts are the clean ones, its corrupted twins the same questions after examples with shuffled labels. Heads are ranked on half
of the prompts; v, their mean outputs, is made there too, and added to the stream leaving `layer` at the last token of the other half's
twins: `gain` with ends, beside as many other random heads (`random`, `p_gain`; of all, where fewer others are left). The null puts in the means of the shuffled prompts
themselves (`null`): what a head's mean does without the task. Means of one head are exact: z by head, W_O by head, whatever the width
of a head is (nothing assumes d_model / heads). The factor by which a family scales what enters the stream is in v.

As a knob: `pb.Knob("task", [pb.add(f"L{layer}.resid_out", found["vector"], positions="last")], 1.0)`.

Todd et al. 2023, "Function Vectors in Large Language Models", sections 2.3 and 3. The paper's metric is the probability of the answer. A vector
that raises the answer need not be the task: raise its strength and watch other prompts (`measure.dose_response`).
"""

from __future__ import annotations

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
    `gain_high`, `random` [draw], `p_gain`.

    `top`: how many heads make the vector (all, where there are fewer). `layer`: where it is added; without, a third of the way up.
    `draws`: sums of as many random heads, as the control.
    """
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
    task.check(model.vocab_size)
    dev, test = task.split(seed=seed)
    means = _means(model, [list(ids) for ids in dev.clean], heads, batch_size)
    effects = _effects(model, dev, heads, means)  # [prompt, head]
    null = _effects(model, dev, heads, _means(model, [list(ids) for ids in dev.corrupted or ()], heads, batch_size))
    p = maths.sign_flip_p(effects, floor=1e-6)
    mean, low, high = maths.intervals(effects)
    order = mean.argsort(descending=True, stable=True).tolist()
    outs = torch.stack([_out(model, head, z) for head, z in zip(heads, means, strict=True)])  # [head, d_model]
    n = min(top, len(heads))
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(order[n:] if len(order) >= 2 * n else order)  # other heads, where there are as many
    sets = [order[:n], *(pool[torch.randperm(len(pool), generator=generator)[:n]].tolist() for _ in range(draws))]
    gains = _gains(model, test, at, outs[torch.tensor(sets)].sum(1))  # [set, prompt]
    gain = [float(end) for end in maths.intervals(gains[0][:, None])]
    p_gain = maths.draws_p(gain[0], gains[1:].mean(1))
    named = {
        "effect": mean,
        "low": low,
        "high": high,
        "null": null.mean(0),
        "p": p,
        "p_adjusted": maths.benjamini_hochberg(p),
    }
    grid, units = ("layer", "head"), {"p": "probability", "p_adjusted": "probability"}
    chosen = [heads[i] for i in order[:n]]
    said = (
        f"{', '.join(map(str, chosen[:6]))}{', ...' if n > 6 else ''}: their mean outputs, added at L{at}, move {len(test)} other prompts by {gain[0]:.3g} "
        f"{task.unit}{maths.between(gain[1], gain[2])}, random heads by {float(gains[1:].mean()):.3g} (p = {p_gain:.2g})"
    )
    return Result(
        {name: (_grid(model, heads, value), grid, units.get(name, task.unit)) for name, value in named.items()}
        | {"vector": (outs[torch.tensor(order[:n])].sum(0), ("d_model",), "stream")}
        | {name: (value, (), task.unit) for name, value in zip(("gain", "gain_low", "gain_high"), gain, strict=True)}
        | {"random": (gains[1:].mean(1), ("draw",), task.unit), "p_gain": (p_gain, (), "probability")},
        highlights=chosen,
        notes=[said, *_normed(model, chosen)],
    )


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


def _gains(model: Model, task: Task, layer: int, vectors: Tensor) -> Tensor:
    """Gain of each twin when a vector is added at its last token, [vector, prompt]."""
    port = Port("resid_out", layer)
    return _moved(model, task, [edit.add(port, vector.float(), positions=-1) for vector in vectors])


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
