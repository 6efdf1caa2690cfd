"""Words of parts whose weights are read as components: experts, and components of what a head, MLP or expert writes.

An expert is chosen by its row of the router, which is read with the gain of the norm before the MLP; what it reads is the map of its
gate or in-projection, what it writes that of its down-projection, as singular directions of each. A component of a writer (L1.H2.C0)
writes one direction of the stream, and a head's also reads one. A singular direction has no sign: the tokens at both ends are shown.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.errors import PatchbayError
from patchbay.model.cards import token_rows, words_of
from patchbay.model.model import Model
from patchbay.signal.channel import Channel
from patchbay.signal.port import Part
from patchbay.wiring.components import components, expert_weights, folded_norm, precise

SHOWN = 3  # singular directions of an expert
Direction = tuple[str, str, Tensor]  # its name, "reads" or "writes", [d_model]


def words(model: Model, what: Part | Channel) -> list[dict[str, Any]]:
    """Rows of `model.cards.words_of` for any part or component; none where its weights cannot be read."""
    try:
        if isinstance(what, Channel):
            return token_rows(model, _component(model, what))
        if what.kind == "expert":
            return token_rows(model, _expert(model, what))
    except PatchbayError:
        return []
    return words_of(model, what)


def _component(model: Model, channel: Channel) -> list[Direction]:
    if channel.component is None:
        return []
    named = channel.component if isinstance(channel.component, str) else None
    found = components(model, channel.writer, named)
    i = channel.component if isinstance(channel.component, int) else 0
    share = 100 * float(found.s[i]) ** 2 / float(found.s.square().sum())
    name = str(channel.component) if named else f"C{i} ({share:.0f} % of what {channel.writer} can write)"
    writes = [(name, "writes", found.v[i].float())]
    return [(name, "reads", found.u[i].float()), *writes] if channel.writer.kind == "head" else writes


@torch.no_grad()
def _expert(model: Model, part: Part) -> list[Direction]:
    layer, expert = part.layer or 0, part.index or 0
    at = model.modules[layer]
    found: list[Direction] = []
    router = getattr(at.router, "weight", None)
    path = model.family.norm_mlp
    if isinstance(router, Tensor) and router.shape == (model.n_experts(layer), model.d_model):
        row = folded_norm(model, layer, path, at.norm_mlp, precise(router[expert])[:, None])
        found.append(("router", "reads", row[:, 0].float()))
    into, _ = expert_weights(model, layer)
    read = folded_norm(model, layer, path, at.norm_mlp, into[expert])  # [d_model, gate and in]
    u, s, _ = torch.linalg.svd(read.float(), full_matrices=False)
    share = s.square() / s.square().sum()
    found += [(f"in {i + 1} ({100 * float(share[i]):.0f} %)", "reads", u[:, i]) for i in range(min(SHOWN, len(s)))]
    out = components(model, part)
    share = out.s.square() / out.s.square().sum()
    found += [
        (f"out {i + 1} ({100 * float(share[i]):.0f} %)", "writes", out.v[i].float())
        for i in range(min(SHOWN, len(out)))
    ]
    return found
