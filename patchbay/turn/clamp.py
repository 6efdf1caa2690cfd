"""Clamp: a knob that holds a neuron, a coordinate or a feature direction at a value.

    neuron          act <- value, where act is what the down projection multiplies
    direction w     h <- h + w (value - w . h), w scaled to norm 1: the rest of h stays, and w . h is `value`
    coordinate i    the same with w = the i-th unit vector

At strength s the signal goes s of the way there (0: untouched bit for bit, 1: clamped). In the last block, clamping a
neuron moves the logits by (value - act) x the unembedding of its write direction / the frozen scale of the final norm;
what it does from earlier blocks, the layers after it decide. Making the knob runs nothing, unless `texts` are given: then
its evidence `change` holds what each part was on them, and by how much the clamp moves it. A value far outside what a
part ever has takes the stream where it never is.

Davies 2025, "Decoding specialised feature neurons in LLMs with the final projection layer", where a neuron's up-projection
is set to a constant while the model writes. In a gated MLP what follows then still depends on the gate; here the product
of both is held, so that the write is the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.signal.positions import Positions
from patchbay.turn._places import Place, places


@method(paper="davies2025", tensors=("direction",))
def clamp(
    model: Model,
    parts: list[Part] | Part,
    value: float,
    *,
    direction: Tensor | None = None,
    coordinate: int | None = None,
    signal: str | None = None,
    positions: Place = None,
    texts: list[str] | list[list[int]] | None = None,
    name: str | None = None,
) -> Knob:
    """A knob that holds `parts` at `value`: neurons as they are, other parts along `direction` or at `coordinate`.

    `parts`: as "L2.N77", or "L3" (the stream that leaves the layer), "L3.H1" (its z), "L3.mlp" (what it adds); another
    signal of theirs by `signal`, such as "resid_in". `positions`: as in "last", [1, 2], "2:5"; all without. `texts`: text on which
    to measure the change.

    `value`: what the neuron, direction or coordinate is held at. `direction`: a direction of the signal [feature], held
    in place of a neuron. `coordinate`: the place of one coordinate of the signal. `signal`: which signal of the parts,
    such as "resid_in"; without, the one named above.
    """
    listed = list(dict.fromkeys([parts] if isinstance(parts, Part) else parts))
    if not listed:
        raise PatchbayError("no parts to clamp were given")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise PatchbayError(f"clamp to {value!r}: a finite number is needed")
    ports = [part.port(signal or ("resid_out" if part.kind == "layer" else None)) for part in listed]
    unit = [_unit(model, port, direction, coordinate) for port in ports]
    at, edits = places(positions), []
    for port, w in zip(ports, unit, strict=True):
        edits += _edits(port, w, float(value), at)
    what = "" if direction is None and coordinate is None else f" {'direction' if coordinate is None else coordinate}"
    shown = "+".join(map(str, listed[:4])) + (f"+{len(listed) - 4} more" if len(listed) > 4 else "")
    knob = Knob(name or f"clamp {shown}{what} at {value:g}", edits, 1.0)
    return knob if texts is None else knob.with_evidence(change=_change(model, listed, ports, unit, value, texts))


def _unit(model: Model, port: Port, direction: Tensor | None, coordinate: int | None) -> Tensor | None:
    """The unit vector to clamp along, [feature]; None where the signal is one number."""
    model.require(port)
    if port.axes[-1] not in ("d_model", "d_head"):
        if port.index is None or direction is not None or coordinate is not None:
            raise PatchbayError(
                f"{port}: a neuron (as L{port.layer}.N5) is one number and takes no direction or coordinate; directions "
                "are of the stream, of a head, of what attention, an MLP or an expert adds"
            )
        return None
    if (direction is None) == (coordinate is None):
        raise PatchbayError(f"{port} has many coordinates: give one of direction= and coordinate=")
    width = _width(model, port)
    if coordinate is not None:
        if not 0 <= coordinate < width:
            raise PatchbayError(f"coordinate {coordinate} of {port}: it has {width} (0..{width - 1})")
        return torch.eye(width)[coordinate]
    assert direction is not None
    w = direction.detach().double().cpu()
    if w.shape != (width,) or not bool(w.isfinite().all()) or not float(w.norm()) > 0:
        raise PatchbayError(f"direction of shape {list(w.shape)}: {port} needs [{width}], finite and not 0")
    return (w / w.norm()).float()


def _width(model: Model, port: Port) -> int:
    """How many features the signal has."""
    if port.axes[-1] == "d_model":
        return model.d_model
    layer = port.layer or 0
    return model.W_O(layer).shape[1] if port.signal in ("attn.z", "attn.v") else model.d_head(layer)


def _edits(port: Port, w: Tensor | None, value: float, at: Positions) -> list[Edit]:
    if w is None:
        return [edit.replace(port, value, positions=at)]
    away = torch.eye(len(w), dtype=torch.float64) - torch.outer(w.double(), w.double())
    return [Edit("project", port, away.float(), at), edit.add(port, value * w, positions=at)]


def _change(
    model: Model, parts: list[Part], ports: list[Port], unit: list[Tensor | None], value: float, texts: object
) -> Result:
    """What each part was on the prompts, position by position, and how far the clamp moves it."""
    trace = run(model, texts, taps=list(dict.fromkeys(ports)))
    rows = []
    for port, w in zip(ports, unit, strict=True):
        seen = trace[port].float().movedim(port.tapped_axis, 1)
        was = seen if w is None else seen @ w.to(seen.device)  # [prompt, position]
        rows.append(was.flatten(2).mean(2).nanmean(1) if was.ndim > 2 else was.nanmean(1))  # [prompt]
    was = torch.stack(rows).double().cpu()  # [part, prompt]
    mean, low, high = maths.intervals((value - was).T)
    unit_name = "of the signal"
    return Result(
        {
            "change": (mean, ("part",), unit_name),
            "low": (low, ("part",), unit_name),
            "high": (high, ("part",), unit_name),
            "was": (was.mean(1), ("part",), unit_name),
        },
        parts=parts,
        provenance={"method": "turn.clamp"},
        notes=[f"clamped at {value:g}; means over the positions of each of {was.shape[1]} prompts"],
    )
