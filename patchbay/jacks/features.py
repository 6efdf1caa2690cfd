"""Features of a signal, where a dictionary is attached: encoded as the signal passes, edited, and decoded into it by what changed.

    z = encode(x),  x = decode(z) + e          e: the error, what the dictionary does not say
    x' = x + (z' - z) W_dec + (e' - e)         z' and e' after their edits

The error stays by construction, and where nothing is changed x' is x, bit for bit. A transcoder reads one signal and writes another: z is
of what is read, and x is what is written. Edits of the signal itself come before its features, its taps see it after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.jacks.modelled import Dictionary
from patchbay.jacks.modelled import Modelled as Lent
from patchbay.jacks.sites import Sites, Want
from patchbay.signal.port import Port, by_home


class Features(Sites):
    """Sites of a model that may have dictionaries attached."""

    def __init__(self, model: Lent, taps: Sequence[Port], edits: Sequence[Edit], **options: Any) -> None:
        super().__init__(model, taps, edits, **options)
        for signal, layer in self.wants:
            found = by_home(Port(signal, layer))
            if found is None or layer is None:
                continue
            dictionary = model.dictionaries[layer, found[0]]
            for place in dict.fromkeys((dictionary.reads, dictionary.writes)):
                homes = self.hosts.setdefault((place, layer), [])
                homes.extend([] if found[0] in homes else [found[0]])

    def _decoded(self, signal: str, layer: int | None, x: Tensor) -> Tensor:
        """The signal after the edits of its features; what a transcoder reads is kept until it writes."""
        assert layer is not None or not self.hosts.get((signal, layer))
        for home in self.hosts.get((signal, layer), ()):
            dictionary = self.model.dictionaries[layer, home]  # type: ignore[index]
            if signal == dictionary.reads:
                read = x.flatten(2)
                self.here.stash[home, layer or 0] = (dictionary.encode(read), read)
            if signal == dictionary.writes:
                z, read = self.here.stash.pop((home, layer or 0))
                x = self._changed(home, layer or 0, dictionary, z, read, x)
        return x

    def _changed(self, home: str, layer: int, dictionary: Dictionary, z: Tensor, read: Tensor, x: Tensor) -> Tensor:
        """x + (z' - z) W_dec + (e' - e), where these differ; `x` itself where they do not."""
        flat = x.flatten(2)
        new = self.site(f"{home}.act", layer, z.view_as(z) if self.grad else z)
        changes = []
        if self.grad or new is not z:
            some = self._edited_features(self.wants.get((f"{home}.act", layer), Want()))
            rows = dictionary.W_dec.to(z) if some is None else dictionary.W_dec[some].to(z)
            written, factor = (
                (new - z if some is None else new[..., some] - z[..., some]) @ rows,
                dictionary.factor(read),
            )
            changes.append(written if factor is None else written * factor)
        if (f"{home}.error", layer) in self.wants:
            error = flat.to(z) - dictionary.decode(z, read)
            changed = self.site(f"{home}.error", layer, error.view_as(error) if self.grad else error)
            if self.grad or changed is not error:
                changes.append(changed - error)
        if not changes:
            return x
        change = sum(changes[1:], changes[0])
        if self.grad:
            return (flat + change.to(flat.dtype)).view(x.shape)
        moved = (change != 0).any(-1, keepdim=True)
        return torch.where(moved, flat + change.to(flat.dtype), flat).view(x.shape)

    def _edited_features(self, want: Want) -> list[int] | None:
        """The features that edits name, None where one names them all, or where a gradient goes through all."""
        named = [edit.port.index for _, edit in want.changes]
        return None if self.grad or None in named else sorted({i for i in named if i is not None})
