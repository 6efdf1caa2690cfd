"""A planted channel: two heads of a random model composed through directions of chosen rank and strength.

Composition score of a component: |v_i^T W_out|_F / |W_out|_F (Elhage et al. 2021; by component: Merullo et al. 2024).
The model has the channel in its weights; it does not use it for anything.
"""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch

from patchbay.tiny.planted_canvas import Canvas, Form, HeadWeight, Sizes
from patchbay.tiny.planted_truth import Planted, record

Composition = Literal["query", "key", "value"]
INPUT_MAPS: dict[Composition, HeadWeight] = {"query": "q", "key": "k", "value": "v"}


def channel(
    *,
    form: Form = "gpt2",
    seed: int = 0,
    composition: Composition = "query",
    rank: int = 1,
    strength: float = 0.5,
    component: int = 0,
    **sizes: Unpack[Sizes],
) -> Planted:
    """A channel between a layer-0 head's OV and a layer-1 head; all else is random.

    With W_OV = sum_i s_i u_i v_i^T the writer's singular components (s_i falls from 1 to 0.05) and W_out the reader's
    W_QK ("query"), W_QK^T ("key") or W_OV ("value"), each of the components component ... component + rank - 1 has
    the composition score |v_i^T W_out|_F / |W_out|_F = strength exactly (chance: about 1 / sqrt(d_model)). Rotary
    positions between W_Q and W_K do not change it: the reader's other matrix has orthonormal columns. In
    grouped-query form k and v are shared, so that for "key" and "value" every head of the reader's group (`readers`)
    has the channel.
    """
    canvas = Canvas(form, seed, **sizes)
    if composition not in INPUT_MAPS:
        raise ValueError(f"composition {composition!r} was asked; possible are 'query', 'key' and 'value'")
    if not 1 <= rank <= canvas.d_head - component or component < 0:
        raise ValueError(
            f"components {component} to {component + rank - 1} were asked; the writer has 0 to {canvas.d_head - 1}"
        )
    if not 0.0 <= strength**2 * rank < 1.0:
        raise ValueError(f"rank {rank} of strength {strength} was asked; rank * strength^2 must be below 1")
    canvas.fill_at_random()
    writer, reader = canvas.pick_head(0), canvas.pick_head(1)
    singular = torch.logspace(0.0, math.log10(0.05), canvas.d_head)  # [d_head]
    inputs, outputs = canvas.orthonormal(canvas.d_head), canvas.orthonormal(canvas.d_head)  # [d_head, d_model]
    canvas.head_weight(0, writer, "v").copy_(inputs.T * singular.sqrt())
    canvas.head_weight(0, writer, "o").copy_(singular.sqrt()[:, None] * outputs)
    planted = list(range(component, component + rank))
    directions = outputs[planted]  # [rank, d_model]
    weight = canvas.head_weight(1, reader, INPUT_MAPS[composition])  # [d_model, d_head], orthonormal columns
    weight -= directions.T @ (directions @ weight)
    share = strength / math.sqrt(1.0 - rank * strength**2)
    inward = torch.nn.functional.normalize(canvas.normal(rank, canvas.d_head), dim=1)  # [rank, d_head]
    weight += directions.T @ (share * weight.norm() * inward)
    size = canvas.n_heads // canvas.n_kv_heads
    group = range(reader // size * size, reader // size * size + size)
    return record(
        canvas,
        "channel",
        writer=f"L0.H{writer}",
        reader=f"L1.H{reader}",
        readers=[f"L1.H{reader}"] if composition == "query" else [f"L1.H{head}" for head in group],
        composition=composition,
        rank=rank,
        strength=strength,
        components=planted,
        directions=directions.clone(),
        singular_values=singular,
    )
