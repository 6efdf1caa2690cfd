"""The self-check: is what the view calls the parts of a model what the model computes with?

On one short prompt, twice in a batch, the second time with another last token: embedding + every attention out + every MLP out =
final residual stream, final norm and unembedding of that = the model's logits, the heads' outputs sum to the attention out,
attention and MLP read the norms of the streams that stand before them (which tells blocks one after the other from blocks side
by side), and the weights by head and neuron make of these what the model made of them. Whether the first tokens know of the
last one says whether the model is causal. `check.py` proves every port, at more cost; `proofs.py` what stands on structure alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchbay.jacks.session import Session
from patchbay.model.linear import QUANTISED, is_plain, read
from patchbay.model.proofs import TOLERANCE, in_evaluation, relative, weights_error
from patchbay.signal.port import PatchbayError, Port

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model


@dataclass(frozen=True)
class Check:
    """The self-check's relative errors (largest difference over largest value) and the tolerance they met."""

    stream: float
    logits: float
    heads: float
    tolerance: float
    inputs: float = 0.0  # of what attention and MLP read
    ahead: float = 0.0  # by how much the first tokens' logits change with the last token
    missing: dict[int, str] = field(default_factory=dict)  # layers whose heads' outputs cannot be offered, and why
    weights: dict[tuple[int, str], str] = field(
        default_factory=dict
    )  # layer, "attn" or "mlp": why these cannot be read
    rounded: dict[int, float] = field(
        default_factory=dict
    )  # layers that round what their weights are given: heads' error

    @property
    def passed(self) -> bool:
        return max(self.stream, self.logits, self.heads, self.inputs) <= self.tolerance

    @property
    def causal(self) -> bool:
        return self.ahead <= self.tolerance

    def __str__(self) -> str:
        return (
            f"parts sum to the final stream within {self.stream:.1e}, norm and unembedding give the logits within "
            f"{self.logits:.1e}, heads sum to attention out within {self.heads:.1e}, attention and MLP read the norms of the "
            f"streams before them within {self.inputs:.1e} (tolerance {self.tolerance:.0e})"
            + ("" if self.causal else "; the model is not causal: tokens see those after them")
            + (
                f"; no head outputs in layers {list(self.missing)}: {next(iter(self.missing.values()))}"
                if self.missing
                else ""
            )
            + (
                f"; quantised weights of layers {list(self.rounded)} are given rounded inputs: there heads sum to attention out "
                f"within {max(self.rounded.values()):.1e}, and single rows, batches and parts differ by as much"
                if self.rounded
                else ""
            )
        )


@torch.no_grad()
def self_check(model: Model) -> Check:
    """Run the model once on three tokens, twice in a batch, everything tapped, and compare its parts with what it computed."""
    last, n = model.n_layers - 1, model.vocab_size
    ids = torch.tensor([[n // 7, n // 3, n // 2]] * 2, device=model.device)
    ids[1, -1] = n // 5 if n // 5 != n // 2 else n - 1
    entered: dict[int, Tensor] = {}
    with in_evaluation(model.hf), Session(model, _taps(model), must_reach=False) as session:
        for i, at in enumerate(model.modules):
            session.on_call(at.attn or at.attn_added, _note(entered, i))  # type: ignore[arg-type]
        logits = model.hf(input_ids=ids, use_cache=False).logits
    seen = session.captured
    for i, at in enumerate(model.modules):
        if at.attn is not None:
            q, k = seen[Port("attn.q", i)], seen[Port("attn.k", i)]
            model._heads[i] = (q.shape[1], k.shape[1], q.shape[3])
    tolerance = TOLERANCE.get(model.dtype, 1e-2)
    normed = model.final_norm_module(seen[Port("resid_out", last)])[:1, -1:]  # unembedding is dear: one token
    found = {i: _heads_error(model, i, seen) for i, at in enumerate(model.modules) if at.attn is not None}
    heads = {i: error for i, (error, _) in found.items()}
    rounded = {i: error for i, (error, off) in found.items() if off > tolerance and error <= QUANTISED}
    wrong = {i for i, error in heads.items() if not error <= tolerance and i not in rounded}
    missing = {i: why for i in wrong if (why := _unread(model, i))}
    unlike = [(layers, weights_error(model, layers[0], seen, entered.get(layers[0]))) for layers in _kinds(model)]
    return Check(
        stream=_stream_error(model, seen),
        logits=relative(model.unembed_logits(normed).to(logits.device), logits[:1, -1:]),
        heads=max((error for i, error in heads.items() if i not in missing and i not in rounded), default=0.0),
        tolerance=tolerance,
        inputs=max((_inputs_error(model, i, seen, entered.get(i)) for i in range(model.n_layers)), default=0.0),
        ahead=relative(logits[1, :-1], logits[0, :-1]),
        missing=missing,
        weights={(i, name): why for layers, found in unlike for name, why in found.items() for i in layers},
        rounded=rounded,
    )


def _kinds(model: Model) -> list[list[int]]:
    """Layers by the way their weights lie: the same classes with weights of the same shapes share it."""
    found: dict[Any, list[int]] = {}
    for i, at in enumerate(model.modules):
        parts = [part for owner in (at.attn, at.mlp) if owner is not None for part in owner.modules()]
        shapes = (tuple(weight.shape) for part in parts for weight in part.parameters(recurse=False))
        found.setdefault((model._heads.get(i), *map(type, parts), *shapes), []).append(i)
    return list(found.values())


def _taps(model: Model) -> list[Port]:
    taps = [Port("embed"), Port("resid_out", model.n_layers - 1), Port("final_norm")]
    for i, at in enumerate(model.modules):
        taps += [Port("attn.out", i), Port("resid_in", i)]
        taps += [Port("resid_mid", i)] if at.mid is not None else []
        taps += [Port("mlp.out", i), Port("mlp.in", i)] if at.mlp is not None else []
        taps += [Port("mlp.act", i)] if at.mlp is not None and at.mlp_proj is not None else []
        taps += [Port(s, i) for s in ("attn.q", "attn.k", "attn.v", "attn.z")] if at.attn is not None else []
    return taps


def _note(entered: dict[int, Tensor], layer: int) -> Any:
    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        if isinstance(given, Tensor):
            entered[layer] = given.detach()

    return note


def _stream_error(model: Model, seen: dict[Port, Tensor]) -> float:
    final = seen[Port("resid_out", model.n_layers - 1)]
    added = [value for port, value in seen.items() if port.signal in ("embed", "attn.out", "mlp.out")]
    total = torch.stack([value.double().to(final.device) for value in added]).sum(0)
    middle = [
        relative(seen[Port("resid_in", port.layer)].double() + seen[Port("attn.out", port.layer)].double(), value)
        for port, value in seen.items()
        if port.signal == "resid_mid"
    ]
    return max(relative(total, final), *middle, 0.0)


def _inputs_error(model: Model, layer: int, seen: dict[Port, Tensor], entered: Tensor | None) -> float:
    """What attention (or a mixer) and the MLP were given, against the norms of the streams that the view has before them."""
    at, stream = model.modules[layer], seen[Port("resid_in", layer)]
    errors = []
    if entered is not None:
        errors.append(relative(stream if at.norm_attn is None else at.norm_attn(stream), entered))
    if Port("mlp.in", layer) in seen:
        before = seen.get(Port("resid_mid", layer), stream)
        errors.append(relative(before if at.norm_mlp is None else at.norm_mlp(before), seen[Port("mlp.in", layer)]))
    return max(errors, default=0.0)


def _heads_error(model: Model, layer: int, seen: dict[Port, Tensor]) -> tuple[float, float]:
    """Heads' outputs and the projection's bias against what attention adds, through the norm after it if there is one; and how
    far the projection is from its matrix because it rounds what it is given."""
    at = model.modules[layer]
    assert at.attn_added is not None
    try:
        proj = read(at.attn_proj)
    except PatchbayError:
        return float("inf"), 0.0
    z = seen[Port("attn.z", layer)].flatten(-2)
    total = z @ proj.matrix.to(z)
    total = total if proj.bias is None else total + proj.bias.to(z)
    if at.attn_added is not at.attn and at.attn_added is not at.attn_proj:
        total = at.attn_added(total)
    return relative(total * model.residual_scale, seen[Port("attn.out", layer)]), proj.off


def _unread(model: Model, layer: int) -> str:
    """Why the heads of a layer may have no outputs although all else is right: their projection is no plain matrix."""
    proj = model.modules[layer].attn_proj
    return (
        ""
        if is_plain(proj)
        else f"{type(proj).__name__} is no matrix times what it is given, up to this model's rounding"
    )
