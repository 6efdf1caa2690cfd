"""Trace: what a run saw, padding NaN, the axes of each signal as its port says; traces of batches joined to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.errors import by_kind
from patchbay.jacks.sites import query_rows
from patchbay.late import late
from patchbay.signal.card import card
from patchbay.signal.port import SIGNALS, PatchbayError, Port, as_port


@dataclass(repr=False)
class Trace:
    """What a run saw. `trace[port]` (a Port or its text) is a torch tensor with the port's axes; `trace.logits` [prompt, position, vocab]."""

    ids: Tensor  # [prompt, position], 0 on the right of a prompt
    lengths: Tensor  # [prompt]
    logits: Tensor  # [prompt, position, vocab]; of the last position alone with logits="last"
    touched: list[list[tuple[int, ...]]]  # for each edit, for each prompt, the positions it touched
    edits: list[Edit] = field(default_factory=list)
    _captured: Mapping[Port, Tensor] = field(default_factory=dict, repr=False)  # with grad, before padding is made NaN
    prompt_lengths: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # [prompt]; less than `lengths` after generation
    _model: Any = None  # whose run it was: what a port's text means, and the tokens of ids; not kept on disk

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}

    @property
    def ports(self) -> list[Port]:
        return list(self._captured)

    def __repr__(self) -> str:
        least, most = int(self.lengths.min()), int(self.lengths.max())
        lines = [
            f"Trace of {len(self.ids)} prompt{'s' if len(self.ids) > 1 else ''} of {least if least == most else f'{least} to {most}'} "
            f"tokens{self._grown}: logits {list(self.logits.shape)}"
        ]
        lines += [f"  {port} [{', '.join(port.axes)}] {list(value.shape)}" for port, value in self._captured.items()]
        for edit, rows in zip(self.edits, self.touched, strict=True):
            hit = [row for row in rows if row]
            lines.append(
                f"  {edit} touched {sum(map(len, hit))} positions of {len(hit)} prompt{'s' if len(hit) > 1 else ''}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        first, *below = repr(self).splitlines()
        rows = [[port, ", ".join(port.axes), " x ".join(map(str, v.shape))] for port, v in self._captured.items()]
        edits = [line.strip() for line in below[len(rows) :]]
        return card(first, rows, columns=("port", "axes", "shape"), below="; ".join(edits))

    @property
    def new_ids(self) -> list[list[int]]:
        """The generated tokens of each prompt; none without generation."""
        starts = self.prompt_lengths.tolist()
        return [
            self.ids[i, start:end].tolist() for i, (start, end) in enumerate(zip(starts, self.lengths, strict=True))
        ]

    @property
    def _grown(self) -> str:
        new = self.lengths - self.prompt_lengths
        least, most = int(new.min()), int(new.max())
        return f", the last {most if least == most else f'{least} to {most}'} generated" if most else ""

    def port(self, asked: Port | str) -> Port:
        """The port of a text, as the model that was run reads it."""
        return self._model.port(asked) if isinstance(asked, str) and self._model is not None else as_port(asked)

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

    def __getitem__(self, port: Port | str) -> Tensor:
        port = self.port(port)
        held = self._held(port)
        value = self._captured[held]
        return self._slice(nan_padding(value, held, self.lengths) if value.requires_grad else value, held, port)

    @by_kind
    def show(self, port: Port | str, *, prompt: int = 0) -> Any:
        """One prompt's signal as a Result with its tokens on the axes, which prints, draws and shows as a map.

        A pattern is its weights, query by key; router weights, logits and activations of the MLP are their numbers; of other
        signals, vectors, their lengths (2-norms). The logits are the most likely next token and its probability. A pattern of
        all heads is refused: name one, like "L3.H6.pattern".
        """
        return late("shown")(self, self.port(port), prompt)

    def last(self, port: Port | str) -> Tensor:
        """The signal at each prompt's last position: the port's axes without the position."""
        port = self.port(port)
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

    def read(self, which: str) -> Tensor:
        """The logits that a metric reads (`task.reads`): of "all" positions, or of each prompt's "last", [prompt, vocab]."""
        return self.logits if which == "all" else self.last_logits

    def gradient(self, scalar: Tensor, *asked: Port | str) -> list[Tensor]:
        """d scalar / d port for tapped ports, NaN at padding; the run must have been made with grad=True."""
        ports = [self.port(port) for port in asked]
        held = [self._held(port) for port in ports]
        if not scalar.requires_grad:
            raise PatchbayError("this number carries no gradient: run with grad=True and compute it from the trace")
        values = [self._captured[port] for port in held]
        for port, value in zip(ports, values, strict=True):
            if not value.requires_grad:
                raise PatchbayError(f"{port} holds {value.dtype} and carries no gradient")
        gradients = torch.autograd.grad(scalar, values, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]
        filled = [nan_padding(g, port, self.lengths) for g, port in zip(filled, held, strict=True)]
        return [self._slice(g, whole, port) for g, whole, port in zip(filled, held, ports, strict=True)]


def nan_padding(value: Tensor, port: Port, lengths: Tensor) -> Tensor:
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


def join(traces: list[Trace], logits: str) -> Trace:
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
        captured[port] = nan_padding(joined, port, lengths)
    touched = [[row for trace in traces for row in trace.touched[i]] for i in range(len(first.touched))]
    return Trace(
        together([trace.ids for trace in traces], ("prompt", "position"), 0, 0),
        lengths,
        together([trace.logits for trace in traces], ("prompt", "position" if logits == "all" else "last"), nan, nan),
        touched,
        [],
        captured,
    )
