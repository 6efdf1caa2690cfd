"""Where the edits of a sweep join the walk: at which layer and stage, from which position on, and what they are for one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from patchbay.edits.apply import row_mask
from patchbay.edits.edit import Edit
from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.signal.port import Port, by_home
from patchbay.signal.positions import Batch, Positions, chosen

IN, MID, OUT = 0, 1, 2  # where in its layer a row joins: before it, after attention, after the MLP
STAGE = {"embed": IN, "resid_in": IN, "attn.z": MID, "attn.head_out": MID, "attn.out": MID, "resid_mid": MID}
STAGE |= {"mlp.act": OUT, "mlp.out": OUT, "resid_out": OUT}
LATE = ("final_norm", "logits")  # edited after the last layer


class Touched:
    """Which positions edits touch in a batch: found once for each way of saying it, which many edits share."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.held = batch, dict[Any, Tensor]()

    def ordinals(self, edit: Edit) -> Tensor:
        """As `positions.chosen`: [prompt, position], -1 where untouched."""
        key: Positions = edit.positions
        if key is not None and not isinstance(key, int | str | tuple):
            return chosen(key, self.batch, what=str(edit))
        if (type(key), key) not in self.held:
            self.held[type(key), key] = chosen(key, self.batch, what=str(edit))
        return self.held[type(key), key]

    def span(self, edit: Edit) -> tuple[int, int]:
        """The first position that any prompt is touched at, and the one after the last."""
        touched = self.ordinals(edit) >= 0
        if edit.rows is not None:
            touched = touched & (row_mask(edit, len(touched)) >= 0)[:, None]
        places = touched.any(0).nonzero()[:, 0].tolist()
        if not places:
            raise PatchbayError(f"{edit} touches nothing: no prompt has such a position")
        return places[0], places[-1] + 1


@dataclass(frozen=True)
class Cell:
    """One entry of a sweep: edits made together, for the prompts in `rows`; they touch positions `start` to `stop`."""

    index: int
    edits: tuple[Edit, ...]
    start: int
    stop: int
    layer: int
    stage: int
    inside: bool  # needs its layer run under a Session
    signal: str  # that its first edit changes: of a feature, what its dictionary writes

    @property
    def key(self) -> tuple[int, int, int, int, bool]:
        return (self.start, self.stop, self.layer, self.stage, self.inside)


def plan(model: Model, index: int, edits: Sequence[Edit], touched: Touched, halves: bool, narrow: bool) -> Cell:
    """Where a cell starts and joins. Several edits, or one inside a module, run their layers under a Session."""
    n = touched.batch.ids.shape[1]
    start, stop, layer, inside = n - 1, 0, model.n_layers, len(edits) > 1
    for edit in edits:
        begin, end = touched.span(edit)
        start, stop = min(start, begin), max(stop, end)
        layer = min(layer, layer_of(edit.port, model.n_layers))
    signal = changed_by(model, edits[0].port)
    stage = OUT if signal in LATE else STAGE.get(signal, IN)
    inside = inside or (signal not in STAGE and signal not in LATE)
    if not halves and stage != IN and signal not in ("resid_out", *LATE):
        inside = True
    stop = n if inside or not narrow else stop
    return Cell(index, tuple(edits), start, stop, layer, IN if inside else stage, inside, signal)


def changed_by(model: Model, port: Port) -> str:
    """The signal that an edit of a port changes. Features whose rows cannot join by what their dictionary writes stay their own signal."""
    found = by_home(port)
    if found is None:
        return port.signal
    dictionary: Any = model.dictionaries[port.layer or 0, found[0]]
    plain = found[1] == "act" and getattr(dictionary, "normalise", "none") == "none" and dictionary.writes != "attn.z"
    return str(dictionary.writes) if plain else port.signal


def spanning(model: Model, edits: Sequence[Edit]) -> Edit | None:
    """The first edit of features of several layers, whose rows no walk from one layer on can hold."""
    for edit in edits:
        found = by_home(edit.port)
        if found is not None and getattr(model.dictionaries[edit.port.layer or 0, found[0]], "spans", False):
            return edit
    return None


def layer_of(port: Port, n_layers: int) -> int:
    if port.layer is not None:
        return port.layer
    return 0 if port.signal == "embed" else n_layers - 1


def for_one(edit: Edit, row: int, prompt: int, n_prompts: int) -> Edit:
    """The edit as it acts on one row that is a copy of `prompt`; where it leaves that prompt alone, one that changes nothing."""
    value, positions, keys = edit.value, edit.positions, edit.keys
    rows = row_mask(edit, n_prompts)
    if int(rows[prompt]) < 0:
        return Edit("scale", edit.port, 1.0, None, (row,))
    n_features = len(edit.port.axes) - 2
    if isinstance(value, Tensor) and edit.op != "project" and value.ndim == n_features + 2 and len(value) > 1:
        value = value[int(rows[prompt])][None]
    if isinstance(positions, Tensor):
        positions = tuple(positions[prompt if len(positions) > 1 else 0].nonzero()[:, 0].tolist())
    if isinstance(keys, Tensor):
        keys = tuple(keys[prompt if len(keys) > 1 else 0].nonzero()[:, 0].tolist())
    return replace(edit, value=value, positions=positions, rows=(row,), keys=keys)
