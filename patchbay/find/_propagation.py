"""Propagation: a direction carried back through a path of heads and MLPs, and a change carried forward along it.

Attention patterns and all other parts stay as they were. Back: the gradient of the observable by the stream that a
part of the path reads (of a norm: exact, or with its scale frozen). Forward: what a change of that stream really does
along the path. All prompts of one `Field` have one length; [prompt, position, d_model] throughout.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.find._direct import by_head, normed_after, precise
from patchbay.model.linear import bias_of
from patchbay.model.model import Model
from patchbay.model.run import Trace
from patchbay.model.weights import HeadWeights, norm_parts
from patchbay.signal.port import Part, PatchbayError, Port

WHAT = "observable_propagation"


class Norm:
    """A norm at the vectors x [..., d_model] that it saw, and the gradient through it there; None is no norm.

    exact: J^T y = (c(gain y) - x^ <x^, gain y> / d) / s, x^ = c(x) / s what the norm makes of x before its gain, c
    the centring. scale: c(gain y) / s, as if s did not depend on x.
    """

    def __init__(self, module: nn.Module | None, x: Tensor, exact: bool) -> None:
        self.module, self.exact = module, exact
        if module is None:
            return
        gain, bias, self.centred = norm_parts(module)
        self.gain = precise(gain)
        with torch.no_grad():
            after = precise(module.forward(x)) - (0.0 if bias is None else precise(bias))
        scaled = self.gain * self._centre(precise(x))
        self.rate = (after * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(
            -1, keepdim=True
        )  # 1 / s, with epsilon
        self.unit = self._centre(precise(x)) * self.rate

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def back(self, y: Tensor) -> Tensor:
        """The direction before the norm that reads what y reads after it."""
        if self.module is None:
            return y
        y = self._centre(self.gain * y)
        if self.exact:
            y = y - self.unit * (self.unit * y).mean(-1, keepdim=True)
        return y * self.rate


@dataclass
class Field:
    """One run of prompts of one length, and the observable that is read at the end."""

    model: Model
    trace: Trace
    exact: bool
    weights: Tensor  # of the tokens in the observable, [prompt, token]
    tokens: Tensor  # [token]

    # --- the observable ---------------------------------------------------------------------------------

    def observable(self, stream: Tensor) -> Tensor:
        """n . logits of last streams [..., prompt, d_model], in float64."""
        with torch.no_grad():
            normed = self.model.final_norm_module.forward(stream.to(self.model.device))
            return (self.weights * self._logits(precise(normed))).sum(-1)

    def _logits(self, normed: Tensor) -> Tensor:
        unembedding = self.model.hf.get_output_embeddings()
        rows, bias = precise(self.model.unembed.weight[self.tokens]), bias_of(unembedding)
        return self.model.scaled_logits(normed @ rows.T + (0.0 if bias is None else precise(bias[self.tokens])))

    def start(self, *, exact: bool | None = None) -> Tensor:
        """d observable / d final stream: zero but at the last position."""
        stream = self.trace[Port("resid_out", self.model.n_layers - 1)]
        final = Norm(self.model.final_norm_module, stream[:, -1:], self.exact if exact is None else exact)
        with torch.enable_grad():
            normed = precise(self.trace[Port("final_norm")][:, -1]).requires_grad_(True)
            (slope,) = torch.autograd.grad((self.weights * self._logits(normed)).sum(), normed)
        out = torch.zeros(stream.shape, dtype=torch.float64)
        out[:, -1:] = final.back(slope[:, None])
        return out

    # --- heads ------------------------------------------------------------------------------------------

    def at_z(self, layer: int, towards: Tensor) -> Tensor:
        """The gradient at z of every head, [prompt, query, head, d_z], of a direction in the stream after attention."""
        through = towards * self.model.residual_scale
        if normed_after(self.model, layer):
            through = Norm(self.model.modules[layer].attn_added, self._total(layer), self.exact).back(through)
        return torch.einsum("hdm,pqm->pqhd", precise(self.model.W_O(layer)), through)

    def through_head(self, layer: int, head: int, at_z: Tensor) -> Tensor:
        """Back through one head's values to the stream that its layer reads."""
        pattern = precise(self.trace[Port("attn.pattern", layer)])[:, head]  # [prompt, query, key]
        value = torch.einsum("pqk,pqd->pkd", pattern, at_z[:, :, head])
        weights = self._weights(layer)
        group = head * len(weights.W_V) // len(weights.W_Q)
        return self._norm_attn(layer).back(value @ precise(weights.W_V[group]).T)

    def writes(self, layer: int, z: Tensor) -> Tensor:
        """What attention adds to the stream less when z [prompt, query, head, d_z] is taken from all z: the exact change."""
        at, total = self.model.modules[layer], self._total(layer)
        taken = torch.einsum("pqhd,hdm->pqm", z, precise(self.model.W_O(layer)))
        if normed_after(self.model, layer):
            assert at.attn_added is not None
            with torch.no_grad():
                before, after = (precise(at.attn_added.forward(x.to(self.model.dtype))) for x in (total, total - taken))
            taken = before - after
        return -taken * self.model.residual_scale

    def _total(self, layer: int) -> Tensor:
        """The output projection's output, in float64."""
        bias = bias_of(self.model.modules[layer].attn_proj)
        z, w_o = precise(self.trace[Port("attn.z", layer)]), precise(self.model.W_O(layer))
        return torch.einsum("pqhd,hdm->pqm", z, w_o) + (0.0 if bias is None else precise(bias))

    def _weights(self, layer: int) -> HeadWeights:
        return self.model.layers[layer].attn.weights()

    def _norm_attn(self, layer: int) -> Norm:
        return Norm(self.model.modules[layer].norm_attn, self.trace[Port("resid_in", layer)], self.exact)

    def value_bias(self, layer: int, at_z: Tensor) -> Tensor:
        """The value biases' share of each head's score, [prompt, head]."""
        bias = self._weights(layer).b_V
        if bias is None:
            return torch.zeros(at_z.shape[0], at_z.shape[2], dtype=torch.float64)
        per_head = precise(bias).repeat_interleave(at_z.shape[2] // len(bias), 0)  # [head, d_z]
        paid = precise(self.trace[Port("attn.pattern", layer)]).sum(-1)  # [prompt, head, query]; 1, less with a sink
        return torch.einsum("phq,pqhd,hd->ph", paid, at_z, per_head)

    def check_values(self, layer: int) -> None:
        """Raise unless values are the normed stream times W_V, and z is attention times values, as propagation takes them."""
        if self.model.family.qkv == "latent":
            raise PatchbayError(
                f"{WHAT}: values of this {self.model.family.name} model pass a norm inside a compressed latent, token by token; "
                "direct_logit_attribution works"
            )
        weights, norm = self._weights(layer), self.model.modules[layer].norm_attn
        stream = self.trace[Port("resid_in", layer)]
        with torch.no_grad():
            normed = precise(stream if norm is None else norm.forward(stream))
        value = torch.einsum("pkm,gmd->pgkd", normed, precise(weights.W_V))
        value = value if weights.b_V is None else value + precise(weights.b_V)[None, :, None]
        seen = precise(self.trace[Port("attn.v", layer)])
        pattern, z = precise(self.trace[Port("attn.pattern", layer)]), precise(self.trace[Port("attn.z", layer)])
        mixed = torch.einsum("phqk,phkd->pqhd", pattern, by_head(self.model, layer, seen))
        for what, found, wanted in (("values are", value, seen), ("z is", mixed, z)):
            if found.shape != wanted.shape or (found - wanted).abs().max() > 1e-3 * wanted.abs().max():
                raise PatchbayError(
                    f"{WHAT}: in layer {layer} of this {self.model.family.name} model {what} not what weights and attention "
                    "say (a gate, a norm or a scale stands between); direct_logit_attribution works"
                )

    # --- MLPs -------------------------------------------------------------------------------------------

    def mlp(self, layer: int, normed: Tensor) -> Tensor:
        """What the MLP adds to the stream for a normed input, through the family's norm after it."""
        at = self.model.modules[layer]
        assert at.mlp is not None
        n_needed = sum(
            p.default is p.empty for p in inspect.signature(at.mlp.forward).parameters.values() if p.kind < 2
        )
        extra = [torch.zeros_like(normed)] * (n_needed - 1)  # BLOOM's adds the stream inside: none here
        out = at.mlp.forward(normed, *extra)
        out = out[0] if isinstance(out, tuple) else out
        if at.mlp is at.mlp_up or out.numel() != normed.numel():
            raise PatchbayError(
                f"{WHAT}: the MLP of layer {layer} of this {self.model.family.name} model is no module of its own, so no path can "
                "lead through it; paths through heads work"
            )
        if at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj:
            assert at.mlp_added is not None
            out = at.mlp_added.forward(out)
        return out.reshape(normed.shape) * self.model.residual_scale

    def _read_by_mlp(self, layer: int) -> Tensor:
        mid = self.model.modules[layer].mid is not None
        return self.trace[Port("resid_mid" if mid else "resid_in", layer)]

    def through_mlp(self, layer: int, towards: Tensor) -> Tensor:
        """Back through an MLP: the gradient at the stream that it reads."""
        normed = self.trace[Port("mlp.in", layer)].detach()
        with torch.enable_grad():
            leaf = normed.clone().requires_grad_(True)
            added = self.mlp(layer, leaf)
            (slope,) = torch.autograd.grad((added * towards.to(added)).sum(), leaf)
        seen = self.trace[Port("mlp.out", layer)]
        if (added.detach() - seen).abs().max() > 1e-3 * seen.abs().max():
            raise PatchbayError(
                f"{WHAT}: the MLP of layer {layer} of this {self.model.family.name} model cannot be run alone"
            )
        norm = self.model.modules[layer].norm_mlp
        return Norm(norm, self._read_by_mlp(layer), self.exact).back(precise(slope))

    # --- a path -----------------------------------------------------------------------------------------

    def back(self, path: Sequence[Part]) -> Tensor:
        """The direction at the stream that the last part of `path` reads; the path runs from the output backwards."""
        towards = self.start()
        for part in path:
            layer = part.layer or 0
            if part.kind == "mlp":
                towards = self.through_mlp(layer, towards)
            else:
                towards = self.through_head(layer, part.index or 0, self.at_z(layer, towards))
        return towards

    def forward(self, path: Sequence[Part], change: Tensor) -> Tensor:
        """The observable after the stream that the path's last part reads changed by `change`, along the path alone, [prompt]."""
        for part in reversed(path):
            change = self._changed(part, change)
        stream = precise(self.trace[Port("resid_out", self.model.n_layers - 1)][:, -1])
        return self.observable((stream + change[:, -1]).to(self.model.dtype))

    def _changed(self, part: Part, change: Tensor) -> Tensor:
        """How what the part adds changes when the stream that it reads does, its attention as it was."""
        layer, at = part.layer or 0, self.model.modules[part.layer or 0]
        read = self._read_by_mlp(layer) if part.kind == "mlp" else self.trace[Port("resid_in", layer)]
        norm = at.norm_mlp if part.kind == "mlp" else at.norm_attn
        moved = (precise(read) + change).to(read)
        with torch.no_grad():
            normed = moved if norm is None else norm.forward(moved)
            if part.kind == "mlp":
                return precise(self.mlp(layer, normed)) - precise(self.trace[Port("mlp.out", layer)])
        head, weights = part.index or 0, self._weights(layer)
        group = head * len(weights.W_V) // len(weights.W_Q)
        value = precise(normed) @ precise(weights.W_V[group])
        value = value if weights.b_V is None else value + precise(weights.b_V[group])
        z = precise(self.trace[Port("attn.z", layer)])
        taken = torch.zeros_like(z)
        taken[:, :, head] = z[:, :, head] - precise(self.trace[Port("attn.pattern", layer)])[:, head] @ value
        return self.writes(layer, taken)
