"""Paths: what every node of a frozen run sends to every other one, and how much of it reaches the logits.

    weight(source -> target) = (what the source writes) . (d target's pre-activation / d the stream there)

All between them is affine (`_frozen.py`), so that the weights into a target sum to its pre-activation (of a logit: to its centred logit).
Of a node, `influence` is the share of the logits that goes through it when each target's |weights| are taken as shares,

    influence = w N + w N^2 + w N^3 + ...     N[target, source] = |weight| / sum over sources of |weight|

w the logits' probabilities. Leaves (tokens, errors, biases) are reached by no weight, so that their influences sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.find._frozen import Frozen, Map
from patchbay.signal.port import Part

ROOM = 2**26  # numbers held at a time by a batch of targets


@dataclass(frozen=True)
class Node:
    """A node: `kind` is feature, error, embed, bias or logit; `index` is a feature's, a token's id, or of a bias 0 for attention's, 1 for the
    MLP's and 2 for the reader's own (with that of the norm that it reads through). A bias is one node for all positions."""

    kind: str
    layer: int
    position: int
    index: int = 0

    def text(self, kind: str) -> str:
        """As it is named in tables: `L1.mlp.F12@3`, `L1.mlp.error@3`, `embed@0`, `L1.attn.bias`, `bias`, `logit 42`."""
        if self.kind == "feature":
            return f"{Part(self.layer, kind, self.index)}@{self.position}"
        if self.kind == "error":
            return f"L{self.layer}.mlp.error@{self.position}"
        if self.kind == "bias":
            return "bias" if self.index == 2 else f"L{self.layer}.{('attn', 'mlp')[self.index]}.bias"
        return f"embed@{self.position}" if self.kind == "embed" else f"logit {self.index}"


@dataclass
class Targets:
    """Nodes that read at one place: the stream of a layer's MLP, or (`layer` = `n_layers`) the last stream."""

    layer: int
    nodes: list[Node]
    towards: Tensor  # what they read there, [n, position, d_model]
    own: Tensor  # what their own biases add, [n]
    pre: Tensor  # their pre-activations, [n]

    def some(self, of: slice) -> Targets:
        return Targets(self.layer, self.nodes[of], self.towards[of], self.own[of], self.pre[of])


class Paths:
    """A frozen run as a linear map from what nodes write to what they read."""

    def __init__(self, run: Frozen) -> None:
        self.run, self.zero = run, torch.zeros_like(run.embed)
        self.n_layers, self.n_positions = len(run.blocks), len(run.embed)
        self.active = [block.acts != 0 for block in run.blocks]
        self.missed = [run.error(i, self.active) for i in range(self.n_layers)]
        self.constants = {
            (what, i): getattr(block, name)(self.zero)
            for i, block in enumerate(run.blocks)
            for what, name in (("attn", "attn"), ("mlp", "through"))
        }

    # --- targets ------------------------------------------------------------------------------------

    def logits(self, tokens: list[int]) -> Targets:
        """The centred logits of some tokens at the last position."""
        columns, bias, value = self.run.centred(tokens)
        towards = torch.zeros(len(tokens), *self.zero.shape, dtype=torch.float64)
        towards[:, -1] = columns
        own = bias + columns @ self.run.final(self.zero)[-1]
        nodes = [Node("logit", self.n_layers, self.n_positions - 1, token) for token in tokens]
        return Targets(self.n_layers, nodes, back(self.run.final, towards), own, value)

    def features(self, layer: int, nodes: Sequence[Node]) -> Targets:
        """Features of one layer."""
        block = self.run.blocks[layer]
        towards = torch.zeros(len(nodes), *self.zero.shape, dtype=torch.float64)
        own, pre = torch.zeros(2, len(nodes), dtype=torch.float64)
        nothing, normed = block.read(self.zero), block.read(block.stream)
        for position in {node.position for node in nodes}:
            some = [i for i, node in enumerate(nodes) if node.position == position]
            vectors, bias = block.reads.of(position, torch.tensor([nodes[i].index for i in some]))
            towards[some, position] = vectors
            own[some], pre[some] = (bias + vectors @ x[position] for x in (nothing, normed))
        return Targets(layer, list(nodes), back(block.read, towards), own, pre)

    # --- sources ------------------------------------------------------------------------------------

    def descend(self, targets: Targets) -> Iterator[tuple[str, int, Tensor]]:
        """What the targets read of what each part adds to the stream, from the last layer below them downwards: ("mlp" or "attn", layer,
        directions [n, position, d_model]), and ("embed", -1, ...) at the end."""
        towards = targets.towards
        for i in range(min(targets.layer, self.n_layers - 1), -1, -1):
            block, after = self.run.blocks[i], i < targets.layer
            passed = back(block.through, towards) if after else 0.0
            if after:
                yield "mlp", i, towards
            if not after and not block.sequential:
                continue  # attention of a parallel layer is not seen by its MLP
            reached = towards + passed if block.sequential else towards
            yield "attn", i, reached
            towards = reached + back(block.attn, reached) + (0.0 if block.sequential else passed)
        yield "embed", -1, towards

    def whole(self, targets: Targets) -> tuple[list[Tensor], Tensor]:
        """What all features send to targets, by layer [n, position, feature], and the sum [n] of the |weights| of all sources."""
        found = [torch.zeros(len(targets.nodes), *block.acts.shape, dtype=torch.float64) for block in self.run.blocks]
        total = targets.own.abs().clone()
        for what, i, towards in self.descend(targets):
            if what == "embed":
                total += (towards * self.run.embed).sum(2).abs().sum(1)
                continue
            total += (towards * self.constants[what, i]).sum((1, 2)).abs()
            if what == "mlp":
                read = back(self.run.blocks[i].post, towards)
                for source, rows in self.run.writers(i):
                    found[source] += read @ rows.T * self.run.blocks[source].acts
                total += (towards * self.missed[i]).sum(2).abs().sum(1)
        return found, total + sum(one.abs().sum((1, 2)) for one in found)

    def sent(self, targets: Targets, kept: list[Tensor]) -> Tensor:
        """Weights [n, source] of the sources that `sources` names."""
        size = len(targets.nodes)
        features, errors = ([torch.zeros(size, 0, dtype=torch.float64)] * self.n_layers for _ in range(2))
        biases, embed = torch.zeros(size, 2 * self.n_layers, dtype=torch.float64), torch.zeros(0)
        for i in range(self.n_layers):
            features[i] = torch.zeros(size, int(kept[i].sum()), dtype=torch.float64)
            errors[i] = torch.zeros(size, self.n_positions, dtype=torch.float64)
        for what, i, towards in self.descend(targets):
            if what == "embed":
                embed = (towards * self.run.embed).sum(2)
                continue
            biases[:, 2 * i + (what == "mlp")] = (towards * self.constants[what, i]).sum((1, 2))
            if what == "mlp":
                errors[i] = (towards * self.run.error(i, kept)).sum(2)
                read = back(self.run.blocks[i].post, towards)
                for source, rows in self.run.writers(i):
                    at, which = kept[source].nonzero().T
                    features[source] += (read[:, at] * rows[which]).sum(2) * self.run.blocks[source].acts[at, which]
        return torch.cat([*features, *errors, embed, biases, targets.own[:, None]], 1)

    def sources(self, kept: list[Tensor]) -> list[Node]:
        """The nodes that write: kept features, by layer, position and index; errors; tokens; biases."""
        nodes = [Node("feature", i, *place) for i, mask in enumerate(kept) for place in mask.nonzero().tolist()]
        nodes += [Node("error", i, at) for i in range(self.n_layers) for at in range(self.n_positions)]
        nodes += [Node("embed", -1, at, token) for at, token in enumerate(self.run.ids)]
        return (
            nodes
            + [Node("bias", i, -1, which) for i in range(self.n_layers) for which in (0, 1)]
            + [Node("bias", -1, -1, 2)]
        )

    # --- which features -----------------------------------------------------------------------------

    def chosen(self, logits: Targets, weights: Tensor, n: int) -> list[Tensor]:
        """Masks [position, feature] by layer of the `n` features that are followed: all active ones where these are no more, else of each
        layer, from the last one down, as many as its share, by influence on the logits through those chosen above it."""
        active = self.active
        if sum(int(mask.sum()) for mask in active) <= n:
            return active
        influence = [torch.zeros_like(block.acts) for block in self.run.blocks]
        kept = [torch.zeros_like(mask) for mask in active]
        self._spread(logits, weights, influence)
        for i in range(self.n_layers - 1, -1, -1):
            share = min(-(-n // (i + 1)), int(active[i].sum()))
            n -= share
            best = influence[i].masked_fill(~active[i], -1.0).flatten().topk(share).indices
            kept[i].view(-1)[best] = True
            nodes = [Node("feature", i, *place) for place in kept[i].nonzero().tolist()]
            if i and nodes:
                self._spread(self.features(i, nodes), influence[i][kept[i]], influence)
        return kept

    def _spread(self, targets: Targets, weights: Tensor, influence: list[Tensor]) -> None:
        """Add to all features' influence what they send to targets of some influence."""
        numbers = sum(block.acts.numel() for block in self.run.blocks)
        for some in pieces(len(targets.nodes), numbers):
            found, total = self.whole(targets.some(some))
            share = weights[some] / total.clamp_min(1e-300)
            for held, one in zip(influence, found, strict=True):
                held += torch.einsum("n,npf->pf", share, one.abs())


def back(affine: Map, towards: Tensor) -> Tensor:
    """Directions [n, position, d_model] carried back through an affine map."""
    _, pulled = torch.func.vjp(affine, torch.zeros_like(towards[0]))
    moved: Tensor = torch.func.vmap(lambda one: pulled(one)[0])(towards)
    return moved


def pieces(n: int, numbers: int) -> list[slice]:
    size = max(1, ROOM // max(numbers, 1))
    return [slice(start, start + size) for start in range(0, n, size)]


# --- influence and pruning ----------------------------------------------------------------------------


def shares(weights: Tensor) -> Tensor:
    """|weights| [target, source] by row as shares of their sum; 0 where a row is 0."""
    sizes = weights.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp_min(1e-300)


def influences(weights: Tensor, n_features: int, start: Tensor) -> Tensor:
    """Influence [source]. The targets are the first `n_features` sources, then the logits, whose weights are `start`."""
    share, total = shares(weights), torch.zeros(weights.shape[1], dtype=torch.float64)
    now = torch.cat([torch.zeros(n_features, dtype=torch.float64), start]) @ share
    while bool((now > 0).any()):  # features read only what lies below them, so that this ends
        total += now
        now = now[:n_features] @ share[:n_features]
    return total


def fewest(values: Tensor, share: float) -> Tensor:
    """The fewest values, largest first, that hold a share of their sum, as a mask."""
    flat = values.flatten()
    order = flat.argsort(descending=True, stable=True)
    before = flat[order].cumsum(0) - flat[order]
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order] = (before < share * flat.sum()) & (flat[order] > 0)
    return kept.view(values.shape)


@dataclass
class Pruned:
    """What is left: masks of the sources and of the weights, and the influences before."""

    sources: Tensor
    edges: Tensor
    influence: Tensor


def pruned(weights: Tensor, nodes: Sequence[Node], start: Tensor, keep_nodes: float, keep_edges: float) -> Pruned:
    """Nodes to a share of the influence (tokens and logits stay), edges to a share of what these then carry, and no node without edges."""
    n = sum(node.kind == "feature" for node in nodes)
    influence = influences(weights, n, start)
    stay = torch.tensor([node.kind == "embed" for node in nodes])
    sources = fewest(influence, keep_nodes) | stay
    targets = torch.cat([sources[:n], torch.ones(len(start), dtype=torch.bool)])
    left = torch.where(targets[:, None] & sources, weights, 0.0)
    carried = torch.cat([influences(left, n, start)[:n], start])
    edges = fewest(shares(left) * carried[:, None], keep_edges)
    while True:
        wanted = sources & (edges.any(0) | stay)
        wanted[:n] &= edges[:n].any(1)
        if torch.equal(wanted, sources):
            return Pruned(sources, edges, influence)
        sources = wanted
        edges = edges & sources
        edges[:n] &= sources[:n, None]
