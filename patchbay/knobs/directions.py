"""Directions: the singular directions of what tuning changed in each linear map, every one a dial from 0, as it was before, over 1, as it was tuned, to whatever.

    W = W_tuned + sum_k (t_k - 1) S_k U_k V_k^T,      U S V^T = W_tuned - W_base      (t = 1: the tuned model, t = 0: the base, both to the bit)

Of LoRA-SB, where W_tuned = W_base + s B R A with bases B and A that stay, these are the singular directions of the r x r numbers R that were learned, written in the bases. They belong to weights,
not to what a run says: a copy of the model has them turned (`turned`), and that copy is looked into like any other. In an MLP's down projection, which nothing else reads the input of, a direction is
a map of that input too, and so a Knob (`knob`), by row, with evidence and in files.

Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning" (LoRA-SB). That a direction is large does not say that it matters: turn it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.edits.edit import Edit
from patchbay.errors import by_kind
from patchbay.knobs.knob import Knob, _on
from patchbay.model.linear import in_first
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port, suggest

ROUNDS = 4.0  # roundings of a matrix: directions that are smaller are none


def linear_maps(model: Model) -> dict[str, nn.Module]:
    """The linear maps of the layers, by name: what has a matrix, embedding and unembedding aside."""
    tables = {id(m) for m in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings())}
    return {
        name: module
        for name, module in model.hf.named_modules()
        if (isinstance(module, nn.Linear) or in_first(module)) and id(module) not in tables
    }


@dataclass(frozen=True)
class Change:
    """What tuning changed in one map, y = x W, as terms: W [in, out] += U [in, k] S [k] V [k, out]."""

    U: Tensor
    S: Tensor
    V: Tensor

    def less(self, dials: Tensor) -> Tensor:
        """What the dials [k] add to the tuned matrix, [in, out]."""
        return (self.U * (self.S * (dials - 1.0))) @ self.V


class Directions:
    """The singular directions of what tuning changed, by linear map, largest first. `sizes`: their singular values, by the map's name."""

    @by_kind
    def __init__(self, base: Model, tuned: Model) -> None:
        self.base, self.tuned = base, tuned
        self.changes = _changes(base, tuned)

    @property
    def sizes(self) -> dict[str, list[float]]:
        return {name: change.S.tolist() for name, change in self.changes.items()}

    @by_kind
    def turned(self, dials: Mapping[str, float]) -> Model:
        """A copy of the tuned model with directions turned: `{"model.layers.0.mlp.down_proj:0": 0.0}` switches off the first of that map, a map's
        name alone turns all of its directions. Those that are not named stay at 1. PatchbayError for a dial that there is not."""
        hf = copy.deepcopy(self.tuned.hf).eval()
        own, before = linear_maps(self.tuned), linear_maps(self.base)
        for name, at in self._dials(dials).items():
            weight = hf.get_submodule(name).weight
            with torch.no_grad():
                if not bool(at.any()):
                    weight.copy_(before[name].weight)  # type: ignore[arg-type]
                elif not bool((at == 1.0).all()):
                    change = self.changes[name].less(at)
                    turned = own[name].weight.detach().double().cpu() + (change if in_first(own[name]) else change.T)  # type: ignore[operator]
                    weight.copy_(turned)  # type: ignore[operator]
        return load(hf, self.tuned.tokenizer)

    @by_kind
    def knob(self, name: str, k: int, strength: float = 1.0) -> Knob:
        """A knob of the tuned model whose strength is the dial of direction k of an MLP's down projection: 1 as it was tuned, 0 without it.

        PatchbayError for other maps, whose inputs others read too, and where the projection does not reach the whole stream.
        """
        dial = f"{name}:{k}"
        self._dials({dial: strength})
        module = linear_maps(self.tuned)[name]
        layer = next((i for i, at in enumerate(self.tuned.modules) if at.mlp_proj is module), None)
        if layer is None or "mlp.act" not in self.tuned.signals(layer):
            raise PatchbayError(
                f"{name} is no down projection of an MLP with neurons: others read what it reads, so that no edit of a signal turns it alone; use turned({{{dial!r}: {strength:g}}})"
            )
        found = self.changes[name]
        weight = module.weight.detach().double().cpu()  # type: ignore[operator]
        W = weight if in_first(module) else weight.T  # [neuron, d_model]
        inverse = torch.linalg.pinv(W)
        if float((inverse @ W - torch.eye(W.shape[1], dtype=W.dtype)).abs().max()) > 1e-6:
            raise PatchbayError(
                f"{name} [{W.shape[0]}, {W.shape[1]}] does not reach every direction of the stream, so that a change of it is no map of its input; use turned({{{dial!r}: {strength:g}}})"
            )
        without = torch.eye(len(W), dtype=W.dtype) - found.S[k] * torch.outer(found.U[:, k], found.V[k] @ inverse)
        edit = Edit("project", Port("mlp.act", layer), without.T.float().contiguous())
        made = {"method": f"direction {k} of what tuning changed in {name}", **_on(self.tuned)}
        return Knob(f"direction {dial}", [edit], strength, provenance=made, kept=True)

    def _dials(self, given: Mapping[str, float]) -> dict[str, Tensor]:
        """The dials [direction] of each map that is named."""
        found: dict[str, Tensor] = {}
        for text, value in given.items():
            name, _, number = text.partition(":")
            if name not in self.changes:
                known = list(self.changes)
                raise PatchbayError(
                    f"no dial {text!r}: tuning changed {', '.join(known[:4])}{' and others' if len(known) > 4 else ''}{suggest(name, known)}"
                )
            n = len(self.changes[name].S)
            if number and not (number.isdigit() and int(number) < n):
                raise PatchbayError(f"no dial {text!r}: {name} has the directions 0..{n - 1}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PatchbayError(f"dial {text}: a number, got {value!r:.40}")
            at = found.setdefault(name, torch.ones(n, dtype=torch.float64))
            at[int(number) if number else slice(None)] = float(value)
        return found

    def __repr__(self) -> str:
        rows = [
            f"  {name}: {', '.join(f'{size:.3g}' for size in sizes[:6])}{' and smaller' if len(sizes) > 6 else ''}"
            for name, sizes in self.sizes.items()
        ]
        more = [f"  and {len(rows) - 8} more maps"] if len(rows) > 8 else []
        return "\n".join(
            [f"Directions of what tuning changed in {len(rows)} linear maps, by singular value", *rows[:8], *more]
        )


def _changes(base: Model, tuned: Model) -> dict[str, Change]:
    """The terms of every map that tuning changed. PatchbayError where it changed anything else, or nothing."""
    own, other = dict(base.hf.named_parameters()), dict(tuned.hf.named_parameters())
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in other.items()}:
        raise PatchbayError("the two models have other tensors: the tuned one is to be of the base's form")
    if not all(p.is_floating_point() and p.element_size() > 1 for p in [*own.values(), *other.values()]):
        raise PatchbayError("directions are of weights in a floating-point dtype: load both models in one")
    maps = linear_maps(tuned)
    inside = {f"{name}.weight" for name in maps}
    if elsewhere := [name for name, p in own.items() if name not in inside and not torch.equal(p, other[name].to(p))]:
        raise PatchbayError(
            f"tuning changed {elsewhere[0]}{f' and {len(elsewhere) - 1} more tensors' if len(elsewhere) > 1 else ''}, which is no matrix of a linear map: directions are of tuning "
            "that moves these alone, as LoRA does"
        )
    found = {}
    for name, module in maps.items():
        before, after = (one[f"{name}.weight"].detach().double().cpu() for one in (own, other))
        if torch.equal(before, after):
            continue
        change = after - before
        U, S, V = torch.linalg.svd(change if in_first(module) else change.T, full_matrices=False)
        eps = max(torch.finfo(p.dtype).eps for p in (own[f"{name}.weight"], other[f"{name}.weight"]))
        real = max(1, int((ROUNDS * eps * float(after.norm()) < S).sum()))
        found[name] = Change(U[:, :real], S[:real], V[:real])
    if not found:
        raise PatchbayError("the two models have the same weights: nothing was tuned")
    return found
