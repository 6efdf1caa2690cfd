"""Tune parts: fine-tune the weights of chosen parts and nothing else.

    loss = mean over prompts of - log p(right answer), by AdamW (weight decay .01) on the entries of the parts alone

A head's entries are its rows of W_Q and b_Q and its columns of W_O, and of W_K and W_V where no other head shares them (name
the group, "L3.KV1", for those); a neuron's what it reads and writes; an expert's its slice of the fused tensors; attention,
MLP, layer, router, embedding, final norm and unembedding are whole modules. Every other number is bit for bit what it
was: gradients and weight decay reach the chosen entries alone, and each tensor is compared by SHA-256 before and after, the
rest of a partly chosen tensor entry by entry; a difference is an error. The lent model is not touched: a copy is
trained, on half of the prompts, without dropout. Written to `folder`, the copy is a Hugging Face checkpoint.

This returns no knob: fine-tuning gives weights, not edits, has no neutral strength and needs gradients through the whole
model. `prove.cross_model_patching` compares the two models part by part.

Zhang et al. 2024, "Interpreting and Improving Large Language Models in Arithmetic Calculation", where only the heads and MLPs
that path patching singled out are tuned; under a knob, so that what it
brings is not learned, as in Chen et al. 2025, "Persona Vectors". A gain says that tuning these parts suffices, not that they are the place: tune
as many other parts, too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchbay import maths
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError
from patchbay.tasks.task import Task
from patchbay.train._copies import copied, write
from patchbay.train._entries import Entries, entries

DECAY = 0.01  # AdamW's, on the chosen entries alone
UNRELATED = (16, 12)  # texts of random tokens on which the drift is measured, and their length


@method(paper="zhang2024")
def tune_parts(
    model: Model,
    task: Task,
    parts: list[Part] | Part,
    *,
    folder: str | None = None,
    steps: int = 60,
    rate: float = 1e-3,
    under: Knob | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """The score before and after `steps` updates of the `parts` alone, on held-out prompts; the tuned model goes to `folder`.

    `parts`: as "L1.H2,L2.mlp", such as `result.top(3)`. `rate`: AdamW's learning rate. Main variable `score` [condition]
    (before, after) with ends, in the task's unit; `gain` with ends and `p`, `score_train`, and `drift`: the divergence of
    next-token distributions on random tokens. Tables: `tensors` that were tuned, with digests, and `steps` with losses.

    `folder`: where the tuned model is written as a checkpoint; without, nowhere. `steps`: updates of the weights.
    `under`: a knob that is on while the parts learn, and off where they are scored: what it brings by itself need not be learned
    (a `turn.persona_vector`, against its trait).
    """
    listed = list(dict.fromkeys([parts] if isinstance(parts, Part) else parts))
    _check(model, task, listed, folder, steps, rate)
    chosen = entries(model, listed)
    dev, test = task.split(0.5, seed)
    before, before_dev = (_score(model, half, batch_size) for half in (test, dev))
    tuned = copied(model)
    edits = [] if under is None else under.edits_at()
    losses = _fit(tuned, dev, chosen, edits, steps, rate, batch_size, seed)
    rows = _proved(model, tuned, chosen)
    written = None if folder is None else write(model, tuned, Path(folder))
    after, after_dev = (_score(tuned, half, batch_size) for half in (test, dev))
    sign = task.sign
    gain, p = maths.paired_interval(sign * after, sign * before), maths.permutation_p(after, before)
    ends = [maths.bootstrap_interval(one) for one in (before, after)]
    unit = test.unit if test.metric != "kl" else "nats"
    train = torch.stack([before_dev.mean(), after_dev.mean()])
    drift = maths.bootstrap_interval(_drift(model, tuned, seed))
    n_entries = sum(len(places) for places in chosen.values())
    return Result(
        {
            "score": ([one.mean for one in ends], ("condition",), unit),
            "low": ([one.low for one in ends], ("condition",), unit),
            "high": ([one.high for one in ends], ("condition",), unit),
            "score_train": (train, ("condition",), unit),
            **{f"gain{end}": (v, (), unit) for end, v in zip(("", "_low", "_high"), gain, strict=True)},
            "p": (p, (), "probability"),
            **{f"drift{end}": (v, (), "nats") for end, v in zip(("", "_low", "_high"), drift, strict=True)},
        },
        coords={"condition": ["before", "after"]},
        highlights=listed,
        tables={"tensors": rows, "steps": [{"step": i, "loss": loss} for i, loss in enumerate(losses)]},
        notes=[
            f"tuned {n_entries:,} of {sum(p.numel() for p in model.hf.parameters()):,} numbers, in {len(chosen)} tensors; the "
            "others are bit for bit what they were",
            f"trained on {len(dev)} prompts, scored on {len(test)} others"
            + ("" if under is None else f"; trained under the knob {under.name}, scored without it"),
            f"tuned weights have the fingerprint {tuned.fingerprint}"
            + (f" and are in {written}" if written else "; no folder was given, they are not kept"),
        ],
        provenance={"checkpoint": {"folder": written, "fingerprint": tuned.fingerprint}},
    )


def _check(model: Model, task: Task, parts: list[Part], folder: str | None, steps: int, rate: float) -> None:
    task.check(model.vocab_size)
    if not parts:
        raise PatchbayError("no parts to tune were given")
    if steps < 1 or not 0 < rate < float("inf"):
        raise PatchbayError(f"steps={steps}, rate={rate}: 1 or more steps, and a rate above 0")
    if model._session is not None:
        raise PatchbayError(
            "tuning inside model.edited(...): the copy would be trained under those edits; leave the block"
        )
    if folder is not None and Path(folder).exists():
        raise PatchbayError(f"{folder} is already there; a tuned checkpoint goes to a new folder")


# --- training -----------------------------------------------------------------------------------------


def _fit(
    tuned: Model,
    dev: Task,
    chosen: Entries,
    edits: list[Edit],
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
) -> list[float]:
    """Train the chosen entries in place; the loss of every step."""
    named = dict(tuned.hf.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_(False)
    masks, kept = {}, {}
    for name, places in chosen.items():
        mask = torch.zeros(named[name].numel(), dtype=torch.bool, device=named[name].device)
        mask[places.to(mask.device)] = True
        masks[name] = mask.reshape(named[name].shape)
        kept[name] = named[name].detach().clone()
        named[name].requires_grad_()
    tensors = [named[name] for name in chosen]
    fit = torch.optim.AdamW(tensors, lr=rate, weight_decay=DECAY, foreach=False)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        rows = torch.randperm(len(dev), generator=generator)[:batch_size].tolist()
        trace = run(tuned, [list(dev.clean[i]) for i in rows], edits=edits, logits="last", grad=True)
        target = torch.tensor([dev.right[i] for i in rows], device=trace.last_logits.device)
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(trace.last_logits.float(), target)
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        for name, tensor, gradient in zip(chosen, tensors, gradients, strict=True):
            tensor.grad = torch.zeros_like(tensor) if gradient is None else gradient.masked_fill(~masks[name], 0.0)
        fit.step()
        with torch.no_grad():  # weight decay moved all of each tensor: the rest goes back
            for name, tensor in zip(chosen, tensors, strict=True):
                tensor.copy_(torch.where(masks[name], tensor, kept[name]))
        losses.append(float(loss.detach()))
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise PatchbayError(
                f"the weights are no longer finite after {len(losses)} steps at rate {rate}: lower the rate"
            )
    for tensor in tensors:
        tensor.grad = None
    return losses


# --- what changed -------------------------------------------------------------------------------------


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data)).hexdigest()


def _proved(model: Model, tuned: Model, chosen: Entries) -> list[dict[str, Any]]:
    """A row for every tuned tensor; PatchbayError where a number outside the parts is not bit for bit what it was."""
    now, tied = tuned.hf.state_dict(), {p.data_ptr() for n, p in model.hf.named_parameters() if n in chosen}
    rows: list[dict[str, Any]] = []
    for name, tensor in model.hf.state_dict().items():
        before, after = _digest(tensor), _digest(now[name])
        if name not in chosen:
            if before != after and tensor.data_ptr() not in tied:
                raise PatchbayError(f"{name} is outside the parts and changed: a fault of tune_parts")
            continue
        rest = torch.ones(tensor.numel(), dtype=torch.bool)
        rest[chosen[name]] = False
        old, new = tensor.detach().cpu().flatten(), now[name].detach().cpu().flatten()
        if not torch.equal(_bits(old)[rest], _bits(new)[rest]):
            raise PatchbayError(f"{name} changed outside the parts: a fault of tune_parts")
        row: dict[str, Any] = {"tensor": name, "entries": len(chosen[name]), "of": tensor.numel()}
        row["largest_change"] = float((new.double() - old.double()).abs().max())
        rows.append(row | {"before": before[:16], "after": after[:16]})
    return rows


def _bits(flat: Tensor) -> Tensor:
    """Numbers as their bits, so that -0 and NaN count as what they are."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.contiguous().view(sizes[flat.element_size()])


def _score(model: Model, task: Task, batch_size: int) -> Tensor:
    task = task if task.metric != "kl" else task.with_metric("log_probability")
    pieces = [run(model, task[i : i + batch_size], logits="last").last_logits for i in range(0, len(task), batch_size)]
    return task.score(torch.cat(pieces)).double().cpu()


def _drift(model: Model, tuned: Model, seed: int) -> Tensor:
    """KL(before || after) of the next token after random tokens, nats, [text]."""
    drawn = torch.randint(model.vocab_size, UNRELATED, generator=torch.Generator().manual_seed(seed))
    pad = model.config.pad_token_id  # at which transformers warns that a mask is missing
    texts = torch.where(drawn == (-1 if pad is None else pad), (drawn + 1) % model.vocab_size, drawn).tolist()
    before, after = (run(one, texts, logits="last").last_logits.cpu() for one in (model, tuned))
    return maths.kl(before, after)
