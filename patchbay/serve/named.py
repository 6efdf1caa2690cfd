"""What a server offers by name: its model, and the knobs of one folder, each at any strength, several at once: `tiny+context@2+calm`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchbay.edits.edit import Edit
from patchbay.errors import PatchbayError, suggest
from patchbay.knobs.knob import Knob, load_knob
from patchbay.knobs.rows import by_row
from patchbay.model.given import flat_edits
from patchbay.model.model import Model
from patchbay.serve.asking import MOST_KNOBS, strength
from patchbay.serve.guard import Refusal, inside

NAME = re.compile(r"[\w.-]+")
HEADER_BYTES, FILE_BYTES = 16 << 20, 1 << 30  # of a knob's file


class Named:
    """A model under its name, with knobs under theirs."""

    def __init__(self, model: Model, name: str, knobs: Mapping[str, Knob] | None = None) -> None:
        self.model, self.name, self.knobs = model, name, dict(knobs or {})
        self._edits: dict[tuple[tuple[str, float], ...], tuple[tuple[Edit, ...], tuple[str, ...]]] = {}
        for text in (name, *self.knobs):
            if not NAME.fullmatch(text):
                raise PatchbayError(f"{text!r} is no name that a request can say: letters, digits, '.', '_' and '-'")

    def asked(self, text: str, more: Sequence[tuple[str, float | None]] = ()) -> tuple[tuple[str, float], ...]:
        """The knobs of a model's name, then `more`, each with its strength. Raises Refusal for what there is not."""
        first, *parts = text.split("+")
        if first != self.name:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise Refusal(
                404,
                f"there is no model {shown!r}; this server has {self.name}{self._known()}",
                about="model",
                code="model_not_found",
            )
        named = [self._part(part) for part in parts]
        found = []
        for name, turned in (*named, *more):
            knob = self.knobs.get(name)
            if knob is None:
                raise Refusal(
                    400,
                    f"there is no knob {name[:40]!r}{self._known()}{suggest(name[:40], list(self.knobs))}",
                    about="model",
                    code="knob_not_found",
                )
            found.append((name, knob.strength if turned is None else turned))
        if len(found) > MOST_KNOBS:
            raise Refusal(
                400, f"{len(found)} knobs; up to {MOST_KNOBS} in one request", about="model", code="invalid_value"
            )
        return tuple(found)

    def edits(self, turned: tuple[tuple[str, float], ...]) -> tuple[tuple[Edit, ...], tuple[str, ...]]:
        """The edits of these knobs, and what was to be said of them (where their order matters). Asked once for each set of knobs."""
        if turned not in self._edits:
            knobs = [self.knobs[name].at(strength) for name, strength in turned]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                made = tuple(flat_edits(knobs, model=self.model))
            by_row(self.model, [list(made)])  # refuses what is no edit of one row
            if len(self._edits) >= 256:
                self._edits.clear()
            self._edits[turned] = made, tuple(dict.fromkeys(str(one.message) for one in said))
        return self._edits[turned]

    def listed(self) -> list[dict[str, Any]]:
        """What /v1/models tells: the model, then each knob as a model of its own."""
        shared = {"object": "model", "created": 0, "owned_by": "patchbay"}
        rows: list[dict[str, Any]] = [{"id": self.name} | shared]
        for name, knob in self.knobs.items():
            about = {"name": name, "strength": knob.strength, "neutral": knob.neutral}
            rows.append({"id": f"{self.name}+{name}"} | shared | {"parent": self.name, "patchbay": about})
        return rows

    def _part(self, part: str) -> tuple[str, float | None]:
        name, at, turned = part.partition("@")
        if not at:
            return name, None
        if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", turned):
            raise Refusal(
                400,
                f"knob {name[:40]!r} is turned to a number, {name[:40]}@2, got {turned[:40]!r}",
                about="model",
                code="invalid_value",
            )
        return name, strength(name, float(turned))

    def _known(self) -> str:
        return f" with the knobs {', '.join(self.knobs)}" if self.knobs else " without knobs"


def knobs_of(folder: str | Path, model: Model) -> dict[str, Knob]:
    """The knobs of a folder's `.knob` files, by the names of the files; each made on this model, or refused.

    What a request cannot say in a name (spaces, +, @) is a - there: `my knob.knob` is asked for as my-knob.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PatchbayError(f"{root} is no folder of knobs")
    found: dict[str, Knob] = {}
    files: dict[str, Path] = {}
    for path in sorted(root.glob("*.knob")):
        inside(root, path.name)
        check_size(path)
        knob = load_knob(path, model)
        knob.check(model)
        knob.fits(model)
        name = "-".join(NAME.findall(path.stem))
        if not name or name in files:
            other = f"is asked for as {name}, and so is {files[name].name}" if name else "has no letter in its name"
            raise PatchbayError(f"{path} {other}: give it another name")
        found[name], files[name] = knob, path
    return found


def check_size(path: Path) -> None:
    """Refuse a file whose header, or all of which, is too large to be a knob, before it is read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size > FILE_BYTES or header > min(size, HEADER_BYTES):
        raise PatchbayError(
            f"{path} is no knob: {size} bytes with a header of {header}; {FILE_BYTES} and {HEADER_BYTES} are read at most"
        )
