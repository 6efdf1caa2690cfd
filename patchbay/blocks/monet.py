"""Monet: a feed-forward layer of E x E small experts from the products of two halves, so that one of them can be read and switched off.

Each head h routes every token twice, over the first halves and over the second: z1 = W1 x, z2 = W2 x, E numbers each; normed over tokens and halves (running
numbers outside training); what passes min(largest, Phi^-1(1 - k/E)) is kept, and g1, g2 are the softmax of the raw z over the kept. Expert (i, j) is used with
w_ij = sum_h g1_hi g2_hj.

    horizontal   expert_ij(x) = V_j relu(U_i x)^2 + b_j
    vertical     expert_ij(x) = [V11_i a_i + V12_i c_j + b1_i ; V21_j a_i + V22_j c_j + b2_j],   a_i = relu(U1_i x)^2, c_j = relu(U2_j x)^2

and y = sum_ij w_ij expert_ij(x), computed from the factors, never from E x E experts: 2 E d m + E d numbers in a layer beside the router. An expert that is off (`cut`,
`without`) gives nothing and no other takes its place: y - sum over them of w_ij expert_ij(x).

Park et al. 2024, "Monet: Mixture of Monosemantic Experts for Transformers" (262,144 experts a layer, E = 512, 8 heads, k = 32). There one router serves four layers;
here each layer has its own, since a block that reads what another routed could not be run again alone. Statistics of new weights are those of nothing: without
training, far fewer halves pass than k (`kept` tells; `warm` runs texts to make them).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError, one_of

FORMS = ("horizontal", "vertical")
MOMENTUM = 0.1
Pairs = dict[int, list[tuple[int, int]]]


class Monet(nn.Module):
    """The layer, from and to a stream of width d. `width`: numbers m inside an expert; `keep`: about how many halves a head keeps of each side."""

    without_neurons = True  # what it adds is no matrix times its acts

    def __init__(self, d: int, *, experts: int, heads: int, keep: int, width: int, form: str) -> None:
        super().__init__()
        self.heads, self.keep, self.form = heads, keep, form
        self.heard: list[Tensor] | None = None  # who watches the gates
        self.route = nn.Parameter(torch.empty(2, heads, experts, d))
        halves = 1 if form == "horizontal" else 2
        self.read = nn.Parameter(torch.empty(halves, experts, width // halves, d))
        self.write = nn.Parameter(torch.empty(halves, halves, experts, d // halves, width // halves))
        self.bias = nn.Parameter(torch.empty(halves, experts, d // halves))
        self.register_buffer("mean", torch.zeros(2, heads))
        self.register_buffer("variance", torch.ones(2, heads))
        self.register_buffer("off", torch.zeros(experts, experts, dtype=torch.bool))
        self.reset_block(None)

    @torch.no_grad()
    def reset_block(self, config: Any) -> None:
        """New weights, each map of unit gain."""
        for weight in (self.route, self.read, self.write):
            weight.normal_(std=weight.shape[-1] ** -0.5)
        self.bias.zero_()
        self.mean.zero_()
        self.variance.fill_(1.0)
        self.off.zero_()

    def gates(self, x: Tensor) -> Tensor:
        """g [side, ..., head, half], each row of which sums to 1. In training it moves the statistics."""
        z = torch.einsum("shed,...d->s...he", self.route, x)
        over = (*range(1, z.ndim - 2), z.ndim - 1)
        if self.training:
            mean, variance = z.mean(over), z.var(over, unbiased=False)
            with torch.no_grad():
                self.mean += MOMENTUM * (mean.to(self.mean) - self.mean)
                self.variance += MOMENTUM * (variance.to(self.variance) - self.variance)
        else:
            mean, variance = self.mean, self.variance
        shape = (2, *[1] * (z.ndim - 3), self.heads, 1)
        normed = (z - mean.view(shape)) / (variance.view(shape) + 1e-6).sqrt()
        least = torch.special.ndtri(torch.tensor(1 - self.keep / z.shape[-1], dtype=torch.float64)).to(normed)
        passed = normed >= torch.minimum(normed.amax(-1, keepdim=True), least)
        return torch.softmax(z.masked_fill(~passed, -torch.inf), -1)

    def forward(self, x: Tensor) -> Tensor:
        g = self.gates(x)
        if self.heard is not None:
            self.heard.append(g)
        return self.mixed(x, g) if not self.off.any() else self.weighed(x, self.used(g) * ~self.off)

    def used(self, g: Tensor) -> Tensor:
        """w [..., first half, second half]: how much of each expert."""
        return torch.einsum("...hi,...hj->...ij", g[0], g[1])

    def acts(self, x: Tensor) -> Tensor:
        """relu(U x)^2 [side, ..., half, m]."""
        return torch.einsum("semd,...d->s...em", self.read, x).relu().square()

    def mixed(self, x: Tensor, g: Tensor) -> Tensor:
        """The layer from its factors: no number for a pair is made."""
        acts, first, second = self.acts(x), g[0], g[1]
        read_first = torch.einsum("...hi,...im->...hm", first, acts[0])  # sum_i g1 a_i of each head
        if self.form == "horizontal":
            y = torch.einsum("...hj,...hm,jdm->...d", second, read_first, self.write[0, 0])
            return y + torch.einsum("...hj,jd->...d", second, self.bias[0])
        read_second = torch.einsum("...hj,...jm->...hm", second, acts[1])
        low = torch.einsum("...hi,...im,idm->...d", first, acts[0], self.write[0, 0])
        low = low + torch.einsum("...hi,...hm,idm->...d", first, read_second, self.write[0, 1])
        high = torch.einsum("...hj,...hm,jdm->...d", second, read_first, self.write[1, 0])
        high = high + torch.einsum("...hj,...jm,jdm->...d", second, acts[1], self.write[1, 1])
        bias = torch.einsum("s...he,sed->s...d", g, self.bias)
        return torch.cat([low + bias[0], high + bias[1]], -1)

    def weighed(self, x: Tensor, w: Tensor) -> Tensor:
        """sum_ij w_ij expert_ij(x) for any weights [..., first half, second half]."""
        acts = self.acts(x)
        if self.form == "horizontal":
            read = torch.einsum("...ij,...im->...jm", w, acts[0])
            return torch.einsum("...jm,jdm->...d", read, self.write[0, 0]) + w.sum(-2) @ self.bias[0]
        first, second = w.sum(-1), w.sum(-2)
        low = torch.einsum("...i,...im,idm->...d", first, acts[0], self.write[0, 0])
        low = low + torch.einsum("...ij,...jm,idm->...d", w, acts[1], self.write[0, 1]) + first @ self.bias[0]
        high = torch.einsum("...ij,...im,jdm->...d", w, acts[0], self.write[1, 0])
        high = high + torch.einsum("...j,...jm,jdm->...d", second, acts[1], self.write[1, 1]) + second @ self.bias[1]
        return torch.cat([low, high], -1)


def layer(d: int, given: dict[str, Any]) -> Monet:
    """The layer that a table asks for. Raises PatchbayError for what cannot be."""
    known = {"experts": 32, "heads": 2, "keep": 4, "width": 8, "form": "horizontal"}
    if extra := set(given) - set(known):
        raise PatchbayError(f"monet has no {', '.join(sorted(extra))}; it takes {', '.join(known)}")
    made = {**known, **given}
    one_of("form", made["form"], FORMS)
    for name in ("experts", "heads", "keep", "width"):
        if not isinstance(made[name], int) or isinstance(made[name], bool) or made[name] < 1:
            raise PatchbayError(f"monet: {name}={made[name]!r}; a whole number, 1 or more")
    if made["keep"] >= made["experts"]:
        raise PatchbayError(f"monet: keep={made['keep']} of {made['experts']} halves leaves no choice; say fewer")
    if made["form"] == "vertical" and (made["width"] % 2 or d % 2):
        raise PatchbayError(
            f"monet: the vertical form halves the width {made['width']} and the stream's {d}; both even"
        )
    return Monet(d, **made)


# --- what a user asks of a model that has such layers ---


def layers(model: nn.Module) -> list[Monet]:
    """The Monet layers of a model, first to last. Raises PatchbayError where it has none."""
    found = [module for module in model.modules() if isinstance(module, Monet)]
    if not found:
        raise PatchbayError("this model has no Monet layer; pb.blocks.build(config, monet={}) makes one that has")
    return found


@contextmanager
def watched(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """The gates of every layer of every run in this block, as a list by layer, with their gradients."""
    found = layers(model)
    was = [module.heard for module in found]
    seen: list[list[Tensor]] = [[] for _ in found]
    for module, own in zip(found, seen, strict=True):
        module.heard = own
    try:
        yield seen
    finally:
        for module, before in zip(found, was, strict=True):
            module.heard = before


@torch.no_grad()
def shares(model: nn.Module, ids: Iterable[Tensor]) -> Tensor:
    """How much each expert is used, a token, over batches of ids [prompt, position]: [layer, first half, second half], whose sum is the number of heads."""
    total: list[Tensor] = []
    n = 0
    for batch in ids:
        with watched(model) as seen:
            model(batch)
        found = [torch.einsum("...hi,...hj->ij", g[0], g[1]) for [g] in seen]
        total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
        n += batch.numel()
    if not n:
        raise PatchbayError("shares needs texts: batches of ids [prompt, position]")
    return torch.stack(total) / n


@torch.no_grad()
def kept(model: nn.Module, ids: Tensor) -> Tensor:
    """How many halves a head keeps of each side, a token: [layer, side], to be held beside `keep`."""
    with watched(model) as seen:
        model(ids)
    return torch.stack([(g > 0).sum(-1).double().flatten(1).mean(1) for [g] in seen])


@torch.no_grad()
def warm(model: nn.Module, ids: Iterable[Tensor]) -> None:
    """Move the statistics of the routers by running these batches in training mode; no weight moves."""
    was = model.training
    model.train()
    try:
        for batch in ids:
            model(batch)
    finally:
        model.train(was)


def losses(seen: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Of watched gates: uniformity, - mean log of the mean gate, least where all halves are used alike; ambiguity, mean of 1 - the largest gate of a row."""
    by_layer = [g for runs in seen for g in runs]
    means = torch.stack([g.flatten(1, -2).mean(1) for g in by_layer])
    return -means.clamp_min(1e-9).log().mean(), torch.stack([(1 - g.amax(-1)).mean() for g in by_layer]).mean()


@torch.no_grad()
def cut(model: nn.Module, pairs: Pairs) -> None:
    """Switch these experts off in place, by layer: {0: [(i, j), ...]}. They are off in what is saved too; an empty list switches a layer's on."""
    found = layers(model)
    for at, own in pairs.items():
        if not 0 <= at < len(found):
            raise PatchbayError(f"Monet layer {at}: the model has {len(found)}, counted from 0")
        off = torch.zeros_like(found[at].off)
        for i, j in own:
            if not (0 <= i < len(off) and 0 <= j < len(off)):
                raise PatchbayError(f"expert ({i}, {j}) of layer {at}: halves are 0 to {len(off) - 1}")
            off[i, j] = True
        found[at].off.copy_(off)


@contextmanager
def without(model: nn.Module, pairs: Pairs) -> Iterator[None]:
    """The same for the length of a block, beside what is off already."""
    was = [module.off.clone() for module in layers(model)]
    try:
        beside = {at: list(map(tuple, off.nonzero().tolist())) for at, off in enumerate(was)}
        cut(model, {at: [*own, *beside.get(at, [])] for at, own in pairs.items()})
        yield
    finally:
        for module, off in zip(layers(model), was, strict=True):
            module.off.copy_(off)


def own_of(domains: Tensor, *, times: float = 2.0) -> list[Pairs]:
    """Shares [domain, layer, i, j] -> the experts of each domain: those used at least `times` as much there as in the next."""
    two = domains.topk(2, dim=0).values
    clear = (two[0] > 0) & (two[0] >= times * two[1])
    top = domains.argmax(0)
    return [
        {
            at: [(int(i), int(j)) for i, j in (clear[at] & (top[at] == domain)).nonzero()]
            for at in range(domains.shape[1])
        }
        for domain in range(len(domains))
    ]
