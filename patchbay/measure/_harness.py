"""What the harnesses of others need of a model: loaded by name, under a knob that a text names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from patchbay.knobs.knob import Knob, load_knob
from patchbay.model.generate import returned
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.model.text import Prompts
from patchbay.signal.port import PatchbayError


def lacking(extra: str, error: ModuleNotFoundError) -> PatchbayError:
    """What to say where a package of others is not installed."""
    return PatchbayError(f"{error.name} is not installed: pip install 'patchbay-lm[{extra}]'")


def device_there(device: str | None) -> str | None:
    """The device to load to. lm-evaluation-harness names "cuda:0" where nobody named one: without CUDA that is none; others are refused."""
    if device is None or not str(device).startswith("cuda") or torch.cuda.is_available():
        return device
    if device == "cuda:0":
        return None
    raise PatchbayError(f"device={device!r}: there is no CUDA here; leave it out, or cpu")


def new_text(model: Model, ids: Sequence[int], row: list[int]) -> str:
    """What a row says after its prompt, as it stands there, without special tokens: an end token is no part of an answer."""
    [text] = returned(model, Prompts([list(ids)], False, True), [row], True)
    return str(text)


class Turned:
    """A model under a knob, or under none: what a harness runs. `knob`: a Knob, or `x.knob@2`, a file and a strength."""

    def __init__(self, model: Any, knob: Any = None, **how: Any) -> None:
        self.model: Model = model if isinstance(model, Model) else load(str(model), **how)
        self.knob: Knob | None = None if knob in (None, "") else knob if isinstance(knob, Knob) else named(str(knob))
        if self.knob is not None:
            self.knob.check(self.model)

    @contextmanager
    def on(self) -> Iterator[Model]:
        """The block in which the knob is turned."""
        if self.knob is None:
            yield self.model
        else:
            with self.model.edited(self.knob):
                yield self.model


def named(text: str) -> Knob:
    """The knob of `x.knob@2`, a file and a strength; `x.knob` alone leaves the strength to the knob."""
    path, at, written = text.rpartition("@")
    if not at:
        return load_knob(text)
    try:
        strength = float(written)
    except ValueError:
        return load_knob(text)
    return load_knob(path).at(strength)
