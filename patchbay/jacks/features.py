"""Features of a signal, where a dictionary is attached: encoded as the signal passes, edited, and decoded into it by what changed.

    z = encode(x),  x = decode(z) + e          e: the error, what the dictionary does not say
    x' = x + (z' - z) W_dec + (e' - e)         z' and e' after their edits

The error stays by construction, and where nothing is changed x' is x, bit for bit. A transcoder reads one signal and writes another: z is
of what is read, and x is what is written. Edits of the signal itself come before its features, its taps see it after them. What is read
in several layers is kept until the last of them; what is written in later ones is kept until they pass, and e of these is what all features
that are written there leave.
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
        self.shared: set[tuple[str, int]] = set()  # whose activations the errors of later layers are told by
        for signal, layer in list(self.wants):
            found = by_home(Port(signal, layer))
            if found is None or layer is None:
                continue
            self._host(found[0], layer)
            for other in self._earlier(found[0], layer) if found[1] == "error" else ():
                self._host(found[0], other)
                self.shared.add((found[0], other))

    def _host(self, home: str, layer: int) -> None:
        """Be told of the signals that a dictionary reads and writes, those of earlier layers first."""
        it = self.model.dictionaries[layer, home]
        read, written = [(it.reads, i) for i in it.sites], [(it.writes, i) for i in (layer, *it.later)]
        for place in dict.fromkeys((*read, *written)):
            hosted = self.hosts.setdefault(place, [])
            if (home, layer) not in hosted:
                hosted.append((home, layer))
                hosted.sort(key=lambda one: one[1])

    def _earlier(self, home: str, layer: int) -> list[int]:
        """The layers whose features are written in this one too."""
        return [i for (i, at), it in self.model.dictionaries.items() if at == home and layer in it.later]

    def _decoded(self, signal: str, layer: int | None, x: Tensor) -> Tensor:
        """The signal after the edits of its features; what is read is kept until it is written."""
        assert layer is not None or not self.hosts.get((signal, layer))
        for home, at in self.hosts.get((signal, layer), ()):
            it = self.model.dictionaries[at, home]
            if signal == it.reads and layer in it.sites:
                self._read(home, at, layer or 0, x.flatten(2))
            if signal == it.writes and layer == at:
                z, read = self.here.stash.pop((home, at))
                x = self._changed(home, at, it, z, read, x)
            elif signal == it.writes and layer in it.later:
                x = self._further(home, at, layer or 0, it, x)
        return x

    def _read(self, home: str, at: int, layer: int, x: Tensor) -> None:
        """What a dictionary reads, encoded when the last of its layers has passed."""
        it, key = self.model.dictionaries[at, home], (f"{home}.read", at)
        held = self.here.stash[key] = [*(() if layer == it.sites[0] else self.here.stash[key]), x]
        if layer == at:
            read = held[0] if len(held) == 1 else torch.cat(self.here.stash.pop(key), dim=-1)
            self.here.stash.pop(key, None)
            self.here.stash[home, at] = (it.encode(read), read)

    def _changed(self, home: str, layer: int, dictionary: Dictionary, z: Tensor, read: Tensor, x: Tensor) -> Tensor:
        """x + (z' - z) W_dec + (e' - e), where these differ; `x` itself where they do not."""
        flat = x.flatten(2)
        new = self.site(f"{home}.act", layer, z.view_as(z) if self.grad else z)
        changes = []
        moved: tuple[Tensor, list[int] | None] | None = None
        if self.grad or new is not z:
            some = self._edited_features(self.wants.get((f"{home}.act", layer), Want()))
            moved = (new - z if some is None else new[..., some] - z[..., some], some)
            factor = dictionary.factor(read)
            written = _written(moved, dictionary.W_dec)
            changes.append(written if factor is None else written * factor)
        if dictionary.later:
            self.here.stash[f"{home}.moved", layer] = moved
        if (home, layer) in self.shared:
            self.here.stash[f"{home}.active", layer] = new
        if (f"{home}.error", layer) in self.wants:
            error = flat.to(z) - dictionary.decode(z, read)
            for other in self._earlier(home, layer):
                error = error - self._said(home, other, layer).to(z)
            changed = self.site(f"{home}.error", layer, error.view_as(error) if self.grad else error)
            if self.grad or changed is not error:
                changes.append(changed - error)
        return self._added(changes, x) if changes else x

    def _said(self, home: str, at: int, layer: int) -> Tensor:
        """What the features of an earlier layer write in this one."""
        it = self.model.dictionaries[at, home]
        assert it.onward is not None
        z: Tensor = self.here.stash[f"{home}.active", at]
        return z @ it.onward[it.later.index(layer)].to(z)

    def _further(self, home: str, at: int, layer: int, it: Dictionary, x: Tensor) -> Tensor:
        """A signal of a later layer, with what a change of features writes there."""
        moved = self.here.stash.get((f"{home}.moved", at))
        if moved is None:
            return x
        assert it.onward is not None
        return self._added([_written(moved, it.onward[it.later.index(layer)])], x)

    def _added(self, changes: list[Tensor], x: Tensor) -> Tensor:
        """The signal with changes added, bit for bit as it was where they are 0."""
        flat, change = x.flatten(2), sum(changes[1:], changes[0])
        if self.grad:
            return (flat + change.to(flat.dtype)).view(x.shape)
        moved = (change != 0).any(-1, keepdim=True)
        return torch.where(moved, flat + change.to(flat.dtype), flat).view(x.shape)

    def _edited_features(self, want: Want) -> list[int] | None:
        """The features that edits name, None where one names them all, or where a gradient goes through all."""
        named = [edit.port.index for _, edit in want.changes]
        return None if self.grad or None in named else sorted({i for i in named if i is not None})


def _written(moved: tuple[Tensor, list[int] | None], rows: Tensor) -> Tensor:
    """What a change of all features, or of some, [..., feature], writes by a decoder's rows."""
    change, some = moved
    return change @ (rows if some is None else rows[some]).to(change)
