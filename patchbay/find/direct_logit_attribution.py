"""Direct logit attribution: what each part writes towards the answer, in logits.

The final stream is the sum of what the parts wrote: embedding, heads, attention's own biases, MLPs. With the final norm
frozen at the scale s that it had on this prompt, the logit difference is linear in that stream, so it is the sum over parts
of

    attribution(part) = (c(part) / s * gain) . u + shares of the biases,    u = W_U[right] - mean of W_U[wrong]

with c the centring, where the norm centres. A norm after attention or MLP (Gemma 2, OLMo 2) is frozen in the same way, and
so is a soft cap on the logits. The parts sum to the model's logit difference: `sum_error` is the largest difference
over prompts, and is rounding. Where a prompt has no wrong answer, u = W_U[right] - mean of W_U over the vocabulary. One
forward pass.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; per head and answer pair as in Yu, Merullo and
Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models".

It shows direct effects alone. A head that acts through later layers scores near 0, or with the wrong sign: never
label a part from this; follow with `prove.ablation`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from patchbay.errors import one_of
from patchbay.model.linear import bias_of
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.model.weights import matrix, norm_parts
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

PartKind = Literal["head", "neuron", "expert", "layer"]
SIGNAL = {"head": "attn.z", "neuron": "mlp.act", "expert": "experts.out", "layer": "attn.out"}


@method(paper="elhage2021", unit="logits")
def direct_logit_attribution(model: Model, task: Task, *, part: PartKind = "head", batch_size: int = 32) -> Result:
    """Direct contribution of every part to the logit difference at the last position, mean over prompts, in logits.

    `part`: what is ranked: head, neuron, expert, or layer (its attention and MLP together). Beside the ranking:
    `standard_error` over prompts; `embed`, `attn_bias` [layer] (biases of attention, or all of a mixer without heads),
    `mlp` [layer], `bias` (of final norm and unembedding), `total` (the model's own logit difference) and `sum_error`.
    """
    one_of("part", part, SIGNAL)
    if not any(SIGNAL[part] in model.signals(layer) for layer in range(model.n_layers)):
        possible = [
            kind for kind, signal in SIGNAL.items() if any(signal in model.signals(i) for i in range(model.n_layers))
        ]
        raise PatchbayError(
            f"part={part!r}: no layer of this {model.family.name} model has {SIGNAL[part]}; possible are {', '.join(possible)}"
        )
    task.check(model.vocab_size)
    with torch.no_grad():
        pieces = [_attribute(model, task[i : i + batch_size], part) for i in range(0, len(task), batch_size)]
    seen = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}  # each [prompt, ...]
    ranked, axes = seen["part"], ("layer",) if part == "layer" else ("layer", part)
    error = ranked.std(0) / len(task) ** 0.5 if len(task) > 1 else torch.full_like(ranked[0], torch.nan)
    return Result(
        {
            "attribution": (ranked.mean(0), axes, "logits"),
            "standard_error": (error, axes, "logits"),
            "mlp": (seen["mlp"].mean(0), ("layer",), "logits"),
            "attn_bias": (seen["attn_bias"].mean(0), ("layer",), "logits"),
            "embed": (seen["embed"].mean(0), (), "logits"),
            "bias": (seen["bias"].mean(0), (), "logits"),
            "total": (seen["total"].mean(0), (), "logits"),
            "sum_error": ((seen["sum"] - seen["total"]).abs().max(), (), "logits"),
        }
    )


def _attribute(model: Model, task: Task, part: PartKind) -> dict[str, Tensor]:
    """Contributions on a few prompts: each [prompt, ...] in float64; NaN where a layer has fewer parts than another."""
    stream = Port("resid_out", model.n_layers - 1)
    taps = [Port("embed"), stream, Port("final_norm")]
    for i in range(model.n_layers):
        wanted = {"attn.out", "mlp.out", "attn.z", SIGNAL[part]}
        taps += [Port(signal, i) for signal in model.signals(i) if signal in wanted]
    trace = run(model, task, taps=taps, logits="last")
    normed = _last(trace, Port("final_norm"))
    direction, bias, total = _reading(model, task, trace.last_logits, normed)
    norm = Frozen(model.final_norm_module, _last(trace, stream), normed)
    towards = norm.back(direction)  # [prompt, d_model]: a write's dot product with it is its share of the logits
    ranked, mlp, heads, attn_bias = [], [], [], []
    for i in range(model.n_layers):
        in_attn, from_bias = _attention(model, trace, i, towards)
        heads.append(in_attn)
        attn_bias.append(from_bias)
        has_mlp = "mlp.out" in model.signals(i)
        mlp.append(_dot(_last(trace, Port("mlp.out", i)), towards) if has_mlp else torch.zeros_like(from_bias))
        if part == "layer":
            ranked.append((in_attn.sum(1) + from_bias + mlp[i])[:, None])
        else:
            inside = in_attn if part == "head" else _inside_mlp(model, trace, Port(SIGNAL[part], i), towards)
            ranked.append(inside)
    out = {
        "part": _stacked(ranked) if part != "layer" else torch.cat(ranked, 1),  # [prompt, layer, part]
        "mlp": torch.stack(mlp, 1),  # [prompt, layer]
        "attn_bias": torch.stack(attn_bias, 1),
        "embed": _dot(_last(trace, Port("embed")), towards),
        "bias": bias + norm.shift(direction),
        "total": total,
    }
    out["sum"] = _stacked(heads).nansum((1, 2)) + (out["mlp"] + out["attn_bias"]).sum(1) + out["embed"] + out["bias"]
    return out


def _reading(model: Model, task: Task, logits: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [prompt, d_model] with the logits' scale and cap frozen, the unembedding bias's share, and the model's own value."""
    n_vocab, everywhere = logits.shape[1], not all(task.wrong)
    weights = torch.zeros(len(task), n_vocab, dtype=torch.float64)  # [prompt, vocab]
    for row, right, wrong in zip(weights, task.right, task.wrong, strict=True):
        others = list(range(n_vocab)) if everywhere else list(wrong)
        row[others] -= 1.0 / len(others)
        row[right] += 1.0
    tokens = weights.abs().sum(0).nonzero()[:, 0]
    weights, logits = weights[:, tokens], _precise(logits[:, tokens.to(logits.device)])
    rows = _precise(model.unembed.weight[tokens])  # [token, d_model]
    bias = bias_of(model.hf.get_output_embeddings())
    added = torch.zeros(len(tokens), dtype=torch.float64) if bias is None else _precise(bias[tokens])
    raw = normed @ rows.T + added  # [prompt, token]
    raw = torch.where(raw.abs() < 1e-6, 1e-6, raw)  # the slope at 0 is the limit
    frozen = weights * model.scaled_logits(raw) / raw
    return frozen @ rows, frozen @ added, (weights * logits).sum(1)


def _attention(model: Model, trace: Trace, layer: int, towards: Tensor) -> tuple[Tensor, Tensor]:
    """Contributions of a layer's heads [prompt, head], and of its biases (or of all of a mixer without heads) [prompt]."""
    at, added = model.modules[layer], _last(trace, Port("attn.out", layer))
    if "attn.z" not in model.signals(layer):
        return towards.new_zeros(len(towards), 0), _dot(added, towards)
    z, w_o = _last(trace, Port("attn.z", layer)), _precise(model.W_O(layer))
    bias = bias_of(at.attn_proj)
    b_o = torch.zeros(w_o.shape[2], dtype=torch.float64) if bias is None else _precise(bias)
    through, shift = towards * model.residual_scale, torch.zeros(len(towards), dtype=torch.float64)
    if at.attn_added is not at.attn and at.attn_added is not at.attn_proj:  # a norm stands between
        total = torch.einsum("phd,hdm->pm", z, w_o) + b_o
        norm = Frozen(at.attn_added, total, added / model.residual_scale)
        through, shift = norm.back(through), norm.shift(through)
    return torch.einsum("phd,hdm,pm->ph", z, w_o, through), through @ b_o + shift


def _inside_mlp(model: Model, trace: Trace, port: Port, towards: Tensor) -> Tensor:
    """Contributions of a layer's neurons or experts, [prompt, neuron or expert]; none where the layer has no such part."""
    layer = port.layer or 0
    at = model.modules[layer]
    if port.signal not in model.signals(layer):
        return towards.new_zeros(len(towards), 0)
    value, through = _last(trace, port), towards * model.residual_scale
    normed_after = at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj
    if port.signal == "experts.out":
        if normed_after:
            raise PatchbayError(f"{port}: a norm after the experts of this {model.family.name} model cannot be frozen")
        return torch.einsum("pem,pm->pe", value, through)
    assert at.mlp_proj is not None
    w_out, bias = _precise(matrix(at.mlp_proj)), bias_of(at.mlp_proj)  # [neuron, d_model]
    if normed_after:
        total = value @ w_out if bias is None else value @ w_out + _precise(bias)
        through = Frozen(at.mlp_added, total, _last(trace, Port("mlp.out", layer)) / model.residual_scale).back(through)
    return value * (through @ w_out.T)


class Frozen:
    """A norm as the linear map that it was on these vectors: x -> gain * centred(x) * rate + bias, one rate per prompt.

    The rate is read off what went in and came out, so that epsilon and the order of rounding are the model's own.
    """

    def __init__(self, norm: torch.nn.Module | None, before: Tensor, after: Tensor) -> None:
        assert norm is not None
        gain, bias, self.centred = norm_parts(norm)
        self.gain = _precise(gain).expand(after.shape[-1])  # a norm without weights has the one gain 1
        self.bias = torch.zeros_like(self.gain) if bias is None else _precise(bias)
        scaled = self.gain * self._centre(before)  # [prompt, d_model]
        self.rate = _dot(after - self.bias, scaled) / _dot(scaled, scaled)  # [prompt]

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def back(self, direction: Tensor) -> Tensor:
        """The direction before the norm that reads what `direction` reads after it."""
        return self._centre(self.gain * direction) * self.rate[:, None]

    def shift(self, direction: Tensor) -> Tensor:
        """What the norm's bias adds along the direction, [prompt]."""
        return direction @ self.bias


def _stacked(values: list[Tensor]) -> Tensor:
    """[prompt, part] of every layer as [prompt, layer, part], NaN where a layer has fewer parts."""
    widest = max(value.shape[1] for value in values)
    return torch.stack([torch.nn.functional.pad(v, (0, widest - v.shape[1]), value=torch.nan) for v in values], 1)


def _last(trace: Trace, port: Port) -> Tensor:
    return _precise(trace.last(port))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _precise(x: Tensor) -> Tensor:
    return x.detach().double().cpu()
