"""Channel changes: which channels of a model are stronger or weaker in another model of the same shape, from weights alone.

For every writer and later reader both models' composition scores (see `find.channels`) and their difference, second minus first,
in units of what chance gives: under the rotation null of each model a score has a standard deviation known in closed form, so

    z = (CS_second - CS_first) / sqrt(sd_first^2 + sd_second^2),    p two-sided from the normal, Benjamini-Hochberg over all pairs.

A pair passes when the two scores are further apart than those of two wirings turned at random. That is a high bar for a
fine-tuned copy, whose scores start out equal, and it says "changed", not "changed by training on this". Heads and MLPs must
correspond by number, which holds for a fine-tuned model and not for two trained apart. Components do not correspond and are not
compared.

Composition scores: Elhage et al. 2021; rotation null and channels after Merullo, Eickhoff and Pavlick 2024. It does not show that
behaviour changed; follow with `prove.cross_model_patching`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay.find import _haar
from patchbay.find._composition import Net, gather, reader_text, score
from patchbay.maths import benjamini_hochberg
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.channel import Channel
from patchbay.signal.port import PatchbayError
from patchbay.wiring.components import weighed

LISTED = 200
ERROR_RATE = 0.05


@method(paper="merullo2024", unit="composition")
def channel_changes(
    model: Model,
    other: Model,
    *,
    writers: Sequence[str] | None = None,
    readers: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    offsets: Sequence[int] | None = None,
) -> Result:
    """Composition scores of `other` minus those of `model`, for whole writers and every later reader.

    Options as in `find.channels`. The list holds the pairs that pass at an adjusted p of 0.05, largest gain first, then (without
    any) the largest changes; `change`, `change_z`, `change_p` [writer, reader] hold all.

    `other`: the model that is compared with `model`, of the same shape. `writers`: kinds or parts that write, as in
    `find.channels`. `readers`: parts or layers that read, as in `find.channels`. `kinds`: what is read: query, key,
    value, mlp, router, unembed. `offsets`: distances of a rotary model's query and key.
    """
    options = {"writing": writers, "reading": readers, "kinds": kinds, "offsets": offsets}
    nets = [gather(one, **options) for one in (model, other)]  # type: ignore[arg-type]
    _same_shape(*nets)
    sides = [_side(net) for net in nets]
    (first, sd_first), (second, sd_second) = sides
    change = second - first
    z = change / (sd_first.square() + sd_second.square()).sqrt()
    raw = torch.special.erfc(z.abs() / math.sqrt(2.0))
    p = benjamini_hochberg(raw)
    places = _strongest(change, p)
    net = nets[0]
    rows, columns = places.unbind(1)
    part_axis = ("part",)
    values = {
        "change": (change[rows, columns], part_axis, "composition"),
        "first": (first[rows, columns], part_axis, "composition"),
        "second": (second[rows, columns], part_axis, "composition"),
        "z": (z[rows, columns], part_axis, "standard deviations"),
        "p_adjusted": (p[rows, columns], part_axis, "adjusted p"),
        "whole": (change, ("writer", "reader"), "composition"),
        "whole_z": (z, ("writer", "reader"), "standard deviations"),
        "whole_p": (p, ("writer", "reader"), "adjusted p"),
    }
    sources, targets = net.sources, net.targets
    parts = [
        Channel(sources[i].writer, sources[i].component, *targets[j])
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    passing, tested = int((p <= ERROR_RATE).sum()), int((~p.isnan()).sum())
    note = f"{passing} of {tested} channels changed at an adjusted p of {ERROR_RATE}"
    note += "" if passing else "; the list shows the largest changes, which chance may give"
    coords = {"writer": [str(name) for name in sources], "reader": [reader_text(*target) for target in targets]}
    notes = [note, *weighed(net.model, {group.kind for group in net.readers})]
    return Result(values, coords=coords, parts=parts, notes=notes)


def _side(net: Net) -> tuple[Tensor, Tensor]:
    """Scores and the null's standard deviations, [writer, reader]."""
    found = score(net)
    mean, variance, _ = _haar.moments(found.written, found.read, net.model.d_model)
    return found.squares.sqrt().cpu(), _haar.of_score(mean, variance)[1].cpu()


def _same_shape(first: Net, second: Net) -> None:
    names = [
        [str(name) for name in net.sources] + [reader_text(*target) for target in net.targets]
        for net in (first, second)
    ]
    widths = [net.model.d_model for net in (first, second)]
    if names[0] == names[1] and widths[0] == widths[1] and first.offsets == second.offsets:
        return
    lone = ", ".join(sorted(set(names[0]) ^ set(names[1]))[:5]) or "rotary positions"
    detail = f"only one has {lone}" if widths[0] == widths[1] else f"d_model is {widths[0]} and {widths[1]}"
    raise PatchbayError(f"channels of two models are compared part by part, and these differ in shape: {detail}")


def _strongest(change: Tensor, p: Tensor) -> Tensor:
    """Places [channel, 2] of the largest changes that pass, or of the largest 20."""
    passing = p <= ERROR_RATE
    size = change.abs().nan_to_num(-1.0)
    n = int(passing.sum())
    size = size.masked_fill(~passing, -1.0) if n else size
    top = size.flatten().topk(min(LISTED if n else 20, n or int((size >= 0).sum()))).indices
    return torch.stack([top // change.shape[1], top % change.shape[1]], 1)
