"""Tuned lens: an affine map for each layer, trained so that the stream there, unembedded, says what the model says in the end.

    loss = mean over tokens and layers of KL(model || unembed(final_norm(h + A h + b))),  A and b by Adam from 0

so that training starts from the logit lens. The model's weights are not touched and get no gradient. A tenth of the texts is held out and
never trained on: `kl` [layer] is theirs, with ends over texts, beside `kl_logit_lens`, that of A = b = 0. The null is a second lens, trained the
same way on the model's distributions of OTHER tokens of the batch (rows shuffled by the seed): what a map reaches that knows only how often
tokens are said. A layer that is not below its null has nothing that an affine map could read. Each step is one forward pass of `batch_size`
texts and two unembeddings of every layer, with their backward passes.

Written to `folder` as the tuned-lens package names its tensors, in safetensors (`features/lens.py`).

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens" (there by SGD with momentum on 250 steps of
262,144 tokens).

It can use what the model does not: a low divergence says that an affine map reads the answer there, not that the model does. See
`aligned` of `find.tuned_lens`, where the trained lens is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.features import lens as lenses
from patchbay.features.lens import Lens, depths, stream_ports
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task
from patchbay.train._stream import shuffled

ALIKE = 1e-4  # of a KL: what rounding in another order may differ by


@method(paper="belrose2023", unit="nats")
def tuned_lens(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    steps: int = 150,
    rate: float = 3e-3,
    folder: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """KL(model || lens) of held-out texts after each layer, of a tuned lens trained on the others; the lens goes to `folder`.

    Variables `kl` [layer] with `low` and `high`, `kl_logit_lens` and `null` [layer] (trained on shuffled rows); the last layer, which
    is the model itself, has no map and no row. Table `steps`: the loss of each.

    `prompts`: the texts, two or more. `steps`: updates of the maps, of `batch_size` texts each. `rate`: Adam's learning rate, which falls to
    0 in a straight line. `folder`: where the lens is written; without, it is not kept.
    """
    encoded = model.encode(prompts)
    if steps < 1 or not 0 < rate < float("inf") or batch_size < 1:
        raise PatchbayError(
            f"steps={steps}, rate={rate}, batch_size={batch_size}: 1 or more steps and texts, and a rate above 0"
        )
    if len(encoded) < 2:
        raise PatchbayError(
            f"{len(encoded)} text: one is held out and others are trained on, so that two or more are needed"
        )
    if folder is not None and Path(folder).exists():
        raise PatchbayError(f"{folder} is already there; a trained lens goes to a new folder")
    order = shuffled(len(encoded), seed, "held out")
    held = [encoded[i] for i in order[: max(1, len(order) // 10)]]
    seen = [encoded[i] for i in order[len(held) :]]
    own, null, rows = _fit(model, seen, steps, rate, batch_size, seed)
    written = None if folder is None else lenses.save(own, folder)
    return _result(model, (own, null, _zero(model)), held, rows, written, batch_size, seed)


def _zero(model: Model) -> Lens:
    """The logit lens: maps that change nothing."""
    n, d = model.n_layers, model.d_model
    return Lens(torch.zeros(n, d, d), torch.zeros(n, d), adds=True, made=lenses.described(model))


def _streams(model: Model, texts: list[list[int]]) -> tuple[list[Tensor], Tensor, list[int]]:
    """Streams of all rows but the last, each [token, d_model], the model's logits [token, vocab], and how many tokens each text has."""
    ports = stream_ports(model)[:-1]
    trace = run(model, texts, taps=ports)
    real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None]  # [prompt, position]
    return (
        [trace[port][real.to(trace[port].device)] for port in ports],
        trace.logits[real.to(trace.logits.device)],
        trace.lengths.tolist(),
    )


def _divergence(model: Model, lens: Lens, depth: int, state: Tensor, said: Tensor) -> Tensor:
    """KL(model || lens) [token] at one depth, in nats."""
    log_p = said.float().log_softmax(-1)
    read = model.unembed_logits(model.final_norm_module.forward(lens(depth, state))).float().log_softmax(-1)
    return (log_p.exp() * (log_p - read).masked_fill(log_p.isinf(), 0.0)).sum(-1)


def _fit(
    model: Model, seen: list[list[int]], steps: int, rate: float, batch_size: int, seed: int
) -> tuple[Lens, Lens, list[dict[str, Any]]]:
    """The lens, its null, and a row for each step."""
    own, null = (_trainable(_zero(model), model.device) for _ in range(2))
    params = [own.weight, own.bias, null.weight, null.bias]
    adam = torch.optim.Adam(params, lr=rate, betas=(0.9, 0.999))
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        chosen = torch.randperm(len(seen), generator=generator)[:batch_size].tolist()
        states, said, _ = _streams(model, [seen[i] for i in chosen])
        other = said[torch.randperm(len(said), generator=generator).to(said.device)]
        with torch.enable_grad():
            losses = [
                torch.stack([_divergence(model, lens, i, x, target).mean() for i, x in enumerate(states)]).mean()
                for lens, target in ((own, said), (null, other))
            ]
            gradients = torch.autograd.grad(losses[0] + losses[1], params)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        for group in adam.param_groups:
            group["lr"] = rate * (1 - step / steps)
        adam.step()
        rows.append({"step": step, "loss": float(losses[0].detach()), "null": float(losses[1].detach())})
    return _finished(own), _finished(null), rows


def _trainable(lens: Lens, device: torch.device) -> Lens:
    weight, bias = (x.to(device).requires_grad_() for x in (lens.weight, lens.bias))
    return Lens(weight, bias, lens.adds, lens.made)


def _finished(lens: Lens) -> Lens:
    return Lens(lens.weight.detach().cpu(), lens.bias.detach().cpu(), lens.adds, lens.made)


@torch.no_grad()
def _told(model: Model, lens: Lens, held: list[list[int]], batch_size: int) -> tuple[Tensor, Tensor]:
    """Summed divergence of each held-out text [text, depth], and its tokens [text]."""
    sums, counts = [], []
    for start in range(0, len(held), batch_size):
        states, said, lengths = _streams(model, held[start : start + batch_size])
        each = torch.stack([_divergence(model, lens, i, x, said).double().cpu() for i, x in enumerate(states)], 1)
        sums += [piece.sum(0) for piece in each.split(lengths)]
        counts += lengths
    return torch.stack(sums), torch.tensor(counts, dtype=torch.float64)


def _result(
    model: Model, three: tuple[Lens, Lens, Lens], held: list[list[int]], rows: list[dict[str, Any]], written: str | None,
    batch_size: int, seed: int,
) -> Result:  # fmt: skip
    told = [_told(model, lens, held, batch_size) for lens in three]
    mean, low, high = maths.intervals(*told[0], seed=seed)
    null, plain = (sums.sum(0) / counts.sum() for sums, counts in told[1:])
    variables: dict[str, Any] = {"kl": mean, "kl_logit_lens": plain, "null": null}
    variables |= {} if len(held) < 2 else {"low": low, "high": high}
    names = depths(model)[:-1]
    least = (null * (1 - ALIKE)).tolist()  # nearer than rounding tells apart is not below
    blind = [name for name, value, chance in zip(names, mean.tolist(), least, strict=True) if value >= chance]
    tokens = int(told[0][1].sum())
    notes = [
        f"{tokens} held-out tokens of {len(held)} texts: KL at {names[0]} {float(mean[0]):.3g} nats (logit lens {float(plain[0]):.3g}, "
        f"shuffled rows {float(null[0]):.3g}), at {names[-1]} {float(mean[-1]):.3g} ({float(plain[-1]):.3g}, {float(null[-1]):.3g})",
        "the maps are learned and can use what the model does not: see `aligned` of find.tuned_lens",
        f"written to {written}" if written else "no folder was given: the lens is not kept",
    ]
    notes += [f"not below the lens of shuffled rows: {', '.join(blind)}"] if blind else []
    return Result(
        {name: (value, ("layer",), "nats") for name, value in variables.items()},
        coords={"layer": names},
        tables={"steps": rows},
        notes=notes,
    )
