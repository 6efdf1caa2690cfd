"""Direct paths: what each position gives, through a head, to the logits, with attention and norms held as they were.

    z[last] = sum over keys p of A[last, p] v_p, so a head's share of an answer is the sum over p of A[last, p] (v_p
    W_O) . y

with y the direction that reads the answer in the stream (`reading`). Float64 throughout, on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay.find.direct_logit_attribution import Frozen, _inside_mlp, _reading
from patchbay.model.linear import bias_of
from patchbay.model.model import Model
from patchbay.model.run import Trace
from patchbay.model.weights import norm_parts
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task


def precise(x: Tensor) -> Tensor:
    return x.detach().double().cpu()


def head_layers(model: Model, what: str) -> list[int]:
    """Layers whose heads have patterns; an error that says so where there are none."""
    layers = [i for i in range(model.n_layers) if "attn.pattern" in model.signals(i)]
    if not layers:
        raise PatchbayError(f"{what} needs attention patterns; no layer of this {model.family.name} model has them")
    return layers


def places(model: Model, ids: list[list[int]], tokens: list[tuple[int, ...]]) -> Tensor:
    """Bool [prompt, position]: where a prompt holds one of its tokens; False on the padding at the right."""
    width = max(map(len, ids))
    found = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, (prompt, wanted) in enumerate(zip(ids, tokens, strict=True)):
        found[row, : len(prompt)] = torch.tensor([token in wanted for token in prompt])
    return found


def by_head(model: Model, layer: int, shared: Tensor) -> Tensor:
    """Keys or values [prompt, group, ...] given to each query head, [prompt, head, ...], padding 0."""
    return shared.nan_to_num(0.0).repeat_interleave(model.n_heads(layer) // model.n_groups(layer), 1)


def reading(model: Model, task: Task, trace: Trace) -> Tensor:
    """y [prompt, d_model]: a write's dot product with it is its share of the logit difference at the last position.

    Needs taps of the last layer's `resid_out` and of `final_norm`.
    """
    normed = precise(trace.last(Port("final_norm")))
    direction, _, _ = _reading(model, task, trace.last_logits, normed)
    stream = precise(trace.last(Port("resid_out", model.n_layers - 1)))
    return Frozen(model.final_norm_module, stream, normed).back(direction)


def inside_mlp(model: Model, trace: Trace, port: Port, towards: Tensor) -> Tensor:
    """What each neuron (`mlp.act`) or expert (`experts.out`) of a layer writes along `towards`, [prompt, neuron or expert].

    Needs taps of the port and, where a norm follows the MLP, of the layer's `mlp.out`.
    """
    return _inside_mlp(model, trace, port, towards)


def read_at_z(model: Model, trace: Trace, layer: int, towards: Tensor) -> Tensor:
    """The direction at each head's z that reads `towards` [prompt, d_model] in the stream, [prompt, head, d_z].

    Needs taps of the layer's `attn.z` and, where a norm follows attention, of `attn.out`.
    """
    at, w_o = model.modules[layer], precise(model.W_O(layer))
    through = towards * model.residual_scale
    if normed_after(model, layer):
        bias = bias_of(at.attn_proj)
        total = torch.einsum("phd,hdm->pm", precise(trace.last(Port("attn.z", layer))), w_o)
        total = total if bias is None else total + precise(bias)
        through = Frozen(
            at.attn_added, total, precise(trace.last(Port("attn.out", layer))) / model.residual_scale
        ).back(through)
    return torch.einsum("hdm,pm->phd", w_o, through)


def normed_after(model: Model, layer: int) -> bool:
    """Whether a norm stands between attention's output projection and the stream."""
    at = model.modules[layer]
    return at.attn_added is not at.attn and at.attn_added is not at.attn_proj


def by_source(model: Model, trace: Trace, layer: int, read: Tensor) -> tuple[Tensor, Tensor]:
    """What each key gives at the last query along `read` [prompt, head, d_z], and the attention: both [prompt, head, key].

    Where z is not the values mixed by attention alone (a gate stands after it), each key shares the gate. Needs taps
    of the layer's `attn.z` and `attn.v` and of row -1 of `attn.pattern`.
    """
    pattern = precise(trace[Port("attn.pattern", layer, None, (-1,))])[:, :, 0].nan_to_num(0.0)  # [prompt, head, key]
    values = by_head(model, layer, precise(trace[Port("attn.v", layer)]))  # [prompt, head, key, d_z]
    mixed = torch.einsum("phk,phkd->phd", pattern, values)
    z = precise(trace.last(Port("attn.z", layer)))
    gated = (z - mixed).abs().max() > 1e-3 * z.abs().max()
    gate = torch.where(mixed.abs() > 1e-9, z / mixed, 0.0) if bool(gated) else torch.ones_like(z)
    return pattern * torch.einsum("phkd,phd->phk", values, gate * read), pattern


def spoken(model: Model, layer: int, written: Tensor) -> Tensor:
    """What writes [..., d_model] of a layer's heads say to the final norm's output, up to a positive factor.

    Gains and centring of the norm after attention, where there is one, and of the final norm; biases say the same
    whatever is written and are left out. Its dot products with unembedding rows order the tokens as the logits do.
    """
    norms = [model.modules[layer].attn_added] if normed_after(model, layer) else []
    for norm in (*norms, model.final_norm_module):
        assert norm is not None
        gain, _, centred = norm_parts(norm)
        written = precise(gain) * (written - written.mean(-1, keepdim=True) if centred else written)
    return written


def own_place(model: Model, layer: int, written: Tensor, tokens: Tensor, *, lowest: bool = False) -> Tensor:
    """How many tokens of the vocabulary stand before each write's own token, [n, head], by what it says to the logits.

    `written` [n, head, d_model], `tokens` [n]: 0 is the highest (or with `lowest` the lowest) of all; ties count
    against it.
    """
    unembed = precise(model.unembed.weight)  # [vocab, d_model]
    found = []
    for one, token in zip(spoken(model, layer, written), tokens.tolist(), strict=True):
        said = one @ unembed.T  # [head, vocab]
        said = -said if lowest else said
        found.append(said.shape[1] - 1 - (said < said[:, token : token + 1]).sum(1))
    return torch.stack(found) if found else torch.zeros(0, written.shape[1], dtype=torch.long)


def grid(model: Model, layers: list[int], values: list[Tensor]) -> Tensor:
    """[n, head] of some layers as [n, layer, head] of all, NaN where there is no such head."""
    out = torch.full((len(values[0]), model.n_layers, max(v.shape[1] for v in values)), torch.nan, dtype=torch.float64)
    for layer, value in zip(layers, values, strict=True):
        out[:, layer, : value.shape[1]] = value.double()
    return out
