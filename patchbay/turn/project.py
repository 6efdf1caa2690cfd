"""Project: a knob that takes a subspace out of a signal, or leaves nothing else of it.

    remove   h <- h - P h,    keep   h <- P h,    P the orthogonal projector on the span of the directions

At strength s: (1 - s) h + s x that; 0 leaves the model untouched bit for bit, 1 is the projection, which done twice is done
once; -1 doubles what would go. To keep the model from writing a direction at all, name every port that writes: removed
from the stream at one layer, later layers may write it again. Making the knob runs nothing.

Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", whose directional ablation removes one
direction from the stream of every layer and position. It shows what depends on the subspace, not that the subspace holds
one concept: compare with random directions of as many dimensions (`measure.dose_response`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.signal.port import PatchbayError, Port
from patchbay.turn._directions import basis_of
from patchbay.turn._places import Place, places


@method(paper="arditi2024", tensors=("directions",))
def project(
    ports: list[Port] | Port,
    directions: Tensor | Knob,
    *,
    keep: bool = False,
    strength: float = 1.0,
    positions: Place = None,
    model: Model | None = None,
    name: str | None = None,
) -> Knob:
    """A knob that removes the span of `directions` [direction, feature] from the signal at `ports`, or keeps only that.

    `ports`: as "L3.resid_out,L4.resid_out" or "L2.H1.z". `directions`: a tensor, or a knob whose vectors are meant (a
    steering knob: what it adds). `positions`: as in "last", [1, 2], "2:5"; all without.

    `keep`: keep only the span, in place of removing it. `strength`: how far: 0 leaves the signal, 1 removes the whole
    span.
    """
    listed = list(dict.fromkeys([ports] if isinstance(ports, Port) else ports))
    if not listed:
        raise PatchbayError("no ports to project at were given")
    for port in listed:
        if model is not None:
            model.require(port)
    basis = basis_of(directions)
    at = places(positions)
    edits = [edit.project(port, basis.to(torch.float32), keep=keep, positions=at) for port in listed]
    shown = "+".join(map(str, listed[:4])) + (f"+{len(listed) - 4} more" if len(listed) > 4 else "")
    what = f"{len(basis)} direction{'s' * (len(basis) != 1)}"
    return Knob(name or f"{'keep' if keep else 'remove'} {what} at {shown}", edits, strength)
