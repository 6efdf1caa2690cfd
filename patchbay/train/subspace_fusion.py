"""Subspace fusion: keep of what tuning changed only the entries under which lost behaviour comes back.

    m = sigma((l + logistic noise) / TEMPERATURE),   theta = base + m tau / mean(m),   tau = tuned - base, or several such changes merged (`_merging`: sum, TIES, DARE)

One l for each number that tuning changed; only l learns, by Adam, on - log p(right answer) of half of the prompts. Then m is cut to 0 and 1 (l above 0), and what is
kept is scaled up by its share, so that the change stays as large. m = 1 is the tuned model (to rounding), m = 0 the base (to the bit). The prompts are of what the base does and the
tuned model has lost; nothing in the loss asks for what tuning was for, so that `of_change`, the share of tau's length that is kept, says what was paid.

`merge={"mask": "head,neuron"}` has one l for all that tuning changed in a head, a neuron, an expert, a layer's attention or MLP, or a layer, in place of one for each number, and so
says of parts whether they may stay: the weights' counterpart of a mask over what parts say at a run (`prove.desiderata_mask`). What is in no such part is kept or left by tensor.

The control is a mask drawn at random, as many entries kept, or as many parts of each kind; on the half of the prompts that no l was learned on. Two entries whose changes have one sign and one
effect cannot be told apart, and the mean couples all: a mask says which entries suffice to leave out, not where behaviour lies.

Yi et al. 2024, "A safety realignment framework via subspace-oriented model fusion for large language models". There several
models share one mask before they are merged; here they are merged before it, which for a sum is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchbay import maths
from patchbay.errors import PatchbayError
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.tasks.task import Task
from patchbay.train._copies import copied, write
from patchbay.train._merging import merged, way_of
from patchbay.train._objectives._objective import collated
from patchbay.train._padded import refuse_padding
from patchbay.train._part_masks import Parts, parts_of

TEMPERATURE, START, BATCH = (
    0.5,
    1.0,
    16,
)  # of the mask; l at the start, where an entry is mostly kept; prompts of an update
EACH = "parts"  # under which a mask over parts stands
CONDITIONS = ("base", "tuned", "masked", "random")
Tensors = dict[str, Tensor]


@method(paper="yi2024")
def subspace_fusion(
    model: Model,
    tuned: Model,
    task: Task,
    *,
    merge: dict[str, Any] | None = None,
    folder: str | None = None,
    steps: int = 60,
    rate: float = 0.1,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """The task's score of the base, the tuned model, the masked one and one of a random mask, on prompts that no mask was learned on.

    `tuned`: the model that was tuned from this one. `merge`: others that were tuned from it too, and how all are made one change: `{"with": ["A", "B"], "by": "sum"}`, names or folders; ways are sum,
    ties (as `ties:keep=0.2`) and dare (`dare:drop=0.9`); what is called tuned in the Result is then the merged model; `"mask"`: the parts that have one number of the mask each, as `"head,mlp"` (head, group, neuron, expert, attn, mlp, layer), in place of all numbers. `folder`: where the masked model is written as a checkpoint; without, nowhere. `steps`: updates
    of the mask. `rate`: Adam's learning rate of l.

    Main variable `score` [condition] with ends; `gain` of the mask over the random one with its ends and `p`; `kept`, the share of
    changed numbers, and `of_change`. Tables: `tensors` with the share kept of each, `steps` with losses, of a mask over parts `parts` with l of each and whether it is kept.
    """
    task.check(model.vocab_size)
    _check(model, folder, steps, rate)
    if len(lengths := {len(prompt) for prompt in task.clean}) > 1:
        refuse_padding(model, lengths)
    changed, several = _changed(model, tuned, merge, seed)
    asked = (merge or {}).get("mask")
    parts = None if asked is None else parts_of(model, changed, asked)
    dev, test = task.split(0.5, seed)
    whole = fused(model, changed, {name: torch.ones_like(tau) for name, tau in changed.items()}) if several else tuned
    scores = {name: _score(one, test, batch_size) for name, one in (("base", model), ("tuned", whole))}
    logits, losses = learned_mask(model, changed, dev, steps, rate, seed, batch_size=batch_size, parts=parts)
    mask = {name: (one > 0).to(one.dtype) for name, one in logits.items()}
    other = _shuffled(mask, changed, seed) if parts is None else parts.spread(parts.shuffled(mask[EACH], seed))
    rows = [] if parts is None else parts.rows(logits[EACH], changed)
    mask = mask if parts is None else parts.spread(mask[EACH])
    masked, drawn = (fused(model, changed, one) for one in (mask, other))
    scores |= {name: _score(one, test, batch_size) for name, one in (("masked", masked), ("random", drawn))}
    ends = [maths.bootstrap_interval(scores[name]) for name in CONDITIONS]
    gain = maths.paired_interval(task.sign * scores["masked"], task.sign * scores["random"])
    written = None if folder is None else write(model, masked, Path(folder))
    n, left = (
        sum(float(one[changed[name] != 0].sum()) for name, one in some.items())
        for some in ({k: torch.ones_like(v) for k, v in mask.items()}, mask)
    )
    length = sum(float(tau.square().sum()) for tau in changed.values())
    return Result(
        {
            "score": ([one.mean for one in ends], ("condition",), task.unit),
            "low": ([one.low for one in ends], ("condition",), task.unit),
            "high": ([one.high for one in ends], ("condition",), task.unit),
            **{f"gain{end}": (v, (), task.unit) for end, v in zip(("", "_low", "_high"), gain, strict=True)},
            "p": (maths.permutation_p(scores["masked"], scores["random"]), (), "probability"),
            "kept": (left / n, (), "share of numbers"),
            "of_change": (sum(float((mask[name] * tau).square().sum()) for name, tau in changed.items()) / length, (), "share of squared length"),
        },
        coords={"condition": list(CONDITIONS)},
        tables={
            "tensors": [{"tensor": name, "kept": float(mask[name][tau != 0].mean()), "of": int((tau != 0).sum())} for name, tau in changed.items()],
            "steps": [{"step": i, "loss": loss} for i, loss in enumerate(losses)],
            **({"parts": rows} if rows else {}),
        },
        notes=[
            *[f"kept {sum(row['kept'] for row in rows)} of {len(rows)} parts"] * bool(rows),
            f"kept {left:,.0f} of {n:,.0f} numbers that tuning changed, in {len(changed)} tensors, scaled by {n / left if left else 0.0:.3g}",
            *[f"tuned is {several} models merged by {(merge or {}).get('by', 'sum')}"] * (several > 0),
            f"learned on {len(dev)} prompts, scored on {len(test)} others; the random mask keeps as many {'parts of each kind' if rows else 'numbers'}",
            f"the masked weights have the fingerprint {masked.fingerprint}" + (f" and are in {written}" if written else "; no folder was given, they are not kept"),
        ],
        provenance={"checkpoint": {"folder": written, "fingerprint": masked.fingerprint}},
    )  # fmt: skip


def _check(model: Model, folder: str | None, steps: int, rate: float) -> None:
    if steps < 1 or not 0 < rate < float("inf"):
        raise PatchbayError(f"steps={steps}, rate={rate}: 1 or more steps, and a rate above 0")
    if model._session is not None:
        raise PatchbayError(
            "fusion inside model.edited(...): the mask would be learned under those edits; leave the block"
        )
    if folder is not None and Path(folder).exists():
        raise PatchbayError(f"{folder} is already there; a checkpoint goes to a new folder")


def changes(model: Model, tuned: Model) -> Tensors:
    """tau of every tensor that tuning changed, in float32."""
    own, other = dict(model.hf.named_parameters()), dict(tuned.hf.named_parameters())
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in other.items()}:
        raise PatchbayError("the two models have other tensors: the tuned one is to be of the base's form")
    if not all(p.is_floating_point() and p.element_size() > 1 for p in own.values()):
        raise PatchbayError("weights that are quantised cannot be fused: load both models in a floating-point dtype")
    found = {name: other[name].detach().to(p.device).float() - p.detach().float() for name, p in own.items()}
    found = {name: tau for name, tau in found.items() if bool((tau != 0).any())}
    if not found:
        raise PatchbayError("the two models have the same weights: nothing was tuned")
    return found


def _changed(model: Model, tuned: Model, merge: dict[str, Any] | None, seed: int) -> tuple[Tensors, int]:
    """tau of one model, or of several merged, and how many these are; 0 of one alone."""
    own, table = changes(model, tuned), merge
    if merge is not None and isinstance(merge.get("mask"), str):  # for those who mask parts
        merge = {key: value for key, value in merge.items() if key != "mask"} or None
    if merge is None:
        return own, 0
    others, way = merge.get("with"), merge.get("by", "sum")
    named = isinstance(others, list) and others and all(isinstance(one, str) for one in others)
    if not named or not isinstance(way, str) or set(merge) - {"with", "by"}:
        raise PatchbayError(
            f'merge={table!r}: the names of other tuned models and how, as {{"with": ["A", "B"], "by": "ties:keep=0.2"}}, and kinds of parts, as {{"mask": "head,mlp"}}'
        )
    way_of(way)
    return merged([own, *(changes(model, load(one)) for one in others or [])], way, seed), 1 + len(others or [])


def mean_kept(mask: Tensors, changed: Tensors) -> Tensor:
    """The mean of a mask over the numbers that tuning changed."""
    total = torch.stack([(mask[name] * (tau != 0)).sum() for name, tau in changed.items()]).sum()
    return total / sum(int((tau != 0).sum()) for tau in changed.values())


def weights(model: Model, changed: Tensors, mask: Tensors) -> Tensors:
    """base + m tau / mean(m), of the tensors that changed; the base where nothing is kept."""
    own, share = dict(model.hf.named_parameters()), mean_kept(mask, changed)
    if float(share.detach()) == 0:
        return {name: own[name].detach().clone() for name in changed}
    return {
        name: (own[name].detach().float() + mask[name] * tau / share).to(own[name].dtype)
        for name, tau in changed.items()
    }


def fused(model: Model, changed: Tensors, mask: Tensors) -> Model:
    """A copy of the base with what the mask keeps."""
    made, now = copied(model), weights(model, changed, mask)
    with torch.no_grad():
        for name, parameter in made.hf.named_parameters():
            if name in now:
                parameter.copy_(now[name])
    made._fingerprint = None
    return made


def _shuffled(mask: Tensors, changed: Tensors, seed: int) -> Tensors:
    """As many entries kept, drawn among all that changed."""
    generator = torch.Generator().manual_seed(seed + 1)
    places = {name: (tau != 0) for name, tau in changed.items()}
    drawn = torch.cat([mask[name][real] for name, real in places.items()]).cpu()
    drawn = drawn[torch.randperm(len(drawn), generator=generator)]
    found, at = {}, 0
    for name, real in places.items():
        count = int(real.sum())
        found[name] = torch.zeros_like(mask[name]).masked_scatter(real, drawn[at : at + count].to(real.device))
        at += count
    return found


def learned_mask(
    model: Model,
    changed: Tensors,
    dev: Task,
    steps: int,
    rate: float,
    seed: int,
    *,
    batch_size: int = 16,
    parts: Parts | None = None,
) -> tuple[Tensors, list[float]]:
    """l of every entry after `steps` updates, or of every part (under `EACH`), and the loss of each update."""
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    like = changed if parts is None else {EACH: torch.zeros(len(parts.names), device=model.device)}
    logits = {name: torch.full_like(tau, START).requires_grad_() for name, tau in like.items()}
    fit = torch.optim.Adam(list(logits.values()), lr=rate, foreach=False)
    for _ in range(steps):
        rows = torch.randperm(len(dev), generator=generator)[:batch_size].tolist()
        noise = {
            name: torch.rand(tau.shape, generator=generator).clamp(1e-6, 1 - 1e-6).logit().to(tau.device)
            for name, tau in like.items()
        }
        with torch.enable_grad():
            mask = {name: torch.sigmoid((one + noise[name]) / TEMPERATURE) for name, one in logits.items()}
            mask = mask if parts is None else parts.spread(mask[EACH])
            loss = _loss(
                model, weights(model, changed, mask), [list(dev.clean[i]) for i in rows], [dev.right[i] for i in rows]
            )
            found = torch.autograd.grad(loss, list(logits.values()))
        for one, gradient in zip(logits.values(), found, strict=True):
            one.grad = gradient
        fit.step()
        losses.append(float(loss.detach()))
    return {name: one.detach() for name, one in logits.items()}, losses


def _loss(model: Model, now: Tensors, prompts: list[list[int]], right: list[Any]) -> Tensor:
    """Mean - log p of the right answers under other weights."""
    batch = {name: one.to(model.device) for name, one in collated([(ids, ids) for ids in prompts]).items()}
    masked = {} if bool(batch["attention_mask"].all()) else {"attention_mask": batch["attention_mask"]}
    output = torch.func.functional_call(
        model.hf, now, kwargs={"input_ids": batch["input_ids"], "use_cache": False, **masked}
    )
    last = output.logits[torch.arange(len(prompts)), batch["attention_mask"].sum(1) - 1]
    return nn.functional.cross_entropy(last.float(), torch.tensor(right, device=last.device))


def _score(model: Model, task: Task, batch_size: int = 32) -> Tensor:
    pieces = [run(model, task[i : i + batch_size], logits="last").last_logits for i in range(0, len(task), batch_size)]
    return task.score(torch.cat(pieces)).double().cpu()
