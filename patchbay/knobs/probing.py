"""Probes made of what is at hand: a steering knob's direction, or any other, with the threshold at which it fires at a stated rate.

    threshold = the quantile 1 - rate of direction . signal over all positions of texts (with `below`: the quantile rate)

so that on text such as these the probe fires at a share `rate` of the positions, also where the direction means nothing: what it
does beyond that share, on text that it is to find, is what it found. Cost: one run of the texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.edits.probe import Probe
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port


def probe(
    model: Model,
    of: Knob | Tensor,
    texts: Any,
    *,
    port: Port | str | None = None,
    rate: float = 0.01,
    below: bool = False,
    batch_size: int = 32,
) -> Probe:
    """A probe that fires at a share `rate` of the positions of `texts`, for `knob.when(probe)`.

    `of`: a knob that adds one direction, such as `turn.steer` makes, read where it adds; or a direction [feature], with `port`.
    `texts`: text on which it should rarely fire. `below`: fire below the threshold. Raises PatchbayError where the texts have too
    few positions for the rate.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        raise PatchbayError(
            f"rate={rate!r}: the share of positions at which the probe fires on these texts, between 0 and 1"
        )
    plain = _plain(model, of, port)
    encoded = model.encode(texts)
    seen = []
    for start in range(0, len(encoded), batch_size):
        trace = run(model, encoded[start : start + batch_size], taps=[plain.port], logits="last")
        seen.append(plain.reading(trace[plain.port]).flatten().double().cpu())
    readings = torch.cat(seen)
    readings = readings[~readings.isnan()].sort().values
    n = int(rate * len(readings) + 1e-9)  # positions that may fire
    if n < 1:
        raise PatchbayError(
            f"rate={rate:g}: these texts have {len(readings)} positions, {1 / rate:.0f} or more are needed for one to fire"
        )
    ends = (readings[n - 1], readings[n]) if below else (readings[-n - 1], readings[-n])
    return Probe(plain.port, plain.direction, float(sum(ends)) / 2, below)


def _plain(model: Model, of: Knob | Tensor, port: Port | str | None) -> Probe:
    """The direction and where it is read, with a threshold of 0."""
    if not isinstance(of, Knob):
        if port is None:
            raise PatchbayError("a direction says nothing of where it is read: give port=, such as 'L2.resid_out'")
        found = model.port(port) if isinstance(port, str) else port
        model.require(found)
        return Probe(found, None if len(found.axes) == 2 else of)
    of.check(model)
    adds = [edit for edit in of.edits if edit.op == "add" and isinstance(edit.value, Tensor) and not edit.spread]
    if len(of.edits) != 1 or not adds:
        raise PatchbayError(
            f"knob {of.name!r} is no single direction that is added ({', '.join(map(str, of.edits[:3]))}): give a direction and port="
        )
    where = adds[0].port if port is None else model.port(port) if isinstance(port, str) else port
    return Probe(where, adds[0].value)  # type: ignore[arg-type]
