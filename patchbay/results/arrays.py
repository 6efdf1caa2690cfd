"""Labelled arrays with units, and the parts that they rank: what a Result holds, before it prints, draws or is saved.

The first variable is the main one. On the axes (layer, head), (layer, neuron), (layer, expert), (layer) or (part)
it ranks the parts (or channels between them), and each other variable on the same axes (`low`, `high`, `null_mean`, `p`, ...)
becomes a column. NaN means that a part has no value (it lacks the port, or was not measured): it is never ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from patchbay.results.letters import visible
from patchbay.results.saved import plain
from patchbay.signal.channel import Channel, parse_channel
from patchbay.signal.port import AXES, Part, PatchbayError, as_part, suggest

if TYPE_CHECKING:
    import numpy
    import pandas
    import xarray

    Array: TypeAlias = "Tensor | numpy.ndarray[Any, Any] | Sequence[Any] | float"

# axes that no signal has, each for one reason
MADE_AXES = {
    "part": "parts of several kinds, or a few of a grid, in one list",
    "strength": "how far a knob is turned",
    "n_parts": "how many parts are edited together",
    "draw": "repeats of a random control",
    "chunk": "pieces of a long text, in their order",
    "draft": "continuations of one prompt side by side",
    "condition": "named cases side by side: chosen and random parts, clean and corrupted prompts",
    "statistic": "named summaries side by side that are no variables of their own",
    "token": "named tokens: the candidates of an answer, the most likely ones",
    "component": "singular components of a part's out-map, largest first",
    "writer": "parts, or pieces of parts, that write into the stream",
    "reader": "inputs of parts that read from the stream",
    "offset": "distances between a query and the key it looks at",
    "run": "trainings of one recipe, each from a seed of its own",
    "into": "layers that a state of another layer is written into",
}
RANKED_GRIDS: dict[tuple[str, ...], str] = {("layer", kind): kind for kind in ("head", "neuron", "expert")} | {
    ("layer",): "layer"
}
WORDS = 5  # tokens that name a part in its row
Row = dict[str, Any]


class Arrays:
    """Variables on named axes, the steps of these axes, further tables, notes and provenance; see `Result`."""

    def __init__(
        self,
        values: Array | Mapping[str, tuple[Array, Sequence[str], str]],
        axes: Sequence[str] = ("layer", "head"),
        unit: str = "",
        *,
        name: str = "score",
        coords: Mapping[str, Sequence[Any]] | None = None,
        parts: Sequence[Part | str | object] | None = None,
        tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        notes: Sequence[str] = (),
        highlights: Sequence[Part | str | object] = (),
        shown: Sequence[str] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        given = values if isinstance(values, Mapping) else {name: (values, axes, unit)}
        if not given:
            raise PatchbayError("a Result needs at least one variable, got none")
        self._tensors: dict[str, Tensor] = {}
        self._axes: dict[str, tuple[str, ...]] = {}
        self.units: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        for variable, (array, its_axes, its_unit) in given.items():
            self._add(variable, array, tuple(its_axes), its_unit)
        self.name = next(iter(self._tensors))
        self.coords: dict[str, list[Any]] = {
            axis: self._labels(axis, labels) for axis, labels in (coords or {}).items()
        }
        self.parts: list[Part] | None = None
        if parts is not None:
            self.parts = [_placed(part) for part in parts]
            self.coords["part"] = self._labels("part", [str(part) for part in self.parts])
        elif "part" in self.axes:
            raise PatchbayError("axis 'part' needs parts=[...], one for each step")
        self.tables: dict[str, list[Row]] = {key: [plain(row) for row in rows] for key, rows in (tables or {}).items()}
        self.notes = tuple(str(note) for note in notes)
        self.highlights = tuple(_placed(part) for part in highlights)
        self.shown = tuple(shown)
        if unknown := [name for name in self.shown if name not in self.tables]:
            raise PatchbayError(
                f"shown={unknown}: no table of that name; tables are {', '.join(self.tables) or 'none'}"
            )
        self.provenance: dict[str, Any] = dict(provenance or {})

    def _add(self, name: str, array: Array, axes: tuple[str, ...], unit: str) -> None:
        known = (*AXES, *MADE_AXES)
        if not name.isidentifier() or name in known:
            raise PatchbayError(
                f"{name!r} cannot name a variable: it must be an identifier and not the name of an axis"
            )
        for axis in axes:
            if axis not in known:
                raise PatchbayError(f"no axis {axis!r}; axes are {', '.join(known)}" + suggest(axis, known))
        tensor = torch.as_tensor(array).detach().cpu()
        if tensor.is_complex():
            raise PatchbayError(f"variable {name!r} is complex; a Result holds real numbers")
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        if len(set(axes)) != len(axes) or tensor.ndim != len(axes):
            raise PatchbayError(
                f"variable {name!r} has shape {tuple(tensor.shape)} and axes {axes}: one axis per dimension"
            )
        for axis, size in zip(axes, tensor.shape, strict=True):
            if self.sizes.setdefault(axis, size) != size:
                raise PatchbayError(f"axis {axis!r} has {self.sizes[axis]} steps, variable {name!r} has {size}")
        self._tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._axes[name], self.units[name] = axes, str(unit)

    def _labels(self, axis: str, labels: Sequence[Any]) -> list[Any]:
        labels = [plain(label) for label in (labels.tolist() if hasattr(labels, "tolist") else labels)]
        if axis not in self.sizes:
            raise PatchbayError(
                f"labels for axis {axis!r}, which no variable has; axes here are {', '.join(self.sizes)}"
            )
        if len(labels) != self.sizes[axis]:
            raise PatchbayError(f"axis {axis!r} has {self.sizes[axis]} steps, got {len(labels)} labels")
        return labels

    # --- the arrays -------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        """Unit of the main variable."""
        return self.units[self.name]

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names of the main variable."""
        return self._axes[self.name]

    @property
    def values(self) -> Tensor:
        """The main variable."""
        return self._tensors[self.name]

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of all variables, the main one first."""
        return tuple(self._tensors)

    def axes_of(self, variable: str) -> tuple[str, ...]:
        self[variable]
        return self._axes[variable]

    def labels_of(self, axis: str) -> list[Any]:
        """The labels of an axis, or 0, 1, 2, ... where it has none."""
        if axis not in list(self.sizes):
            raise PatchbayError(f"no axis {axis!r}; this Result has {', '.join(self.sizes) or 'none'}")
        return self.coords.get(axis) or list(range(self.sizes[axis]))

    def __getitem__(self, variable: str) -> Tensor:
        if variable not in (known := self.variables):
            raise PatchbayError(
                f"no variable {variable!r}; this Result has {', '.join(known)}" + suggest(str(variable), known)
            )
        return self._tensors[variable]

    def __contains__(self, variable: str) -> bool:
        return variable in self._tensors

    @cached_property
    def data(self) -> xarray.Dataset:
        """All variables as an xarray Dataset, with labelled axes and the unit of each in its attributes."""
        import xarray

        arrays = {name: (self._axes[name], t.numpy(), {"unit": self.units[name]}) for name, t in self._tensors.items()}
        return xarray.Dataset(arrays, coords={axis: (axis, labels) for axis, labels in self.coords.items()})

    def to_dataframe(self) -> pandas.DataFrame:
        """The ranked table as a pandas DataFrame; without a ranking, one row per cell of the arrays."""
        import pandas

        if self.ranked:
            return pandas.DataFrame([row | {"part": str(row["part"])} for row in self.table()], columns=self.columns)
        frame = self.data.to_dataframe() if self.sizes else self.data.expand_dims("draw").to_dataframe()
        return frame.reset_index()

    # --- the ranking ------------------------------------------------------------------------------

    @cached_property
    def ranked(self) -> bool:
        """Whether the steps of the main variable are parts, so that it ranks them."""
        counted = all(type(label) is int for axis in self.axes for label in self.labels_of(axis))
        return self.axes == ("part",) or (self.axes in RANKED_GRIDS and counted)

    def _part(self, place: int) -> Part:
        """The part at a place of the flattened main variable."""
        if self.axes == ("part",):
            assert self.parts is not None
            return self.parts[place]
        kind = RANKED_GRIDS[self.axes]
        layers = self.labels_of("layer")
        if kind == "layer":
            return Part(layers[place], "layer")
        layer, index = divmod(place, self.sizes[kind])
        return Part(layers[layer], kind, self.labels_of(kind)[index])

    @property
    def columns(self) -> list[str]:
        """Columns of `table`: rank, part, value, tokens where the parts are named by some, the other variables on the same axes."""
        return ["rank", "part", "value", *(["tokens"] if self._words else []), *self._beside()]

    @property
    def _words(self) -> dict[Part, str]:
        """What the parts are called in tokens, where the table "names" says so."""
        named = self.tables.get("names", []) if self.ranked else []
        return {
            as_part(row["part"]): " ".join(map(visible, row["tokens"][:WORDS]))
            for row in named
            if {"part", "tokens"} <= set(row)
        }

    def _beside(self) -> list[str]:
        return [name for name in self.variables[1:] if self._axes[name] == self.axes]

    def _order(self, n: int | None, by: str, descending: bool) -> list[int]:
        if not self.ranked:
            raise PatchbayError(
                f"this Result ranks no parts: its axes are {', '.join(self.axes) or 'none'}; ranked are "
                + ", ".join(f"({', '.join(axes)})" for axes in [*RANKED_GRIDS, ("part",)])
            )
        if by not in ("value", "abs"):
            raise PatchbayError(f"asked to rank by {by!r}; possible are 'value' and 'abs'")
        if n is not None and (isinstance(n, bool) or not hasattr(n, "__index__")):
            raise PatchbayError(f"asked for {n!r} parts; n is a whole number, like top(3)")
        if n is not None and n < 0:
            raise PatchbayError(f"asked for {n} parts; n must be 0 or more")
        flat = self.values.flatten().double()
        places = (~flat.isnan()).nonzero()[:, 0]
        keys = flat[places].abs() if by == "abs" else flat[places]
        return places[keys.argsort(descending=descending, stable=True)][:n].tolist()

    def top(self, n: int = 10, *, by: str = "value") -> list[Part]:
        """The `n` parts of highest value (or highest absolute value, `by="abs"`), highest first."""
        return [self._part(place) for place in self._order(n, by, True)]

    def bottom(self, n: int = 10, *, by: str = "value") -> list[Part]:
        """The `n` parts of lowest value, lowest first."""
        return [self._part(place) for place in self._order(n, by, False)]

    def table(self, n: int | None = None, *, by: str = "value") -> list[Row]:
        """Rows of `columns`, highest first; ranks count from 1."""
        columns = {"value": self.name} | {name: name for name in self._beside()}
        flat = {column: self._tensors[name].flatten() for column, name in columns.items()}
        words, rows = self._words, []
        for i, place in enumerate(self._order(n, by, True), start=1):
            row: Row = {"rank": i, "part": self._part(place), "value": flat["value"][place].item()}
            row |= {"tokens": words.get(row["part"], "")} if words else {}
            rows.append(row | {column: values[place].item() for column, values in flat.items()})
        return rows

    def told(self, n: int | None = None, *, by: str = "value") -> list[Row]:
        """The rows of `table` as they are shown: without the columns in which none of them has a number."""
        return with_values(self.table(n, by=by))

    def sections(self) -> list[tuple[str, list[Row], list[str]]]:
        """The tables that are shown in place of a ranking, each with its name, its rows and the notes that begin with its name."""
        return [
            (
                name,
                with_values(self.tables[name]),
                [note[len(name) + 2 :] for note in self.notes if note.startswith(f"{name}: ")],
            )
            for name in self.shown
        ]

    @property
    def other_notes(self) -> list[str]:
        """The notes that belong to none of the tables that are shown."""
        return [note for note in self.notes if not any(note.startswith(f"{name}: ") for name in self.shown)]


def on_grid(parts: Sequence[Part], values: Tensor, n_layers: int, width: int) -> Tensor:
    """Values [..., part] at each part's layer and index, [..., layer, index]; NaN elsewhere."""
    out = values.new_full((*values.shape[:-1], n_layers, width), torch.nan)
    out[..., [part.layer or 0 for part in parts], [part.index or 0 for part in parts]] = values
    return out


def heads_and_mlps(
    parts: Sequence[Part], values: Tensor, n_layers: int, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Values [part] of heads as [layer, head], as wide as the last head where no width is given, and of MLPs as [layer]."""
    mlps = [i for i, part in enumerate(parts) if part.kind == "mlp"]
    heads = [i for i, part in enumerate(parts) if part.kind != "mlp"]
    width = 1 + max((part.index or 0 for part in parts), default=0) if width is None else width
    grid = on_grid([parts[i] for i in heads], values[heads], n_layers, width)
    return grid, on_grid([parts[i] for i in mlps], values[mlps], n_layers, 1)[:, 0]


def with_values(rows: Sequence[Row]) -> list[Row]:
    """Rows without the columns in which no row has a number: no interval of one prompt is no column of an interval."""
    empty = {key for key in (rows[0] if rows else ()) if all(_no_number(row.get(key)) for row in rows)} - {"value"}
    return [{key: cell for key, cell in row.items() if key not in empty} for row in rows]


def _no_number(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)


def _placed(value: Any) -> Any:
    """A part, or a channel between parts: what axis "part" may list."""
    between = isinstance(value, Channel) or (isinstance(value, str) and ">" in value)
    return parse_channel(value) if between else as_part(value)
