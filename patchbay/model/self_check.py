"""The self-check: is what the view calls the parts of a model what the model computes with?

On one short prompt, twice in a batch, the second time with another last token: embedding + every attention out + every MLP out =
final residual stream, final norm and unembedding of that = the model's logits, the heads' outputs sum to the attention out,
attention and MLP read the norms of the streams that stand before them (which tells blocks one after the other from blocks side
by side), the last map of an MLP makes of its neurons what the MLP adds, and the weights by head and neuron make of what they
read what the model made of it. Whether the first tokens know of the
last one says whether the model is causal. `check.py` proves every port, at more cost; `proofs.py` what stands on structure alone.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchbay.jacks.session import Session
from patchbay.model.linear import QUANTISED, is_plain, read
from patchbay.model.proofs import TOLERANCE, from_zero, in_evaluation, relative, unseen_pattern, weights_error
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
    apart: dict[int, float] = field(
        default_factory=dict
    )  # layers whose MLP adds something else than its last map makes of the neurons, and how far
    norm_calls: int = 1  # of the final norm in one run
    shifted: bool = False  # positions begin elsewhere than at 0: `proofs.from_zero` counts them from there

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
                f"; no neurons in layers {list(self.apart)}: what their MLP adds is not what its last map makes of them (off by "
                f"{max(self.apart.values()):.1e})"
                if self.apart
                else ""
            )
            + (
                f"; quantised weights of layers {list(self.rounded)} are given rounded inputs: there heads sum to attention out "
                f"within {max(self.rounded.values()):.1e}, and single rows, batches and parts differ by as much"
                if self.rounded
                else ""
            )
        )


@dataclass(frozen=True)
class Observed:
    """One run: what was tapped, the logits, what attention was given and what down projections made, by layer."""

    ports: dict[Port, Tensor]
    logits: Tensor
    entered: dict[int, Tensor]
    made: dict[int, Tensor]
    norm_calls: int  # of the final norm


@torch.no_grad()
def self_check(model: Model) -> Check:
    """Run the model once on three tokens, twice in a batch, everything tapped, and compare its parts with what it computed."""
    last, n = model.n_layers - 1, model.vocab_size
    ids = torch.tensor([[n // 7, n // 3, n // 2]] * 2, device=model.device)
    ids[1, -1] = n // 5 if n // 5 != n // 2 else n - 1
    run = _observed(model, ids)
    seen, logits = run.ports, run.logits
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
    neurons = {i: _neurons_error(model, i, run) for i, at in enumerate(model.modules) if at.mlp_proj is not None}
    unread, shifted = _unread_weights(model, ids, run)
    return Check(
        stream=_stream_error(model, seen),
        logits=_logits_error(model, normed, logits[:1, -1:], tolerance),
        heads=max((error for i, error in heads.items() if i not in missing and i not in rounded), default=0.0),
        tolerance=tolerance,
        inputs=max((_inputs_error(model, i, seen, run.entered.get(i)) for i in range(model.n_layers)), default=0.0),
        ahead=relative(logits[1, :-1], logits[0, :-1]),
        missing=missing,
        weights=unread,
        rounded=rounded,
        apart={i: off for i, off in neurons.items() if not off <= tolerance},
        shifted=shifted,
        norm_calls=run.norm_calls,
    )


def _observed(model: Model, ids: Tensor) -> Observed:
    entered: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    calls: Counter[str] = Counter()
    _refuse_shared(model)
    with in_evaluation(model.hf), Session(model, _taps(model), must_reach=False) as session:
        for i, at in enumerate(model.modules):
            session.on_call(at.reader, _note(entered, i))
            for name, module in at.called():
                session.on_call(module, functools.partial(_count, calls, f"{name} of layer {i}"))
            if at.mlp_proj is not None:
                session.on_return(at.mlp_proj, functools.partial(made.__setitem__, i))
        session.on_call(model.final_norm_module, functools.partial(_count, calls, "the final norm"))
        logits = model.hf(input_ids=ids, use_cache=False).logits
    norm_calls = calls.pop("the final norm", 0)
    again = next((name for name, n in calls.items() if n > 1), None)
    if again is not None:
        raise PatchbayError(
            f"{again} is called {calls[again]} times in one run: its signals would be several under one name"
        )
    return Observed(session.captured, logits, entered, made, norm_calls)


def _refuse_shared(model: Model) -> None:
    """Raise PatchbayError where two layers have a module in common: what is done to one would be done to both."""
    owners: dict[nn.Module, tuple[str, int]] = {}
    for i, at in enumerate(model.modules):
        for name, module in at.called():
            first, layer = owners.setdefault(module, (name, i))
            if layer != i:
                raise PatchbayError(
                    f"{name} of layer {i} is the same module as {first} of layer {layer}: they are no two parts"
                )


def _count(calls: Counter[str], name: str, *_: Any) -> None:
    calls[name] += 1


def _logits_error(model: Model, normed: Tensor, logits: Tensor, tolerance: float) -> float:
    """The head's own output, scaled as the config says; of a text model in another one the outer class may leave that out."""
    errors = []
    for scaling in (model.config, model.hf.config, None):
        model.scaling = scaling
        errors.append(relative(model.unembed_logits(normed).to(logits.device), logits))
        if errors[-1] <= tolerance:
            return errors[-1]
    model.scaling = model.config
    return errors[0]


def _unread_weights(model: Model, ids: Tensor, run: Observed) -> tuple[dict[tuple[int, str], str], bool]:
    """Which weights cannot be read, and why; and whether positions begin elsewhere than at 0, so that even the first query is
    turned: its direction is then that of a run whose positions are counted from 0."""
    unread: dict[tuple[int, str], str] = {}
    shifted = False
    still: dict[Port, Tensor] | None = None
    for layers in _kinds(model):
        first, entered = layers[0], run.entered.get(layers[0])
        found = weights_error(model, first, run.ports, entered)
        if "has not the direction of" in found.get("attn", ""):
            still = queries_and_keys(model, ids) if still is None else still
            again = weights_error(model, first, {**run.ports, **still}, entered)
            if still and "attn" not in again:
                found, shifted = again, True
        if "attn" not in found and (why := unseen_pattern(model, first, ids)):
            found["attn"] = why
        unread |= {(i, name): why for name, why in found.items() for i in layers}
    return unread, shifted


@torch.no_grad()
def queries_and_keys(model: Model, ids: Tensor) -> dict[Port, Tensor]:
    """Whole queries and keys of every layer with positions counted from 0, where the model can be told them."""
    options = from_zero(model.hf, ids.shape[1])
    if not options:
        return {}
    taps = [Port(s, i) for i, at in enumerate(model.modules) if at.attn is not None for s in ("attn.q", "attn.k")]
    with in_evaluation(model.hf), Session(model, taps, must_reach=False) as session:
        model.hf(input_ids=ids, use_cache=False, **options)
    return session.captured


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


def _neurons_error(model: Model, layer: int, run: Observed) -> float:
    """What the down projection made of the neurons, through the norm after it if there is one, against what the MLP adds."""
    at, out, made = model.modules[layer], run.ports[Port("mlp.out", layer)], run.made
    if layer not in made or made[layer].numel() != out.numel():
        return float("inf")  # it was never called, or not for every token
    total = made[layer].reshape(out.shape)
    if at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj:
        total = at.mlp_added(total)  # type: ignore[misc]
    return relative(total * model.residual_scale, out)


def _unread(model: Model, layer: int) -> str:
    """Why the heads of a layer may have no outputs although all else is right: their projection is no plain matrix."""
    proj = model.modules[layer].attn_proj
    return (
        ""
        if is_plain(proj)
        else f"{type(proj).__name__} is no matrix times what it is given, up to this model's rounding"
    )
