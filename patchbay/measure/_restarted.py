"""Logits under many lists of edits, each run from the first layer that it edits: what stands below is run once.

The base run keeps every residual stream; a list of edits whose first layer is l starts from the stream that enters layer l and
calls the model's own layers l, l + 1, ... under a session with those edits. Equal to whole runs up to rounding; an empty list
gives the base run itself. Models whose layers carry a state, and edits of the logits, are run whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.jacks.session import Session
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.positions import Batch
from patchbay.sweeps.calls import Base
from patchbay.sweeps.layers import whole_layer
from patchbay.sweeps.restart import base_run


class Restarted:
    """Prompts of one batch, run once; `logits` gives what other edits make of them."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        *,
        last: bool,
        starts: Sequence[int] | None = None,
    ) -> None:
        """`starts`: how many tokens of each row are its prompt, in which positions of edits count; without, all of them."""
        self.model, self.prompts, self.last = model, [list(ids) for ids in prompts], last
        self.lengths = torch.tensor([len(ids) for ids in self.prompts])
        self.starts = self.lengths if starts is None else torch.tensor(list(starts))
        width = int(self.lengths.max())
        filler = int(
            getattr(model.config, "pad_token_id", None) == 0
        )  # transformers warns of pad tokens without a mask
        rows = [ids + [filler] * (width - len(ids)) for ids in self.prompts]
        ids = torch.tensor(rows, device=model.device)
        self.batch = Batch(ids, self.lengths, self.starts, model)
        self.base: Base | None = None
        if model._session is None:  # edits of an enclosing block are not in the kept streams
            base = base_run(model, ids, [])
            self.base = base if base.refusal is None else None
        self.plain = self._whole([]) if self.base is None else self._read(self.base.resid[-1])

    @torch.no_grad()
    def logits(self, edits: Sequence[Edit]) -> Tensor:
        """[prompt, vocab] of each prompt's last position with `last`, else [prompt, position, vocab]."""
        if not edits:
            return self.plain
        late = {"logits"} | (
            {"final_norm"} if self.model.check.norm_calls > 1 else set()
        )  # whose module has more places
        if self.base is None or any(edit.port.signal in late for edit in edits):
            return self._whole(edits)
        n = self.model.n_layers
        ports = [port for e in edits for port in (e.port, *([] if e.where is None else [e.where.port]))]
        places = [n if port.signal == "final_norm" else 0 if port.layer is None else port.layer for port in ports]
        first = min(places)
        x, prompts = self.base.resid[first], torch.arange(len(self.prompts))
        with Session(
            self.model, (), edits, lengths=self.lengths, prompt_lengths=self.starts, whole=True
        ) as session:  # in place of the edits of an enclosing block, which `edits` then hold
            session.place(self.batch, 0, self.base.n_positions)
            for layer in range(first, n):
                x = whole_layer(self.base, layer, 0, x, prompts)
            return self._read(x)

    @property
    def n_numbers(self) -> int:
        """How many numbers are kept."""
        return self.plain.numel() + sum(x.numel() for x in (self.base.resid if self.base is not None else []))

    def _read(self, stream: Tensor) -> Tensor:
        """Final norm and unembedding of a stream [prompt, position, d_model]."""
        normed = self.model.final_norm_module(stream)  # whole: an edit of it counts positions
        if self.last:
            normed = normed[torch.arange(len(normed)), (self.lengths - 1).to(normed.device)]
        with torch.no_grad():
            return self.model.unembed_logits(normed)

    def _whole(self, edits: Sequence[Edit]) -> Tensor:
        trace = run(self.model, self.prompts, edits=list(edits), logits="last" if self.last else "all")
        return trace.last_logits if self.last else trace.logits
