"""Remove direction: a knob that lets no part of the model write a direction (abliteration).

    y <- y - P y   for the token embedding and what every attention, mixer, MLP and expert block adds,   P = d d^T / |d|^2

A stream that nothing writes a direction into never holds it, so this is the same as taking it out of the stream everywhere; as
edits of what is written it folds into the weights of every writer: `knob.export(model, folder)` is then the weight
orthogonalisation of the paper. At strength s that share of it is taken out; 0 leaves the model untouched. Making it runs nothing.

Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 4.1. It shows what depends on the
direction, not that the direction holds one concept: compare with random directions (`measure.dose_response`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.signal.port import PatchbayError
from patchbay.turn._directions import basis_of, unwritten


@method(paper="arditi2024", tensors=("direction",))
def remove_direction(
    model: Model,
    direction: Tensor | Knob,
    *,
    layers: list[int] | None = None,
    strength: float = 1.0,
    name: str | None = None,
) -> Knob:
    """A knob that removes `direction` [d_model] (or several, [direction, d_model]) from all that writes to the stream.

    `direction`: a tensor, or a knob whose vectors are meant (a steering knob: what it adds). `layers`: the layers whose blocks no
    longer write it; without, those of all layers and the embedding. `strength`: the share that is taken out.
    """
    chosen = range(model.n_layers) if layers is None else list(dict.fromkeys(layers))
    beyond = [i for i in chosen if not 0 <= i < model.n_layers]
    if beyond or not chosen:
        raise PatchbayError(f"layers {list(chosen)}: the model has layers 0..{model.n_layers - 1}")
    where = "everywhere" if layers is None else f"in layers {', '.join(map(str, chosen))}"
    basis = basis_of(direction).to(torch.float32)
    if basis.shape[-1] != model.d_model:
        raise PatchbayError(f"a direction of {basis.shape[-1]} numbers: the stream of this model has {model.d_model}")
    return Knob(
        name or f"remove a direction {where}",
        unwritten(model, basis, None if layers is None else list(chosen)),
        strength,
    )
