"""Attention sinks: attention heads that put much of their attention on the first token, whatever it is.

Of the first T = `length` tokens of a prompt, with A a head's attention pattern and positions counted from 1,

    alpha_k = mean over the queries i >= k of A[i, k]                    the attention that position k receives
    rate    = mean over prompts of 1[alpha_1 > epsilon]                  is the first token a sink of this head?

`sink_rate` is the mean of `rate` over all heads, `position_rate` [position] the same for every k. Even attention gives
alpha_1 = H_T / T (0.074 at T = 64: `uniform`), so that epsilon = 0.3 is about four times even. With and without the first token:
`elsewhere` is the share of prompts in which another position of the first half is a sink, `without_first` the same when the
first key is left out and the rest of each query's attention is scaled to 1. `mass` is the mean over queries of a row's sum: 1 of a softmax,
less with a null share (sinks as numbers, K bias, softmax1), anything of a sigmoid, and alpha is to be read beside it. What goes with a sink: `key_norm`, `value_norm` and
`hidden_norm`, the norm of the first token's key, value and incoming stream over the mean norm of the others' (a sink's value is
mostly small, its stream in trained large models massive). Intervals are 95 % bootstraps over prompts. One forward pass.

Gu et al. 2024, "When Attention Sink Emerges in Language Models: An Empirical View".

A rate near 0 is what small or little trained models have. It says where attention goes, not that the head does nothing: for
that, ablate it. Late positions are seen by few queries, which makes `position_rate` coarse there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._attention import (
    ATTENTION,
    FLOOR,
    GRID,
    Batch,
    Finder,
    Layer,
    Scores,
    held_out,
    pattern_layers,
    together,
)
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

SHARE = "share of prompts"
RATIO = "times the others' mean"
NUMBERS = ("alpha", "rate", "elsewhere", "without_first", "mass", "key_norm", "value_norm", "hidden_norm")


@method(paper="gu2024", unit="share of prompts")
def attention_sinks(
    model: Model,
    prompts: Task | list[str] | list[list[int]],
    *,
    epsilon: float = 0.3,
    length: int = 64,
    batch_size: int = 16,
) -> Result:
    """Share of prompts in which the first token receives more than `epsilon` of a head's attention, over the first `length` tokens.

    Any text will do; prompts shorter than `length` are taken whole. Main variable `rate` with `low` and `high`; `alpha`,
    `mass`, `elsewhere`, `without_first`, `key_norm`, `value_norm`, `hidden_norm` [layer], `position_rate` [position], `sink_rate`
    (mean over heads), `uniform` (alpha of even attention) and `held_out`.

    `epsilon`: the attention above which a head counts as a sink on a prompt, from 0 to 1. `length`: how many first
    tokens of each prompt are read.
    """
    encoded = model.encode(prompts)
    one = finder(model, encoded, epsilon=epsilon, length=length)
    return together(model, [ids[:length] for ids in encoded], [one], batch_size=batch_size)[0]


def finder(model: Model, encoded: list[list[int]], *, epsilon: float = 0.3, length: int = 64) -> Finder:
    """The finder for these prompts, for `together`."""
    layers = pattern_layers(model, "attention_sinks")
    if not 0.0 < epsilon < 1.0:
        raise PatchbayError(f"epsilon={epsilon}: attention lies between 0 and 1, so epsilon does too")
    if length < 2:
        raise PatchbayError(f"length={length}: a sink needs 2 tokens or more")
    short = next((i for i, ids in enumerate(encoded) if len(ids) < 2), None)
    if short is not None:
        raise PatchbayError(f"prompt {short} has 1 token; a sink needs 2 or more")
    used = [min(len(ids), length) for ids in encoded]

    def prepare(batch: Batch) -> Scores:
        lengths = torch.tensor(used[batch.start : batch.start + len(batch.ids)], device=batch.device)
        return lambda layer: _scores(model, layer, lengths, max(used), epsilon)

    def report(seen: Tensor) -> Result:
        return _report(seen, layers, used, length)

    taps = tuple(Port(signal, i) for i in layers for signal in ("attn.k", "attn.v", "resid_in"))
    return Finder(prepare, report, taps)


def _scores(model: Model, layer: Layer, lengths: Tensor, most: int, epsilon: float) -> Tensor:
    """[prompt, head, NUMBERS and then 1[alpha_k > epsilon] for `most` positions]."""
    n = min(layer.pattern.shape[-1], most)
    place = torch.arange(n, device=lengths.device)
    real = place < lengths[:, None]  # [prompt, position]
    pattern = layer.pattern[:, :, :n, :n].nan_to_num(0.0) * real[:, None, :, None]
    mass = pattern.sum(-1, keepdim=True)  # [prompt, head, query, 1]
    left = mass - pattern[..., :1]
    bare = pattern * torch.where(left > FLOOR, 1.0 / left, 0.0)
    n_seeing = torch.where(real, lengths[:, None] - place, torch.nan)[:, None]  # [prompt, 1, key]
    alpha, without = pattern.sum(2) / n_seeing, bare.sum(2) / n_seeing  # [prompt, head, key]
    others = ((place > 0) & (place <= lengths[:, None] // 2))[:, None]  # [prompt, 1, key]
    sinks = torch.where(alpha.isnan(), torch.nan, (alpha > epsilon).float())
    any_other = [((a > epsilon) & others).any(-1).float() for a in (alpha, without)]
    rows = torch.where(real[:, None], mass[..., 0], torch.nan).nanmean(-1)  # [prompt, head]
    norms = [_first_over_others(model, layer, signal, lengths) for signal in ("attn.k", "attn.v", "resid_in")]
    numbers = torch.stack([alpha[..., 0], sinks[..., 0], *any_other, rows, *norms], -1)  # [prompt, head, NUMBERS]
    return torch.cat([numbers, torch.nn.functional.pad(sinks, (0, most - n), value=torch.nan)], -1)


def _first_over_others(model: Model, layer: Layer, signal: str, lengths: Tensor) -> Tensor:
    """Norm of the first token's key, value or stream over the mean norm of the others', [prompt, head]."""
    norm = layer.trace[Port(signal, layer.index)].float().norm(dim=-1)  # [prompt, (group,) position]
    norm = norm[:, None] if norm.ndim == 2 else norm
    place = torch.arange(norm.shape[-1], device=norm.device)
    others = (place > 0) & (place < lengths[:, None])  # [prompt, position]
    mean = torch.where(others[:, None], norm, torch.nan).nanmean(-1)  # [prompt, group]
    ratio = norm[..., 0] / torch.where(mean > 0, mean, torch.nan)
    return ratio.repeat_interleave(model.n_heads(layer.index) // ratio.shape[1], 1)


def _report(seen: Tensor, layers: list[int], used: list[int], length: int) -> Result:
    by_name = dict(zip(NUMBERS, seen.unbind(-1), strict=False))  # each [prompt, layer, head]
    rate = by_name["rate"]
    _, low, high = maths.intervals(rate)
    units = {"alpha": ATTENTION, "mass": ATTENTION, "elsewhere": SHARE, "without_first": SHARE}
    units |= {"key_norm": RATIO, "value_norm": RATIO}
    best, notes = held_out(rate, SHARE)
    hidden = by_name["hidden_norm"][:, :, 0].nanmean(0)  # [layer]
    n_short = sum(n < length for n in used)
    if n_short:
        notes.append(f"{n_short} of {len(used)} prompts are shorter than {length} tokens and were taken whole")
    return Result(
        {
            "rate": (rate.mean(0), GRID, SHARE),
            "low": (low, GRID, SHARE),
            "high": (high, GRID, SHARE),
            **{name: (by_name[name].nanmean(0), GRID, unit) for name, unit in units.items()},
            "hidden_norm": (hidden, ("layer",), RATIO),
            "position_rate": (seen[..., len(NUMBERS) :].nanmean((0, 1, 2)), ("position",), SHARE),
            "sink_rate": (rate[:, layers].nanmean(), (), SHARE),
            "uniform": (sum(sum(1 / i for i in range(1, n + 1)) / n for n in used) / len(used), (), ATTENTION),
            **best,
        },
        notes=notes,
    )
