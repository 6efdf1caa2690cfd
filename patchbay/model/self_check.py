"""The self-check: is what the view calls the parts of a model what the model computes with?

On one short prompt: embedding + every attention out + every MLP out = final residual stream, final norm and unembedding of that
= the model's logits, and the heads' outputs sum to the attention out. `check.py` proves every port, at more cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchbay.jacks.session import Session
from patchbay.signal.port import Port

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Check:
    """The self-check's relative errors (largest difference over largest value) and the tolerance they met."""

    stream: float
    logits: float
    heads: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return max(self.stream, self.logits, self.heads) <= self.tolerance

    def __str__(self) -> str:
        return (
            f"parts sum to the final stream within {self.stream:.1e}, norm and unembedding give the logits within "
            f"{self.logits:.1e}, heads sum to attention out within {self.heads:.1e} (tolerance {self.tolerance:.0e})"
        )


@torch.no_grad()
def self_check(model: Model) -> Check:
    """Run the model once on four tokens, everything tapped, and compare its parts with what it computed."""
    last, n = model.n_layers - 1, model.vocab_size
    taps = [Port("embed"), Port("resid_out", last), Port("final_norm")]
    for i, at in enumerate(model.modules):
        taps += [Port("attn.out", i), Port("resid_in", i)]
        taps += [Port("resid_mid", i)] if at.mid is not None else []
        taps += [Port("mlp.out", i)] if at.mlp is not None else []
        taps += [Port(s, i) for s in ("attn.q", "attn.k", "attn.z")] if at.attn is not None else []
    ids = torch.tensor([[n // 7, n // 3, n // 2, n // 5]], device=model.device)
    training = [module for module in model.hf.modules() if module.training]
    model.hf.eval()
    try:
        with Session(model, taps) as session:
            logits = model.hf(input_ids=ids, use_cache=False).logits
    finally:
        for module in training:
            module.training = True
    seen = session.captured
    for i, at in enumerate(model.modules):
        if at.attn is not None:
            q, k = seen[Port("attn.q", i)], seen[Port("attn.k", i)]
            model._heads[i] = (q.shape[1], k.shape[1], q.shape[3])
    device = seen[Port("resid_out", last)].device
    added = [value for port, value in seen.items() if port.signal in ("embed", "attn.out", "mlp.out")]
    total = torch.stack([value.double().to(device) for value in added]).sum(0)
    middle = [
        relative(seen[Port("resid_in", port.layer)].double() + seen[Port("attn.out", port.layer)].double(), value)
        for port, value in seen.items()
        if port.signal == "resid_mid"
    ]
    normed = model.final_norm_module(seen[Port("resid_out", last)])[:, -1:]  # unembedding is dear: one token
    heads = [_heads_error(model, i, seen) for i, at in enumerate(model.modules) if at.attn is not None]
    return Check(
        stream=max(relative(total, seen[Port("resid_out", last)]), *middle, 0.0),
        logits=relative(model.unembed_logits(normed).to(logits.device), logits[:, -1:]),
        heads=max(heads, default=0.0),
        tolerance=TOLERANCE.get(model.dtype, 1e-2),
    )


def _heads_error(model: Model, layer: int, seen: dict[Port, Tensor]) -> float:
    """Heads' outputs and the projection's bias against what attention adds, through the norm after it if there is one."""
    at = model.modules[layer]
    assert at.attn_proj is not None
    assert at.attn_added is not None
    total = seen[Port("attn.z", layer)].flatten(-2) @ model.W_O(layer).flatten(0, 1)
    if getattr(at.attn_proj, "bias", None) is not None:
        total = total + at.attn_proj.bias
    if at.attn_added is not at.attn and at.attn_added is not at.attn_proj:
        total = at.attn_added(total)
    return relative(total * model.residual_scale, seen[Port("attn.out", layer)])


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where either is not finite."""
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")
