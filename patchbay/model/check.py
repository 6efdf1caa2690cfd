"""Verification: every port that a model offers, proved by numbers on the model itself.

A tap must leave the logits bit-equal to the plain Hugging Face forward (within rounding for a pattern, which is computed where
SDPA was). Putting a signal's own value back must change nothing, and adding noise at one position must show in a tap of that
signal, leave the logits left of it and move those from it on.
A prompt is the same alone and beside another, and what stands far ahead leaves it alone.
What the parts mean must hold, also for gradients: the stream is the sum of what is added to it, pattern times values is z, heads sum to
attention's output, experts to theirs, and the weights by head give the q, k and v that attention receives. Some twenty short
runs a model. It proves that the ports are what they say, on these tokens; it says nothing about what a part is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit, add, replace
from patchbay.jacks.defaults import on_own_device
from patchbay.model.linear import QUANTISED, linear_map
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.model.proofs import LOOK, TOLERANCE, ahead_error, batch_error, gradient_error
from patchbay.model.rotary import rotary_size
from patchbay.model.run import Trace, run
from patchbay.model.self_check import queries_and_keys
from patchbay.model.weights import HeadWeights, latent_weights, norm_epsilon, norm_parts, norms_nothing
from patchbay.signal.port import SIGNALS, PatchbayError, Port

# relative error up to which a statement holds; many a family norms and rotates in float32 whatever its dtype
LIMIT = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
MOVED = 1e-4  # relative change below which an edit counts as without effect


@dataclass(frozen=True)
class Row:
    """One statement about one signal: `error` is a largest difference over a largest value, at most `limit`.

    Where `at_least`, the statement is that something changes: `error` is then the change, and `limit` its least size.
    """

    signal: str
    claim: str
    error: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.error >= self.limit if self.at_least else self.error <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.signal}: {self.claim}: {self.error:.1e} ({'ok' if self.passed else 'FAILED'}, {sign} {self.limit:.0e})"


@on_own_device
@torch.no_grad()
def verify(model: Model, *, n_positions: int = 10, seed: int = 0) -> list[Row]:
    """Prove every port of `model` on one random prompt; the rows say what was checked and how well it held."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, model.vocab_size - 1), model.vocab_size, (1, n_positions), generator=generator)
    limit = QUANTISED if model.check.rounded else LIMIT.get(model.dtype, 1e-2)
    plain = model.hf(input_ids=ids.to(model.device), use_cache=False).logits
    base = run(model, ids, taps=model.ports)
    rows = list(_taps(model, ids, plain, limit))
    rows += _edits(model, ids, base, limit, generator)
    rows += _groups(model, ids, base, limit, generator)
    rows += [Row(signal, claim, error, limit) for signal, claim, error in _meanings(model, ids, base)]
    rows += [Row(signal, claim, error, 0.0) for signal, claim, error in _structure(model, base)]
    rows += _whole(model)
    return _worst(rows)


def family_table(twin: Callable[[str], Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for the random-weight twin of each family, which `twin` makes of its name: `family`, `ports`, `verified`, `checks`, `errors`."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # each state-space twin would say that it has no fused kernel
    try:
        return [_family(twin, name) for name in names]
    finally:
        logging.set_verbosity(verbosity)


def _family(twin: Callable[[str], Any], name: str) -> dict[str, Any]:
    try:
        model = load(twin(name))
        rows = verify(model)
    except PatchbayError as error:
        return {"family": name, "row": "", "ports": [], "verified": False, "checks": 0, "errors": [str(error)]}
    failed = [str(row) for row in rows if not row.passed]
    ports = [signal for signal in SIGNALS if any(port.signal == signal for port in model.ports)]
    found = {"family": name, "row": model.family.name, "ports": ports, "verified": not failed}
    return found | {"checks": len(rows), "errors": failed}


def _worst(rows: list[Row]) -> list[Row]:
    """Of each statement, the layer at which it holds least."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = worst.setdefault((row.signal, row.claim), row)
        margin = row.error - known.error if not row.at_least else known.error - row.error
        if margin > 0 or row.error != row.error:  # NaN is the worst there is
            worst[row.signal, row.claim] = row
    return sorted(worst.values(), key=lambda row: list(SIGNALS).index(row.signal))


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)
    return float(difference)


# ---- taps and edits --------------------------------------------------------------------------------------------------


def _taps(model: Model, ids: Tensor, plain: Tensor, limit: float) -> Iterator[Row]:
    for signal in dict.fromkeys(port.signal for port in model.ports):
        trace = run(model, ids, taps=[port for port in model.ports if port.signal == signal])
        if signal == "attn.pattern":  # computed where SDPA was
            yield Row(signal, "a tap leaves the logits as they were", _relative(trace.logits, plain), limit)
        else:
            yield Row(signal, "a tap leaves the logits bit-equal", float((trace.logits - plain).abs().max()), 0.0)


def _by_position(value: Tensor, port: Port) -> Tensor:
    """The tap of one prompt as edits take it: [position, ...features]."""
    return value.movedim(port.position_axis, 1)[0]


def _edits(model: Model, ids: Tensor, base: Trace, limit: float, generator: torch.Generator) -> Iterator[Row]:
    """Each editable port in its own row of one batch: its own value put back, then noise added at one position."""
    ports = [port for port in model.ports if port.editable]
    batch, at = ids.expand(len(ports), -1), ids.shape[1] // 2
    values = [_by_position(base[port], port) for port in ports]
    noise = [
        -2 * value[at]  # the order turned round: other experts are chosen
        if port.signal == "router.logits"
        else 0.5 * value.std() * torch.randn(value.shape[1:], generator=generator).to(value)
        for port, value in zip(ports, values, strict=True)
    ]
    same = run(model, batch, edits=[replace(p, v, rows=i) for i, (p, v) in enumerate(zip(ports, values, strict=True))])
    more = [add(port, v, positions=at, rows=i) for i, (port, v) in enumerate(zip(ports, noise, strict=True))]
    moved = run(model, batch, taps=ports, edits=more)
    for i, port in enumerate(ports):
        yield Row(
            port.signal, "its own value put back changes nothing", _relative(same.logits[i], base.logits[0]), limit
        )
        expected = values[i].clone()
        expected[at] += (
            noise[i] * (values[i][at] != 0) if port.signal == "attn.pattern" else noise[i]
        )  # hidden keys stay 0
        found = _by_position(moved[port][i : i + 1], port)
        yield Row(port.signal, "a tap sees the edit, where it acts and nowhere else", _relative(found, expected), limit)
        if model.causal:
            left = _relative(moved.logits[i, :at], base.logits[0, :at])
            yield Row(port.signal, "an edit leaves the logits before its position", left, limit)
        right = _relative(moved.logits[i, at:], base.logits[0, at:])
        yield Row(port.signal, "an edit moves the logits from its position on", right, MOVED, at_least=True)


def _groups(model: Model, ids: Tensor, base: Trace, limit: float, generator: torch.Generator) -> Iterator[Row]:
    """Noise on the keys or values of one group reaches z of the heads that the view puts into that group, and no others."""
    for i, layer in enumerate(model.layers):
        edits: list[Edit] = []
        for group in layer.groups:
            for port in (group.k, group.v):
                noise = torch.randn(ids.shape[1], base[port].shape[-1], generator=generator).to(base[port])
                edits.append(add(port, noise, rows=len(edits)))
        if not edits:
            continue
        z = run(model, ids.expand(len(edits), -1), taps=[layer.attn.z], edits=edits)[layer.attn.z]
        for row, edit in enumerate(edits):
            inside = [head.part.index for head in layer.groups[edit.port.index or 0].heads]
            outside = [head for head in range(model.n_heads(i)) if head not in inside]
            change = (z[row] - base[layer.attn.z][0]).abs().amax(dim=(0, 2)) / base[layer.attn.z].abs().max()  # [head]
            yield Row(edit.port.signal, "a group's heads read it", float(change[inside].min()), MOVED, at_least=True)
            if outside:
                yield Row(edit.port.signal, "other heads do not read it", float(change[outside].max()), limit)


# ---- what the signals mean -------------------------------------------------------------------------------------------


def _meanings(model: Model, ids: Tensor, base: Trace) -> Iterator[tuple[str, str, float]]:
    """Identities between signals: (signal, claim, relative error)."""
    still = queries_and_keys(model, ids.to(model.device)) if model.check.shifted else {}
    yield "embed", "it enters the first layer", _relative(base[Port("embed")], base[Port("resid_in", 0)])
    for i, at in enumerate(model.modules):
        ports = {port.signal: base[port] for port in model.ports if port.layer == i}
        out, middle = ports["resid_in"].double() + ports["attn.out"].double(), ports.get("resid_mid")
        if middle is not None:
            yield "resid_mid", "resid_in + attn.out", _relative(out, middle)
        if "mlp.out" in ports:
            out = out + ports["mlp.out"].double()
        yield "resid_out", "resid_in + attn.out + mlp.out", _relative(out, ports["resid_out"])
        after = base[Port("resid_in", i + 1)] if i + 1 < model.n_layers else None
        if after is not None:
            yield "resid_in", "resid_out of the layer before", _relative(ports["resid_out"], after)
        if at.norm_mlp is not None and "mlp.in" in ports:
            before = at.norm_mlp(ports["resid_in"] if middle is None else middle)
            yield "mlp.in", "the norm of the stream before the MLP", _relative(before, ports["mlp.in"])
        if at.attn is not None:
            yield from _attention(model, i, ports)
            yield from _head_weights(model, i, ports | {port.signal: x for port, x in still.items() if port.layer == i})
        if at.mlp_proj is not None:
            yield from _mlp(model, i, ports)
        if at.experts is not None:
            yield from _experts(model, i, ports)
    final = base[Port("resid_out", model.n_layers - 1)]
    yield (
        "final_norm",
        "the norm of the final stream",
        _relative(model.final_norm_module(final), base[Port("final_norm")]),
    )
    yield (
        "logits",
        "the unembedding of final_norm",
        _relative(model.unembed_logits(base[Port("final_norm")]), base.logits),
    )


def _attention(model: Model, layer: int, ports: dict[str, Tensor]) -> Iterator[tuple[str, str, float]]:
    at, z = model.modules[layer], ports["attn.z"]
    pattern, value = (
        ports["attn.pattern"],
        ports["attn.v"].repeat_interleave(model.n_heads(layer) // model.n_groups(layer), 1),
    )
    total = pattern.sum(-1)  # [prompt, head, query]
    over = total.clamp(min=1) if hasattr(at.attn, "sinks") else total  # a sink takes the rest
    yield "attn.pattern", "rows sum to 1, or less beside a sink", _relative(over, torch.ones_like(over))
    if model.family.qkv != "gated":
        yield "attn.z", "pattern times values", _relative(torch.einsum("bhqk,bhkd->bqhd", pattern, value), z)
    if "attn.head_out" not in ports:
        return
    summed = ports["attn.head_out"].sum(2)
    bias = linear_map(at.attn_proj)[1]
    summed = summed if bias is None else summed + bias
    if at.attn_added is not at.attn and at.attn_added is not at.attn_proj:
        summed = at.attn_added(summed)  # type: ignore[misc]
    summed = summed * model.residual_scale
    yield "attn.head_out", "heads and bias sum to attn.out", _relative(summed, ports["attn.out"])


def _head_weights(model: Model, layer: int, ports: dict[str, Tensor]) -> Iterator[tuple[str, str, float]]:
    """The stream through norm and weights gives v; and q and k at position 0, where rotary turns by nothing."""
    at, attn = model.modules[layer], model.layers[layer].attn
    normed, unit = ports["resid_in"], ports["resid_in"]
    if at.norm_attn is not None and not norms_nothing(at.norm_attn):
        centred = norm_parts(at.norm_attn)[2]
        normed, unit = at.norm_attn(normed), normed - normed.mean(-1, keepdim=True) if centred else normed
        unit = unit / (unit.pow(2).mean(-1, keepdim=True) + norm_epsilon(at.norm_attn)).sqrt()
    for fold, x, how in ((False, normed, "the normed stream times W"), (True, unit, "the unit stream times W folded")):
        w = attn.weights(fold_norm=fold)
        if model.family.qkv == "latent":
            yield from _latent(model, layer, ports, w, x, normed, how)
            continue
        for name, matrix, bias in (("attn.q", w.W_Q, w.b_Q), ("attn.k", w.W_K, w.b_K), ("attn.v", w.W_V, w.b_V)):
            found = torch.einsum("bpm,hmd->bhpd", x, matrix) + (0 if bias is None else bias[:, None])
            seen = ports[name]
            if name != "attn.v":
                found, seen = found[:, :, :1], seen[:, :, :1]
                found = found * ((found * seen).sum() / found.pow(2).sum()).clamp(min=0)  # some fold the scale into q
                if any("norm" in child for child, _ in at.attn.named_children()):  # type: ignore[union-attr]
                    continue
            yield name, how, _relative(found, seen)


def _latent(
    model: Model, layer: int, ports: dict[str, Tensor], w: HeadWeights, x: Tensor, normed: Tensor, how: str
) -> Iterator[tuple[str, str, float]]:
    """With the inner norms of each token as they were, x W is q, k and v: where rotary turns, at position 0, else everywhere."""
    rates = model.layers[layer].attn.inner_rates(normed)
    factors = latent_weights(model.family, model.modules[layer], model.n_heads(layer))
    still = model.d_head(layer) - len(factors.order)
    maps = (("attn.q", w.W_Q, w.b_Q), ("attn.k", w.W_K, w.b_K), ("attn.v", w.W_V, w.b_V))
    for (name, matrix, bias), rate in zip(maps, rates, strict=True):
        found = torch.einsum("bpm,hmd->bhpd", x, matrix).double() + (0 if bias is None else bias.double()[:, None])
        found, seen = found * rate[:, None], ports[name].double()
        where = how + ", at each token's inner scale"
        if name == "attn.v":
            yield name, where, _relative(found, seen)
            continue
        yield name, where + ": what is not turned", _relative(found[..., :still], seen[..., :still])
        turned, there = found[..., still:], seen[..., still:]
        turned = turned * rotary_size(turned[:, :, 0], there[:, :, 0])  # some scalings of rotary positions lengthen it
        yield name, where + ": the rotary part at position 0", _relative(turned[:, :, 0], there[:, :, 0])
        yield name, where + ": the length of the rotary part", _relative(turned.norm(dim=-1), there.norm(dim=-1))
    if how.endswith("W"):
        out = torch.einsum("bphd,hdm->bphm", ports["attn.z"], w.W_O)
        yield "attn.head_out", "z times W_O", _relative(out, ports["attn.head_out"])


def _mlp(model: Model, layer: int, ports: dict[str, Tensor]) -> Iterator[tuple[str, str, float]]:
    at = model.modules[layer]
    out = at.mlp_proj(ports["mlp.act"])  # type: ignore[misc]
    if at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj:
        out = at.mlp_added(out)  # type: ignore[misc]
    yield (
        "mlp.act",
        "through the down projection it is mlp.out",
        _relative(out * model.residual_scale, ports["mlp.out"]),
    )
    w = model.layers[layer].mlp.weights()
    plain = ports["mlp.act"] @ w.W_out + (0 if w.b_out is None else w.b_out)
    yield "mlp.out", "act times W_out", _relative(plain, at.mlp_proj(ports["mlp.act"]))  # type: ignore[misc]


def _experts(model: Model, layer: int, ports: dict[str, Tensor]) -> Iterator[tuple[str, str, float]]:
    at = model.modules[layer]
    total = ports["experts.out"].sum(2)
    for name in ("shared_expert", "shared_experts", "shared_mlp"):  # experts that every token goes through
        shared = getattr(at.mlp, name, None)
        if shared is not None:
            gate = getattr(at.mlp, name + "_gate", None)
            total = total + shared(ports["mlp.in"]) * (1 if gate is None else torch.sigmoid(gate(ports["mlp.in"])))
    if at.mlp_added is not at.mlp:
        total = at.mlp_added(total)  # type: ignore[misc]
    yield (
        "experts.out",
        "experts sum to their part of mlp.out",
        _relative(total * model.residual_scale, ports["mlp.out"]),
    )


def _structure(model: Model, base: Trace) -> Iterator[tuple[str, str, float]]:
    """What holds exactly: attention looks neither ahead nor beyond its window, and weights belong to the chosen experts."""
    for i, at in enumerate(model.modules):
        if at.attn is not None and model.causal:
            pattern = base[Port("attn.pattern", i)]
            back = torch.arange(pattern.shape[-2])[:, None] - torch.arange(pattern.shape[-1])  # [query, key]
            hidden = (back < 0) | (back >= (_window(model, i) or len(back)))
            yield (
                "attn.pattern",
                "0 ahead and beyond the window",
                float(pattern[..., hidden.to(pattern.device)].abs().max()),
            )
        if at.experts is not None:
            weights, chosen = base[Port("router.weights", i)], base[Port("router.experts", i)]
            allowed = torch.zeros_like(weights).scatter(-1, chosen, 1.0)
            yield "router.weights", "0 for experts not chosen", float((weights * (1 - allowed)).abs().max())
            lost = (weights != 0).sum(-1) != chosen.shape[-1]
            yield "router.experts", "the experts that have a weight", float(lost.sum())
            if Port("router.logits", i) in base.ports:
                yield "router.logits", "of the chosen experts, the larger has the larger weight", _disorder(base, i)


def _whole(model: Model) -> Iterator[Row]:
    """What loading asks only of code that it does not know: a prompt beside another, tokens far ahead, and, where autograd gives
    any, the gradients that the parts must have as they are added and read."""
    limit = QUANTISED if model.check.rounded else 10 * TOLERANCE.get(model.dtype, 1e-2)
    yield Row("logits", "a prompt is the same alone and beside another", batch_error(model), limit)
    if model.causal:
        yield Row("logits", f"what stands up to {LOOK} tokens ahead leaves them", ahead_error(model), limit)
    if (off := gradient_error(model)) is not None:
        yield Row("logits", "gradients are those of the parts", off, limit)


def _disorder(base: Trace, layer: int) -> float:
    """Chosen pairs whose weights are ordered otherwise than their logits."""
    weights, logits = base[Port("router.weights", layer)], base[Port("router.logits", layer)]
    both = (weights[..., :, None] != 0) & (weights[..., None, :] != 0)
    against = (weights[..., :, None] - weights[..., None, :]) * (logits[..., :, None] - logits[..., None, :]) < 0
    return float((both & against).sum())


def _window(model: Model, layer: int) -> int | None:
    """How far back this layer's attention looks, where the architecture limits it."""
    attn: Any = model.modules[layer].attn
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    if getattr(attn, "attention_type", "") == "local":
        return int(model.config.window_size)
    window = getattr(attn, "sliding_window", None)
    return int(window) if window else None
