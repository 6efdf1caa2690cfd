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

from patchbay.edits.apply import acts_on, for_prompts
from patchbay.edits.edit import Edit
from patchbay.jacks.sites import query_rows
from patchbay.model.given import flat_edits
from patchbay.model.model import Model
from patchbay.signal.port import SIGNALS, PatchbayError, Port
from patchbay.signal.positions import Batch


@dataclass(repr=False)
class Trace:
    """What a run saw. `trace[port]` is a torch tensor with the port's axes; `trace.logits` [prompt, position, vocab]."""

    ids: Tensor  # [prompt, position], 0 on the right of a prompt
    lengths: Tensor  # [prompt]
    logits: Tensor  # [prompt, position, vocab]; of the last position alone with logits="last"
    touched: list[list[tuple[int, ...]]]  # for each edit, for each prompt, the positions it touched
    edits: list[Edit] = field(default_factory=list)
    _captured: dict[Port, Tensor] = field(default_factory=dict, repr=False)  # with grad, before padding is made NaN

    @property
    def ports(self) -> list[Port]:
        return list(self._captured)

    def __repr__(self) -> str:
        least, most = int(self.lengths.min()), int(self.lengths.max())
        lines = [
            f"Trace of {len(self.ids)} prompt{'s' if len(self.ids) > 1 else ''} of {least if least == most else f'{least} to {most}'} "
            f"tokens: logits {list(self.logits.shape)}"
        ]
        lines += [f"  {port} [{', '.join(port.axes)}] {list(value.shape)}" for port, value in self._captured.items()]
        for edit, rows in zip(self.edits, self.touched, strict=True):
            hit = [row for row in rows if row]
            lines.append(
                f"  {edit} touched {sum(map(len, hit))} positions of {len(hit)} prompt{'s' if len(hit) > 1 else ''}"
            )
        return "\n".join(lines)

    def _held(self, port: Port) -> Port:
        """The captured signal that holds this port: itself, or all its heads, neurons, experts or query rows together."""
        wholes = (
            Port(port.signal, port.layer, index, query) for query in (port.query, None) for index in (port.index, None)
        )
        found = next((whole for whole in wholes if whole in self._captured), None)
        if found is None:
            raise PatchbayError(f"{port} was not tapped; tapped were {', '.join(map(str, self._captured)) or 'none'}")
        return found

    def _slice(self, value: Tensor, held: Port, port: Port) -> Tensor:
        """What `port` names of the value of the port that holds it."""
        if held.index != port.index:
            value = value.select(list(SIGNALS[port.signal][0]).index(str(port.index_axis)), port.index or 0)
        if held.query != port.query:
            rows = query_rows(port.query or (), self.lengths).to(value.device)  # [prompt, row]
            value = torch.stack([one.index_select(-2, row) for one, row in zip(value, rows, strict=True)])
        return value

    def __getitem__(self, port: Port) -> Tensor:
        held = self._held(port)
        value = self._captured[held]
        return self._slice(_nan_padding(value, held, self.lengths) if value.requires_grad else value, held, port)

    def last(self, port: Port) -> Tensor:
        """The signal at each prompt's last position: the port's axes without the position."""
        if port.query is not None:
            raise PatchbayError(f"{port}: query rows are chosen by the port; read them from trace[port]")
        axis = port.tapped_axis
        value = self[port].movedim(axis, 1)  # [prompt, position, ...]
        return value[torch.arange(len(value)), (self.lengths - 1).to(value.device)]

    @property
    def last_logits(self) -> Tensor:
        """Logits at each prompt's last position, [prompt, vocab]."""
        if self.logits.shape[1] == 1:
            return self.logits[:, 0]
        return self.logits[torch.arange(len(self.logits)), (self.lengths - 1).to(self.logits.device)]

    def gradient(self, scalar: Tensor, *ports: Port) -> list[Tensor]:
        """d scalar / d port for tapped ports, NaN at padding; the run must have been made with grad=True."""
        held = [self._held(port) for port in ports]
        if not scalar.requires_grad:
            raise PatchbayError("this number carries no gradient: run with grad=True and compute it from the trace")
        values = [self._captured[port] for port in held]
        for port, value in zip(ports, values, strict=True):
            if not value.requires_grad:
                raise PatchbayError(f"{port} holds {value.dtype} and carries no gradient")
        gradients = torch.autograd.grad(scalar, values, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]
        filled = [_nan_padding(g, port, self.lengths) for g, port in zip(filled, held, strict=True)]
        return [self._slice(g, whole, port) for g, whole, port in zip(filled, held, ports, strict=True)]


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

    `grad=True` keeps the graph, for `trace.gradient`. `logits="last"` keeps those of each prompt's last position alone, and
    unembeds no others where all prompts have one length. `batch_size` splits the prompts; rows and masks of edits count in
    all of them. Raises PatchbayError for a port the model lacks, a position outside a prompt, a value that does not
    fit, or an edit that touches nothing.
    """
    edits = flat_edits(edits, model=model)
    if batch_size is not None and batch_size < 1:
        raise PatchbayError(f"batch_size={batch_size}: at least one prompt is run at a time")
    if logits not in ("all", "last"):
        raise PatchbayError(f"logits={logits!r}: 'all' or 'last'")
    ids, lengths, ragged = model.batch(prompts)
    touched = [_touched(edit, Batch(ids, lengths, lengths, model.token_id)) for edit in edits]
    apart = _apart(model, lengths)
    if apart is not None:
        trace = _in_groups(model, ids, lengths, apart, taps, edits, grad, logits, batch_size)
    elif batch_size is None or batch_size >= len(ids):
        trace = _together(model, ids, lengths, ragged, taps, edits, grad, logits)
    else:
        outer = next((edit for edit in model.active_edits() if edit.by_row), None)
        if grad or outer is not None:
            raise PatchbayError(
                f"batch_size cannot be combined with {outer or 'grad'}: "
                + ("its rows are those of a batch that is run whole" if outer else "the graph spans every prompt")
            )
        trace = _in_batches(model, ids, lengths, taps, edits, logits, batch_size)
    trace.touched, trace.edits = touched, edits
    return trace


def _together(
    model: Model,
    ids: Tensor,
    lengths: Tensor,
    ragged: bool,
    taps: Sequence[Port],
    edits: Sequence[Edit],
    grad: bool,
    logits: str,
) -> Trace:
    """All prompts as one batch."""
    options: dict[str, Any] = {"use_cache": False}
    if logits == "last" and not ragged and "logits" not in {port.signal for port in taps}:
        options["logits_to_keep"] = 1
    with (
        model.session(taps, edits, lengths=lengths, grad=grad) as session,
        torch.enable_grad() if grad else torch.no_grad(),
    ):
        output = model.hf(input_ids=_filled(ids, lengths, model) if ragged else ids, **options)
    kept = output.logits
    if logits == "last" and kept.shape[1] > 1:
        kept = kept[torch.arange(len(ids)), (lengths - 1).to(kept.device)][:, None]
    captured = session.captured
    if ragged:  # with grad a masked copy would stand beside the graph: it is made when it is read
        captured = {p: v if v.requires_grad else _nan_padding(v, p, lengths) for p, v in captured.items()}
        if kept.shape[1] > 1:
            kept = _nan_padding(kept, Port("logits"), lengths)
    return Trace(ids, lengths, kept, [], [], captured)


def _apart(model: Model, lengths: Tensor) -> list[list[int]] | None:
    """Groups of prompts that must not share a batch, because what is computed for one would depend on the others; else None."""
    groups: dict[int, list[int]] = {}
    if int(lengths.min()) < int(lengths.max()):
        for i, length in enumerate(lengths.tolist()):
            groups.setdefault(model.regime(length), []).append(i)
    return list(groups.values()) if len(groups) > 1 else None


def _in_groups(
    model: Model,
    ids: Tensor,
    lengths: Tensor,
    groups: Sequence[Sequence[int]],
    taps: Sequence[Port],
    edits: Sequence[Edit],
    grad: bool,
    logits: str,
    size: int | None,
) -> Trace:
    """Each group in batches of its own; their traces in the order of the prompts."""
    outer = next((edit for edit in model.active_edits() if edit.by_row), None)
    if grad or outer is not None:
        raise PatchbayError(
            f"{outer or 'grad=True'} on prompts of lengths {sorted(set(lengths.tolist()))[:6]}: what this model computes for one "
            "depends on the others of its batch, so they run apart; give prompts of one length"
        )
    batches = [
        list(group[i : i + (size or len(group))]) for group in groups for i in range(0, len(group), size or len(group))
    ]
    traces = []
    for some in batches:
        width = int(lengths[some].max())
        shares = (for_prompts(edit, some, len(ids), width) for edit in edits)
        own = [share for share in shares if share is not None]
        ragged = int(lengths[some].min()) < width
        traces.append(_together(model, ids[some, :width], lengths[some], ragged, taps, own, False, logits))
    joined = _join(traces, logits)
    order = torch.tensor([i for some in batches for i in some]).argsort()
    captured = {port: value[order.to(value.device)] for port, value in joined._captured.items()}
    kept = joined.logits[order.to(joined.logits.device)]
    return Trace(joined.ids[order.to(ids.device)], joined.lengths[order], kept, [], [], captured)


def _in_batches(
    model: Model, ids: Tensor, lengths: Tensor, taps: Sequence[Port], edits: Sequence[Edit], logits: str, size: int
) -> Trace:
    """`size` prompts at a time, each batch under the edits' share of it."""
    traces = []
    for start in range(0, len(ids), size):
        some = list(range(start, min(start + size, len(ids))))
        width = int(lengths[some].max())
        shares = (for_prompts(edit, some, len(ids), width) for edit in edits)
        own = [share for share in shares if share is not None]
        ragged = int(lengths[some].min()) < width
        traces.append(_together(model, ids[some, :width], lengths[some], ragged, taps, own, False, logits))
    return _join(traces, logits)


def _filled(ids: Tensor, lengths: Tensor, model: Model) -> Tensor:
    """The ids with padding of any token but the pad token, at which transformers warns that a mask is missing."""
    padding = torch.arange(ids.shape[1])[None, :] >= lengths[:, None]
    return ids.masked_fill(padding.to(ids.device), int(getattr(model.config, "pad_token_id", None) == 0))


def _touched(edit: Edit, batch: Batch) -> list[tuple[int, ...]]:
    """Positions of each prompt that the edit touches; an edit that touches none is a mistake and said so."""
    places = acts_on(edit, batch)
    if not bool(places.any()):
        raise PatchbayError(
            f"{edit} touches nothing: no prompt has such a position (prompts have {batch.lengths.tolist()[:8]} tokens)"
        )
    return [tuple(row.nonzero()[:, 0].tolist()) for row in places]


def _nan_padding(value: Tensor, port: Port, lengths: Tensor) -> Tensor:
    """The signal with its padding made NaN (-1 where it holds ids). Attention to padding is 0 in any case."""
    if port.query is not None:
        return value
    axis = port.tapped_axis
    n = value.shape[axis]
    if int(lengths.min()) >= n:
        return value
    padding = torch.arange(n)[None, :] >= lengths[:, None]  # [prompt, position]
    shape = [1] * value.ndim
    shape[0], shape[axis] = len(lengths), n
    fill = float("nan") if value.is_floating_point() else -1
    return value.masked_fill(padding.reshape(shape).to(value.device), fill)


def _join(traces: list[Trace], logits: str) -> Trace:
    """Traces of batches as one, padded to the longest prompt of all."""
    width = max(trace.ids.shape[1] for trace in traces)

    def together(values: list[Tensor], axes: Sequence[str], fill: float, fill_key: float) -> Tensor:
        out = []
        for value in values:
            for at, axis in enumerate(axes):
                if axis in ("position", "query", "key") and value.shape[at] < width:
                    shape = (*value.shape[:at], width - value.shape[at], *value.shape[at + 1 :])
                    value = torch.cat([value, value.new_full(shape, fill_key if axis == "key" else fill)], at)
            out.append(value)
        return torch.cat(out)

    first, nan = traces[0], float("nan")
    lengths = torch.cat([trace.lengths for trace in traces])
    captured = {}
    for port in first.ports:
        axes = [axis if port.query is None or axis != "query" else "row" for axis in port.axes]
        fill = nan if first._captured[port].is_floating_point() else -1
        fill_key = 0.0 if port.signal == "attn.pattern" else fill  # nobody attends to padding
        joined = together([trace._captured[port] for trace in traces], axes, fill, fill_key)
        captured[port] = _nan_padding(joined, port, lengths)
    return Trace(
        together([trace.ids for trace in traces], ("prompt", "position"), 0, 0),
        lengths,
        together([trace.logits for trace in traces], ("prompt", "position" if logits == "all" else "last"), nan, nan),
        [],
        [],
        captured,
    )
