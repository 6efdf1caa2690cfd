"""What a view that rests on structure alone has to prove besides the self-check, and what weights have to.

A row that names the model's type was proved port by port on a twin (`check.py`). One that merely fits may have parts that the
sums of the self-check do not see: blocks side by side that are one after the other, a gate inside attention, a difference of two
patterns. So gradients of a random reading of the logits, by autograd through the whole model, must be what the view's own graph
says: what attention adds is worth what the stream is worth where the view has it added, z is the pattern times the values, and
values, patterns and the MLP's input are worth what that makes of it. And a prompt must be the same each time, alone and in a batch.

Weights by head and by neuron must make of what attention and MLP read what the model made of it: v everywhere; q and k, which
position may turn and a norm may lengthen, their direction at position 0 and, where no norm follows, their length everywhere, up to
one factor; the activation through the module's own function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.jacks.attention import PREFIX
from patchbay.jacks.modelled import Modelled
from patchbay.jacks.patterns import in_table, of_transformers
from patchbay.jacks.session import Session
from patchbay.model.linear import QUANTISED, is_plain, read
from patchbay.model.weights import head_weights, inner_rates, mlp_weights, norm_gain, query_key_norms
from patchbay.signal.port import PatchbayError, Port

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
GRAPH = (
    "resid_in",
    "resid_mid",
    "resid_out",
    "attn.out",
    "mlp.in",
    "mlp.out",
    "attn.v",
    "attn.pattern",
    "attn.z",
    "experts.out",
)
N_TOKENS = 5
LOOK = 32  # tokens on which code that is not transformers' own is asked whether it looks ahead


@contextmanager
def in_evaluation(hf: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the length of the block."""
    training = [module for module in hf.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def from_zero(hf: nn.Module, n: int) -> dict[str, Tensor]:
    """The arguments that count `n` positions from 0, whatever the model does by itself; none where it takes no positions."""
    if "position_ids" not in inspect.signature(hf.forward).parameters:
        return {}
    return {"position_ids": torch.arange(n, device=next(hf.parameters()).device)[None]}


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where either is not finite or the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double().to(found.device)
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


# --- the graph, by gradients --------------------------------------------------------------------------


def graph_error(model: Modelled) -> str | None:
    """What of the view's graph the gradients of one random prompt contradict, or that batches matter; None when nothing."""
    tolerance = 10 * TOLERANCE.get(model.dtype, 1e-2)
    if (off := chance_error(model)) > tolerance:
        return f"two equal runs differ (by {off:.1e}) in evaluation: it changes at random"
    with in_evaluation(model.hf):
        try:
            values, gradients, off = _gradients(model)
        except PatchbayError as error:
            return str(error)
    if not off <= tolerance:
        return f"under taps of all its signals its logits are others (off by {off:.1e})"
    worst = max(_identities(model, values, gradients), key=lambda found: found[1], default=("", 0.0))
    if worst[1] <= tolerance:
        off = batch_error(model)
        return None if off <= tolerance else f"a prompt is not the same alone and beside another (off by {off:.1e})"
    return f"gradients contradict it: {worst[0]} (off by {worst[1]:.1e})"


def gradient_error(model: Modelled) -> float | None:
    """By how much the gradients of one random prompt contradict the view's graph: relative; None where autograd gives none."""
    with in_evaluation(model.hf):
        try:
            values, gradients, off = _gradients(model)
        except (PatchbayError, RuntimeError):  # quantised, or a kernel without a backward pass
            return None
        return max([off, *(error for _, error in _identities(model, values, gradients))])


def _ids(model: Modelled, n: int = N_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(3, model.vocab_size - 1), model.vocab_size, (1, n), generator=generator).to(model.device)


def _gradients(model: Modelled) -> tuple[dict[Port, Tensor], dict[Port, Tensor], float]:
    """The graph's signals on one prompt, the gradient of a random reading of its last logits with respect to each, and how far
    these logits, made of those signals, are from the model's own."""
    ports = [Port("embed")]
    ports += [Port(s, i) for i in range(model.n_layers) for s in GRAPH if s in model.signals(i)]
    with torch.enable_grad(), Session(model, ports, grad=True, must_reach=False) as session:
        logits = model.hf(input_ids=_ids(model), use_cache=False).logits[0, -1]
        towards = torch.randn(len(logits), generator=torch.Generator().manual_seed(1)).to(logits)
        values = dict(session.captured)
        found = torch.autograd.grad((logits * towards).sum(), list(values.values()), allow_unused=True)
    made = zip(values.items(), found, strict=True)
    gradients = {port: torch.zeros_like(v) if g is None else g for (port, v), g in made}
    return values, gradients, relative(logits.detach(), _logits(model, _ids(model))[0, -1])


def _identities(
    model: Modelled, values: dict[Port, Tensor], gradients: dict[Port, Tensor]
) -> Iterator[tuple[str, float]]:
    """(statement, relative error) of every layer."""
    yield "the embedding is worth what enters the first layer", _off(gradients, Port("embed"), Port("resid_in", 0))
    for i in range(model.n_layers):
        out, mid = Port("resid_out", i), Port("resid_mid", i)
        joined = mid if mid in gradients else out
        if i + 1 < model.n_layers:
            yield f"what leaves L{i} is worth what enters L{i + 1}", _off(gradients, out, Port("resid_in", i + 1))
        yield (
            f"what attention of L{i} adds is worth the stream {'after it' if joined is mid else 'after the layer'}",
            _off(gradients, Port("attn.out", i), joined),
        )
        if Port("mlp.out", i) in gradients:
            yield f"what the MLP of L{i} adds is worth the stream after it", _off(gradients, Port("mlp.out", i), out)
            if joined is mid:
                yield f"the stream before the MLP of L{i} is read by its norm alone", _read(model, i, values, gradients)
        at = model.modules[i]
        if Port("experts.out", i) in gradients and at.mlp_added is at.mlp:  # no norm between
            each = gradients[Port("experts.out", i)]
            worth = gradients[Port("mlp.out", i)].unsqueeze(2).expand_as(each)
            yield (
                f"what each expert of L{i} adds is worth what its MLP adds",
                relative(each, worth * model.residual_scale),
            )
        if Port("attn.z", i) in gradients:
            yield from _mixing(model, i, values, gradients)


def _off(gradients: dict[Port, Tensor], port: Port, other: Port) -> float:
    return relative(gradients[port], gradients[other])


def _read(model: Modelled, layer: int, values: dict[Port, Tensor], gradients: dict[Port, Tensor]) -> float:
    """The gradient at the stream between attention and MLP, against that after the layer and that through the MLP's norm."""
    norm, middle = model.modules[layer].norm_mlp, values[Port("resid_mid", layer)].detach().requires_grad_()
    with torch.enable_grad():
        normed = middle if norm is None else norm(middle)
        (through,) = torch.autograd.grad(normed, middle, gradients[Port("mlp.in", layer)].reshape(normed.shape))
    return relative(gradients[Port("resid_out", layer)] + through, gradients[Port("resid_mid", layer)])


def _mixing(
    model: Modelled, layer: int, values: dict[Port, Tensor], gradients: dict[Port, Tensor]
) -> Iterator[tuple[str, float]]:
    """z = pattern times values, and what that makes their gradients."""
    pattern, v, z = (Port(signal, layer) for signal in ("attn.pattern", "attn.v", "attn.z"))
    shared = model.n_heads(layer) // model.n_groups(layer)
    mixing, each = values[pattern].detach().double(), values[v].detach().double().repeat_interleave(shared, 1)
    if each.shape[1] != mixing.shape[1] or values[z].shape[-1] != each.shape[-1]:
        yield f"z of L{layer} is the pattern times the values", float("inf")
        return
    beside = beside_pattern(model, layer)
    if beside == "norm":  # z is what a norm and a gate make of that: the table proves the product in each call
        return
    towards = gradients[z].double()
    made = torch.einsum("bhqk,bhkd->bqhd", mixing, each)
    if (
        model.family.qkv == "gated"
    ):  # by what the stream says alone: values and patterns act through it as through a constant
        towards = towards * torch.where(made.abs() > 1e-9, values[z].detach().double() / made, 0.0)
    elif not beside:
        yield f"z of L{layer} is the pattern times the values", relative(values[z].detach(), made)
    of_values = torch.einsum("bhqk,bqhd->bhkd", mixing, towards).unflatten(1, (-1, shared)).sum(2)
    yield f"values of L{layer} act through the pattern alone", relative(gradients[v], of_values)
    of_pattern = torch.einsum("bqhd,bhkd->bhqk", towards, each)
    yield f"the pattern of L{layer} acts on the values alone", relative(gradients[pattern], of_pattern)


def beside_pattern(model: Modelled, layer: int) -> str:
    """What an attention of the table (`jacks/patterns.py`) says stands between the pattern times the values and the port z: "value", a learned
    one that queries may take, "norm", or nothing. What the table does not hold may say nothing."""
    implementation = str(model.hf.config._attn_implementation).removeprefix(PREFIX)
    if implementation in ("sdpa", "eager") or not in_table(implementation):
        return ""
    return str(getattr(model.modules[layer].attn, "beside_pattern", ""))


# --- a prompt alone, in a batch, and with what follows it -------------------------------------------------


@torch.no_grad()
def _logits(model: Modelled, ids: Tensor) -> Tensor:
    with in_evaluation(model.hf):
        found: Tensor = model.hf(input_ids=ids, use_cache=False).logits
    return found


def batch_error(model: Modelled) -> float:
    """By how much the logits of a prompt change beside another prompt: relative."""
    ids = _ids(model, 2 * N_TOKENS).view(2, -1)
    return relative(_logits(model, ids)[:1], _logits(model, ids[:1]))


def chance_error(model: Modelled) -> float:
    """By how much the logits of two equal runs differ: relative."""
    ids = _ids(model)
    return relative(_logits(model, ids), _logits(model, ids))


def ahead_error(model: Modelled) -> float:
    """By how much logits change with what stands up to `LOOK` tokens after them: another last token, or nothing there at all."""
    n = min(LOOK, model.longest_prompt or LOOK)
    ids = _ids(model, n)
    other = ids.clone()
    other[:, -1] = ids[:, -1] % (model.vocab_size - 1) + 1
    if bool((other == ids).all()):
        other[:, -1] = 0
    both, part = _logits(model, torch.cat([ids, other])), _logits(model, ids[:, : max(n // 4, 1)])
    return max(relative(both[1:, :-1], both[:1, :-1]), relative(part, both[:1, : part.shape[1]]))


# --- weights -------------------------------------------------------------------------------------------


def weights_error(model: Modelled, layer: int, seen: dict[Port, Tensor], entered: Tensor | None) -> dict[str, str]:
    """What of a layer's weights ("attn", "mlp") is not what the model computes with, and why. `seen`, `entered`: what one run
    tapped, and what attention was given."""
    at, found = model.modules[layer], {}
    for name, proof in (("attn", _heads), ("mlp", _neurons)):
        tolerance = 10 * TOLERANCE.get(model.dtype, 1e-2)
        missing = at.attn is None or entered is None if name == "attn" else at.mlp_proj is None
        if missing or Port("mlp.act" if name == "mlp" else "attn.v", layer) not in seen:
            continue
        if _rounds_inputs(at.attn if name == "attn" else at.mlp, tolerance):
            tolerance = QUANTISED
        try:
            why = proof(model, layer, seen, entered, tolerance)
        except PatchbayError as error:
            why = str(error)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            why = f"{type(error).__name__}: {str(error)[:120]}"
        if why:
            found[name] = why
    return found


@torch.no_grad()
def unseen_pattern(model: Modelled, layer: int, ids: Tensor) -> str:
    """Of attention that somebody registered: why no pattern is known to make z, so that weights do not say what heads do; else ""."""
    if model.modules[layer].attn is None or model.family.attention != "interface":
        return ""
    if of_transformers(str(model.hf.config._attn_implementation)):
        return ""
    try:
        with in_evaluation(model.hf), Session(model, [Port("attn.pattern", layer)]):
            model.hf(input_ids=ids, use_cache=False)
    except PatchbayError as error:
        return str(error)
    return ""


def _rounds_inputs(owner: nn.Module | None, tolerance: float) -> bool:
    """Whether a quantised map inside rounds what it is given by more than the tolerance: one of each class is asked."""
    asked = set()
    for module in owner.modules() if owner is not None else ():
        if hasattr(module, "in_features") and not is_plain(module) and type(module) not in asked:
            asked.add(type(module))
            try:
                if read(module).off > tolerance / 10:
                    return True
            except PatchbayError:
                continue
    return False


def _precise(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _made(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., d_model] through maps [head, d_model, d_head]: [..., head, d_head]."""
    flat = _precise(weight.movedim(0, 1).flatten(1))
    out = (_precise(x) @ flat).unflatten(-1, (len(weight), -1))
    return out if bias is None else out + _precise(bias)


def _heads(model: Modelled, layer: int, seen: dict[Port, Tensor], entered: Tensor, tolerance: float) -> str:
    at, shape = model.modules[layer], (model.n_heads(layer), model.n_groups(layer), model.d_head(layer))
    plain = head_weights(model.family, at, *shape)
    rates: list[Tensor] = [entered.new_ones(1)] * 3
    if model.family.qkv == "latent":
        rates = [rate[..., None, :] for rate in inner_rates(model.family, at, shape[0], shape[2], entered)]
    v = _made(entered, plain.W_V, plain.b_V) * rates[2].to(entered.device)
    if not (off := relative(v.transpose(1, 2), seen[Port("attn.v", layer)])) <= tolerance:
        return f"the stream times W_V is not v (off by {off:.1e})"
    if model.family.qkv == "latent":
        return ""  # its queries and keys are proved where their turn by position is read
    norms = query_key_norms(at.attn) or (None, None)
    for name, weight, bias, norm in (("q", plain.W_Q, plain.b_Q, norms[0]), ("k", plain.W_K, plain.b_K, norms[1])):
        made = _made(entered, weight, bias)  # [prompt, position, head, d_head]
        tapped = _precise(seen[Port(f"attn.{name}", layer)]).transpose(1, 2)
        if norm is not None:
            if getattr(norm, "bias", None) is not None:
                continue
            gain, centred = norm_gain(norm, *made.shape[2:])
            made = (made - made.mean(-1, keepdim=True) if centred else made) * gain.to(made)
        cosine = torch.nn.functional.cosine_similarity(made[:, 0], tapped[:, 0], dim=-1)
        if not bool((cosine > 1 - tolerance).all()):
            return (
                f"the stream times W_{name.upper()} has not the direction of {name} (cosine {float(cosine.min()):.3f})"
            )
        sizes = tapped.norm(dim=-1) / made.norm(dim=-1)  # positions turn; one factor on all is a scale of the scores
        if norm is None and not bool(((sizes / sizes[0, 0, 0] - 1).abs() <= tolerance).all()):
            return (
                f"{name} is the stream times W_{name.upper()} times a factor that differs by token or head ({float(sizes.min()):.3g} "
                f"to {float(sizes.max()):.3g})"
            )
    return ""


def _neurons(model: Modelled, layer: int, seen: dict[Port, Tensor], _: Tensor | None, tolerance: float) -> str:
    at, act = model.modules[layer], seen[Port("mlp.act", layer)]
    function = _activation(at.mlp) or _activation(at.layer)
    if function is None:
        return ""
    w, x = mlp_weights(model.family, at), _precise(seen[Port("mlp.in", layer)])

    def through(weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x @ _precise(weight)
        return out if bias is None else out + _precise(bias)

    up = through(w.W_in, w.b_in).to(act)
    made = function(up) if w.W_gate is None else function(through(w.W_gate, w.b_gate).to(act)) * up
    off = relative(made, act)
    return "" if off <= tolerance else f"W_in and W_gate do not give the activation (off by {off:.1e})"


def _activation(owner: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """The function between an MLP's projections: its child of such a name or class, or an attribute."""
    if owner is None:
        return None
    for name, child in owner.named_children():
        kind = type(child).__module__
        if "act" in name or "gelu" in name or kind in ("torch.nn.modules.activation", "transformers.activations"):
            return child if not any(isinstance(m, nn.Linear) for m in child.modules()) else None
    found: Any = getattr(owner, "act_fn", None) or getattr(owner, "activation_fn", None)
    return found if callable(found) else None
