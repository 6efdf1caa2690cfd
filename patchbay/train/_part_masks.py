"""Masks over parts: one number of a mask for all weights of a head, a neuron, a layer, in place of one for each weight.

What tuning changed belongs to parts of the kinds that are asked for; what is left of each tensor (embeddings, norms, keys that several heads share) is a part of its own, named after the
tensor, so that a mask of ones is still the tuned model. Which weights a part has says `_entries`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.signal.port import Part, PatchbayError, suggest
from patchbay.train._entries import each

COUNTED = {"head": "attn.z", "group": "attn.v", "neuron": "mlp.act", "expert": "experts.out"}  # by the signal of all
WHOLE = ("layer", "attn", "mlp")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """Of what tuning changed: `names` and `kinds` of its parts, `of` [entry] the number of each entry's part, by tensor."""

    names: list[str]
    kinds: list[str]
    of: Tensors

    def spread(self, values: Tensor) -> Tensors:
        """Numbers of parts [part] as numbers of entries, by tensor."""
        return {name: values.to(at.device)[at] for name, at in self.of.items()}

    def shuffled(self, kept: Tensor, seed: int) -> Tensor:
        """As many parts of each kind kept, drawn [part]; what is in no part stays as it is, so that parts alone differ."""
        found, draw = kept.clone(), torch.Generator().manual_seed(seed + 1)
        for kind in sorted({kind for kind in self.kinds if kind}):
            places = torch.tensor([i for i, one in enumerate(self.kinds) if one == kind])
            found[places] = kept[places[torch.randperm(len(places), generator=draw)]]
        return found

    def rows(self, logits: Tensor, changed: Tensors) -> list[dict[str, Any]]:
        """A row for each part: its l, whether it is kept, how many numbers tuning changed there; what goes first."""
        counts = torch.zeros(len(self.names), dtype=torch.long)
        for name, at in self.of.items():
            counts += torch.bincount(at[changed[name] != 0].flatten().cpu(), minlength=len(self.names))
        told = zip(self.names, logits.tolist(), counts.tolist(), strict=True)
        found = [{"part": name, "kept": one > 0, "l": one, "of": of} for name, one, of in told]
        return sorted(found, key=lambda row: row["l"])


def parts_of(model: Model, changed: Tensors, asked: str) -> Parts:
    """The parts of kinds, written with commas, in which tuning changed something. PatchbayError where kinds share weights or change nothing."""
    kinds = [one.strip() for one in asked.split(",")]
    known = [*COUNTED, *WHOLE]
    if strange := next((one for one in kinds if one not in known), None):
        raise PatchbayError(
            f"mask={asked!r}: no kind {strange!r}; kinds are {', '.join(known)}{suggest(strange, known)}"
        )
    listed = [part for kind in dict.fromkeys(kinds) for part in _all(model, kind)]
    of = {name: torch.full((tau.numel(),), -1) for name, tau in changed.items()}
    names: list[str] = []
    owners: list[str] = []
    for part, own in zip(listed, each(model, listed), strict=True):
        number = len(names)
        moved = [(name, places) for name, places in own.items() if name in of]
        for name, places in moved:
            if bool((taken := of[name][places] >= 0).any()):
                other = names[int(of[name][places][taken][0])]
                raise PatchbayError(
                    f"mask={asked!r}: {part} and {other} share weights of {name}: ask for kinds that do not"
                )
        if any(bool((changed[name].flatten().cpu()[places] != 0).any()) for name, places in moved):
            names.append(str(part))
            owners.append(part.kind)
            for name, places in moved:
                of[name][places] = number
    if not names:
        raise PatchbayError(f"mask={asked!r}: tuning changed nothing in parts of these kinds")
    for name, at in of.items():
        rest = at < 0
        if bool((changed[name].flatten().cpu()[rest] != 0).any()):
            at[rest] = len(names)
            names.append(f"rest of {name}")
            owners.append("")
        else:
            at[rest] = 0  # nothing changed there: whatever the mask says of it is nothing
    shaped = {name: at.view(changed[name].shape).to(changed[name].device) for name, at in of.items()}
    return Parts(names, owners, shaped)


def _all(model: Model, kind: str) -> Sequence[Part]:
    """All parts of a kind. PatchbayError where the model has none."""
    found: list[Part] = []
    for layer in range(model.n_layers):
        has, at = model.signals(layer), model.modules[layer]
        if kind in WHOLE:
            module = {"layer": at.layer, "attn": at.attn or at.attn_added, "mlp": at.mlp}[kind]
            found += [Part(layer, kind)] if module is not None and any(True for _ in module.parameters()) else []
        elif COUNTED[kind] in has:
            count = {
                "head": model.n_heads,
                "group": model.n_groups,
                "neuron": model.n_neurons,
                "expert": model.n_experts,
            }[kind]
            found += [Part(layer, kind, i) for i in range(count(layer))]
    if not found:
        raise PatchbayError(f"mask: this {model.family.name} model has no parts of the kind {kind}")
    return found
