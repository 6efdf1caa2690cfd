"""Random knobs to compare a knob with: as strong, and aimed at nothing.

A direction (what is added, set, or projected on) becomes a random one of the same norm at the same port; a projector keeps its
rank and eigenvalues. A factor, a zero, a cut or a single number goes to a random other part of its kind, of the same layer
where there is one that the knob leaves alone, else of another layer; numbers for all neurons or experts are shuffled among them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.model.asked import n_parts
from patchbay.model.model import Model
from patchbay.signal.port import Port

FEATURES = ("d_model", "d_head", "vocab")


def random_knobs(model: Model, knob: Knob, draws: int, seed: int) -> tuple[list[Knob], str]:
    """`draws` random knobs, and in words what they are or why there are none."""
    made: list[Knob] = []
    used: set[Port] = set()  # by earlier draws: drawn again only when nothing else is left
    for draw in range(draws):
        chance, generator = (
            random.Random(f"random-knob-{seed}-{draw}"),
            torch.Generator().manual_seed(1000 * seed + draw),
        )
        moved: dict[Port, Port] = {}
        edits: list[Edit] = []
        for edit in knob.edits:
            other = _like(model, edit, [e.port for e in knob.edits], moved, used, chance, generator)
            if other is None:
                return [], f"there is no other part like {edit.port.part} to compare with: no random knobs were tried"
            edits.append(other)
        used |= set(moved.values())
        made.append(replace(knob, name=f"random {draw}", edits=edits, evidence={}))
    aimed = {_is_direction(edit) for edit in knob.edits}
    what = {True: "random directions of the same norm", False: "random parts of the same kind"}
    return made, f"{draws} random knobs: {' and '.join(what[kind] for kind in sorted(aimed, reverse=True))}"


def _is_direction(edit: Edit) -> bool:
    value = edit.value
    return (
        isinstance(value, Tensor)
        and value.ndim > 0
        and value.shape[-1] > 1
        and edit.op != "scale"
        and edit.port.axes[-1] in FEATURES
    )


def _like(
    model: Model,
    edit: Edit,
    avoided: Sequence[Port],
    moved: dict[Port, Port],
    used: set[Port],
    chance: random.Random,
    generator: torch.Generator,
) -> Edit | None:
    value = edit.value
    if isinstance(value, Tensor) and _is_direction(edit):
        return replace(edit, value=_turned(value, generator) if edit.op == "project" else _random(value, generator))
    if isinstance(value, Tensor) and value.ndim and value.shape[-1] > 1:
        order = torch.randperm(value.shape[-1], generator=generator)
        return replace(edit, value=value[..., order.to(value.device)])
    if edit.port not in moved:
        taken = {*avoided, *moved.values()}
        near = [port for port in _alike(model, edit.port, edit.port.layer) if port not in taken]
        far = [port for i in range(model.n_layers) for port in _alike(model, edit.port, i) if port not in taken]
        if edit.where is not None:  # its probe reads before the other part too
            near, far = ([port for port in some if edit.where.precedes(port)] for some in (near, far))
        pools = [[port for port in near if port not in used], [port for port in far if port not in used], near, far]
        pool = next((pool for pool in pools if pool), None)
        if pool is None:
            return None
        moved[edit.port] = chance.choice(pool)
    return replace(edit, port=moved[edit.port])


def _alike(model: Model, port: Port, layer: int | None) -> list[Port]:
    """Ports of the same signal in a layer, with an index where this one has one."""
    if layer is None or port.layer is None or port.signal not in model.signals(layer):
        return []
    if port.index is None:
        return [Port(port.signal, layer)]
    return [Port(port.signal, layer, i) for i in range(n_parts(model, port.part.kind, layer))]


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in random directions, each of the norm that it had on the last axis."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return noise * (value.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def _turned(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """The matrix in a random orthonormal basis."""
    q = torch.linalg.qr(torch.randn(matrix.shape, generator=generator, dtype=torch.float64)).Q
    return (q @ matrix.double().cpu() @ q.T).to(matrix)
