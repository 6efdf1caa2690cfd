"""Which parts of a channel a model has, and who writes before whom reads."""

from __future__ import annotations

from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.signal.channel import Channel
from patchbay.signal.port import Part


def check_part(model: Model, part: Part, channel: Channel) -> None:
    """Raise PatchbayError unless the model has the part."""
    try:
        model.part(str(part))
        if part.kind in ("mlp", "router", "attn") and part.layer is not None:
            signal = {"mlp": "mlp.in", "router": "router.weights", "attn": "attn.out"}[part.kind]
            if signal not in model.signals(part.layer):
                raise PatchbayError(f"{part}: layer {part.layer} has no {part.kind}")
    except PatchbayError as error:
        raise PatchbayError(f"{channel} is no channel of this model: {error}") from error


def write_time(part: Part) -> int:
    """When a part writes, counted in half layers: attention of layer l at 2 l, its MLP at 2 l + 1, the embedding before."""
    if part.layer is None:
        return -1
    return 2 * part.layer + (0 if part.kind in ("head", "attn", "group") else 1)


def read_time(model: Model, part: Part, kind: str) -> int:
    """When a part reads: it sees every write before that time. In a parallel block the MLP reads what attention reads."""
    if part.layer is None:
        return 2 * model.n_layers
    behind = kind in ("mlp", "router") and model.modules[part.layer].mid is not None
    return 2 * part.layer + int(behind)
