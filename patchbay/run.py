"""Run a model on prompts, tapping and editing any signals. Exact: an untapped run is the model's own forward, bit for bit.

Prompts of different lengths run as one batch, padded on the right: in a causal model nothing at a prompt's own positions
depends on what stands to the right of it. Padding is NaN in what taps return, so that it cannot be averaged by mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchbay.edit import Batch, Edit, chosen, row_mask
from patchbay.model import Model, flat_edits
from patchbay.port import SIGNALS, PatchbayError, Port


@dataclass
class Trace:
    """What a run saw. `trace[port]` is a torch tensor with the port's axes; `trace.logits` [prompt, position, vocab]."""

    ids: Tensor  # [prompt, position], padding is 0
    lengths: Tensor  # [prompt]
    logits: Tensor  # [prompt, position, vocab]; of the last position alone with logits="last"
    touched: list[list[tuple[int, ...]]]  # for each edit, for each prompt, the positions it touched
    edits: list[Edit] = field(default_factory=list)
    _captured: dict[Port, Tensor] = field(default_factory=dict, repr=False)

    @property
    def ports(self) -> list[Port]:
        return list(self._captured)

    def _whole(self, port: Port) -> Port:
        """The captured signal that holds this port: itself, or all heads, neurons or experts together."""
        whole = Port(port.signal, port.layer, None, port.query)
        found = next((p for p in (port, whole) if p in self._captured), None)
        if found is None:
            raise PatchbayError(f"{port} was not tapped; tapped were {', '.join(map(str, self._captured)) or 'none'}")
        return found

    def __getitem__(self, port: Port) -> Tensor:
        held = self._whole(port)
        value = self._captured[held]
        if held != port:
            value = value.select(list(SIGNALS[port.signal][0]).index(str(port.index_axis)), port.index or 0)
        return value

    def last(self, port: Port) -> Tensor:
        """The signal at each prompt's last position: the port's axes without the position."""
        axis = port.axes.index(SIGNALS[port.signal][0][Port(port.signal, port.layer).position_axis])
        value = self[port].movedim(axis, 1)  # [prompt, position, ...]
        return value[torch.arange(len(value)), (self.lengths - 1).to(value.device)]

    @property
    def last_logits(self) -> Tensor:
        """Logits at each prompt's last position, [prompt, vocab]."""
        if self.logits.shape[1] == 1:
            return self.logits[:, 0]
        return self.logits[torch.arange(len(self.logits)), (self.lengths - 1).to(self.logits.device)]

    def gradient(self, scalar: Tensor, *ports: Port) -> list[Tensor]:
        """d scalar / d port for tapped ports; the run must have been made with grad=True."""
        held = [self._captured[self._whole(port)] for port in ports]
        if not scalar.requires_grad:
            raise PatchbayError("this number carries no gradient: run with grad=True and compute it from the trace")
        gradients = torch.autograd.grad(scalar, held, retain_graph=True, allow_unused=True)
        out = []
        for port, value, gradient in zip(ports, held, gradients, strict=True):
            gradient = torch.zeros_like(value) if gradient is None else gradient
            index = list(SIGNALS[port.signal][0]).index(str(port.index_axis)) if port.index is not None else None
            out.append(gradient if index is None else gradient.select(index, port.index or 0))
        return out


def run(
    model: Model,
    prompts: Any,
    *,
    taps: Sequence[Port] = (),
    edits: Sequence[Any] = (),
    grad: bool = False,
    logits: str = "all",
    batch_size: int | None = None,
) -> Trace:
    """Run `prompts` (text, texts, token ids, a tensor or a Task) once, with `edits` made and `taps` read.

    `grad=True` keeps the graph, for `trace.gradient`. `logits="last"` unembeds only each batch's last position, where the model
    can. `batch_size` splits the prompts; edits that name rows or masks need them whole. Raises PatchbayError for a port the
    model lacks, a position outside a prompt, a value that does not fit, or an edit that touches nothing.
    """
    encoded = model.encode(prompts)
    edits = flat_edits(edits)
    if batch_size is not None and batch_size < len(encoded):
        if grad or any(edit.rows is not None or isinstance(edit.positions, Tensor) for edit in edits):
            raise PatchbayError("batch_size cannot be combined with grad, or with edits that name rows or masks")
        pieces = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
        return _join([run(model, piece, taps=taps, edits=edits, logits=logits) for piece in pieces], max(map(len, encoded)))
    if logits not in ("all", "last"):
        raise PatchbayError(f"logits={logits!r}: 'all' or 'last'")
    lengths = torch.tensor([len(ids) for ids in encoded])
    width = int(lengths.max())
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded], device=model.device)
    ragged = bool((lengths < width).any())
    batch = Batch(ids, lengths, lengths, model.token_id)
    touched = [_touched(edit, batch) for edit in edits]
    options: dict[str, Any] = {"use_cache": False}
    if logits == "last" and not ragged and "logits" not in {port.signal for port in taps}:
        options["logits_to_keep"] = 1
    with model.session(taps, edits, lengths=lengths, grad=grad) as session, torch.enable_grad() if grad else torch.no_grad():
        output = model.hf(input_ids=ids, **options)
    captured = {port: _nan_padding(value, port, lengths, grad) if ragged else value for port, value in session.captured.items()}
    return Trace(ids, lengths, output.logits, touched, edits, captured)


def _touched(edit: Edit, batch: Batch) -> list[tuple[int, ...]]:
    """Positions of each prompt that the edit touches; an edit that touches none is a mistake and said so."""
    places = (chosen(edit.positions, batch, what=str(edit)) >= 0) & (row_mask(edit, len(batch.ids)) >= 0)[:, None]
    if edit.op == "block":
        keys = chosen(edit.keys, batch, what=str(edit)) >= 0
        can_see = keys.long().cumsum(1) > 0  # a query sees the keys at and before it
        places = places & can_see
    if not bool(places.any()):
        raise PatchbayError(
            f"{edit} touches nothing: no prompt has such a position (prompts have {batch.lengths.tolist()[:8]} tokens)"
        )
    return [tuple(row.nonzero()[:, 0].tolist()) for row in places]


def _nan_padding(value: Tensor, port: Port, lengths: Tensor, grad: bool) -> Tensor:
    """The signal with its padding made NaN (-1 where it holds ids)."""
    if port.query is not None:
        return value
    axis = port.axes.index(SIGNALS[port.signal][0][Port(port.signal, port.layer).position_axis])
    n = value.shape[axis]
    padding = torch.arange(n)[None, :] >= lengths[:, None]  # [prompt, position]
    shape = [1] * value.ndim
    shape[0], shape[axis] = len(lengths), n
    fill = float("nan") if value.is_floating_point() else -1
    return value.masked_fill(padding.reshape(shape).to(value.device), fill)


def _join(traces: list[Trace], width: int) -> Trace:
    """Traces of batches as one, padded to the longest prompt of all."""

    def together(values: list[Tensor], axes: tuple[int, ...]) -> Tensor:
        out = []
        for value in values:
            for axis in axes:
                short = width - value.shape[axis]
                if short > 0 and value.shape[axis] > 1:
                    shape = list(value.shape)
                    shape[axis] = short
                    value = torch.cat([value, value.new_full(shape, float("nan") if value.is_floating_point() else 0)], axis)
            out.append(value)
        return torch.cat(out)

    first = traces[0]
    captured = {}
    for port in first.ports:
        axes = [i for i, axis in enumerate(port.axes) if axis in ("position", "query", "key")]
        axes = [i for i in axes if not (port.query is not None and port.axes[i] == "query")]
        captured[port] = together([trace._captured[port] for trace in traces], tuple(axes))
    touched = [[row for trace in traces for row in trace.touched[i]] for i in range(len(first.touched))]
    return Trace(
        together([trace.ids for trace in traces], (1,)),
        torch.cat([trace.lengths for trace in traces]),
        together([trace.logits for trace in traces], (1,)),
        touched,
        first.edits,
        captured,
    )
