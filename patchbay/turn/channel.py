"""Channel: a knob on one component of what a head writes, and on nothing else of it.

With W_OV = W_V W_O = sum_i s_i u_i v_i^T, a head writes z W_O = sum_i c_i v_i, and c_i = (z W_O) . v_i is component i's
coordinate. As an edit of z at every position (or where `positions` says):

    strength t      c_i <- t c_i        z <- z - (1 - t) (z . read_i) write_i      1: as it is, bit for bit; 0: without it
    coordinate c    c_i <- c            z <- z + (c - z . read_i) write_i          the knob's own strength goes from 0 to 1

with read_i = W_O v_i and write_i the shortest z with write_i W_O = v_i. All other components stay. Other readers hear the
turned component too: a channel's reader only names whom it is turned for. `edited_weight` is the same as weights, W_OV -
(1 - t) s_i u_i v_i^T: as W_O of the query head, (1 - (1 - t) read_i write_i^T) W_O, which is exact also with biases and where
several query heads share keys and values; or as W_V and its bias, where they are the head's own. In latent attention W_V is a
product with a norm in it: there the head's value columns of the map out of the latent are edited. Making the knob runs nothing.

Merullo, Eickhoff and Pavlick 2024, "Talking Heads", who edit single components of inhibition heads and so change which item
of a list is named. It shows what depends on the component, not that it means one thing: compare with other components
(`prove.channel`) and look at other text (`measure.dose_response`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.placing import follow
from patchbay.model.weights import matrix
from patchbay.results.method import method
from patchbay.signal.channel import Channel
from patchbay.signal.port import PatchbayError
from patchbay.turn._places import Place, places
from patchbay.wiring.components import check_channel, components

Matrix = Literal["W_O", "W_V"]


@method(paper="merullo2024")
def channel(
    model: Model,
    channel: Channel,
    *,
    strength: float | None = None,
    coordinate: float | None = None,
    positions: Place = None,
    name: str | None = None,
) -> Knob:
    """A knob that multiplies a component by `strength`, or sets its coordinate to `coordinate`: give one of the two.

    `channel`: as "L0.H1.C3" or "L0.H1.C3>L2.H0.q"; without a component the whole head (strength only). A strength knob is
    turned by `knob.at(t)`, 1 as it is; a coordinate knob from 0, as it is, to 1, wholly set. `positions`: as in "last".

    `strength`: what the component is multiplied by; 1 is as it is, 0 without it. `coordinate`: the value that the
    component's coordinate is set to.
    """
    _check(model, channel)
    if (strength is None) == (coordinate is None):
        found = "neither" if strength is None else "both"
        raise PatchbayError(
            f"{channel}: give strength (how much of it is kept) or coordinate (what it is set to), got {found}"
        )
    port, at = channel.writer.port("z"), places(positions)
    if channel.component is None:
        if strength is None:
            raise PatchbayError(
                f"{channel} is a whole head and has no one coordinate: name a component, {channel.writer}.C0"
            )
        return Knob(name or f"channel {channel}", [edit.scale(port, 1.0, positions=at)], strength)
    read, write = _maps(model, channel)
    gone = torch.eye(len(read)) - torch.outer(write, read)  # z @ gone.T = z - (z . read) write
    without = Edit("project", port, gone, at)
    if strength is not None:
        return Knob(name or f"channel {channel}", [without], strength, kept=True)
    assert coordinate is not None
    if not isinstance(coordinate, int | float) or not abs(coordinate) < float("inf"):
        raise PatchbayError(f"{channel}: coordinate {coordinate!r} is not a finite number")
    put = edit.add(port, coordinate * write, positions=at)
    return Knob(name or f"channel {channel} = {coordinate:g}", [without, put], 1.0)


@torch.no_grad()
def edited_weight(
    model: Model, channel: Channel, strength: float, *, matrix: Matrix = "W_O"
) -> tuple[Tensor, Tensor | None]:
    """A copy of one head's weight in which the component has `strength`, and the bias that goes with it.

    `matrix`: "W_O" [d_head, d_model], which needs no other bias (None); or "W_V" [d_model, d_head] and b_V, refused where
    other query heads share them; of latent attention W_V is [d_latent, d_head], the head's value columns of the map out of the
    latent (`kv_b_proj` stores [out, in]), which is no other head's.
    """
    _check(model, channel)
    if channel.component is None:
        raise PatchbayError(f"{channel} names no component: write one, {channel.writer}.C0")
    one_of("matrix", matrix, ("W_O", "W_V"))
    layer, index = channel.writer.layer or 0, channel.writer.index or 0
    read, write = _maps(model, channel)
    change = torch.eye(len(read)) - (1.0 - strength) * torch.outer(read, write)  # of z as a row
    if matrix == "W_O":
        found = model.W_O(layer)[index]
        return (change.to(found) @ found).detach().clone(), None
    if model.family.qkv == "latent":
        found = _value_columns(model, layer)[:, index]
        return (found @ change.to(found)).detach().clone(), None
    weights = model.layers[layer].attn.weights()
    if len(weights.W_V) < len(weights.W_Q):
        raise PatchbayError(
            f"{channel}: W_V belongs to {len(weights.W_Q) // len(weights.W_V)} query heads, and all of them would change; W_O is its own"
        )
    if model.family.qkv == "gated":
        raise PatchbayError(f"{channel}: a gate stands between W_V and z in this {model.family.name} model; change W_O")
    found, bias = weights.W_V[index], None if weights.b_V is None else weights.b_V[index]
    return (found @ change.to(found)).detach().clone(), None if bias is None else (bias @ change.to(bias)).detach()


def _value_columns(model: Model, layer: int) -> Tensor:
    """The values' part of the map out of the latent, [d_latent, head, d_head]."""
    at, n_heads = model.modules[layer], model.n_heads(layer)
    up = follow(at.attn, model.family.qkv_modules[-1])
    assert up is not None
    return matrix(up).unflatten(1, (n_heads, -1))[:, :, -model.W_O(layer).shape[1] :]


def _check(model: Model, channel: Channel) -> None:
    if channel.writer.kind != "head":
        raise PatchbayError(
            f"{channel}: {channel.writer} is no head; components of heads are turned here, and neurons, MLPs and experts "
            "whole by turn.scale"
        )
    check_channel(channel, model)


def _maps(model: Model, channel: Channel) -> tuple[Tensor, Tensor]:
    """read_i and write_i [d_head], so that read_i . write_i = 1."""
    found, i = components(model, channel.writer), int(channel.component or 0)
    read, write = found.read_z[i].detach().float().cpu(), found.write_z[i].detach().float().cpu()
    if not abs(float(read.double() @ write.double()) - 1.0) < 1e-3:
        raise PatchbayError(
            f"{channel}: W_O of this head cannot write component {i} (singular value {float(found.s[i]):.1e}): there is nothing to turn"
        )
    return read, write
