"""Result: what every method returns. Labelled arrays, a ranked table of parts, units, and where the numbers came from.

The first variable is the main one. On the axes (layer, head), (layer, neuron), (layer, expert), (layer) or (part)
it ranks the parts (or channels between them), and each other variable on the same axes (`low`, `high`, `null_mean`, `p`, ...)
becomes a column. NaN means that a part has no value (it lacks the port, or was not measured): it is never ranked.

A Result is data: it compares, prints, saves and loads. On disk it is a folder of two files, `arrays.safetensors` and
`result.json` (no pickle), written whole or not at all. A rank says what the method measured, not what the model uses.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from patchbay.files import write_folder
from patchbay.late import late
from patchbay.results import printed
from patchbay.results.saved import packed, plain, unpacked
from patchbay.signal.channel import Channel, parse_channel
from patchbay.signal.port import AXES, Part, PatchbayError, as_part, suggest

if TYPE_CHECKING:
    import numpy
    import pandas
    import xarray
    from matplotlib.figure import Figure

    Array: TypeAlias = "Tensor | numpy.ndarray[Any, Any] | Sequence[Any] | float"

# axes that no signal has, each for one reason
MADE_AXES = {
    "part": "parts of several kinds, or a few of a grid, in one list",
    "strength": "how far a knob is turned",
    "n_parts": "how many parts are edited together",
    "draw": "repeats of a random control",
    "condition": "named cases side by side: chosen and random parts, clean and corrupted prompts",
    "statistic": "named summaries side by side that are no variables of their own",
    "token": "named tokens: the candidates of an answer, the most likely ones",
    "component": "singular components of a part's out-map, largest first",
    "writer": "parts, or pieces of parts, that write into the stream",
    "reader": "inputs of parts that read from the stream",
    "offset": "distances between a query and the key it looks at",
}
RANKED_GRIDS: dict[tuple[str, ...], str] = {("layer", kind): kind for kind in ("head", "neuron", "expert")} | {
    ("layer",): "layer"
}
FORMAT, VERSION = "patchbay-result", 1
FILES = ("arrays.safetensors", "result.json")
Row = dict[str, Any]


class Result:
    """Labelled arrays with units, ranked parts and provenance.

    `values` is one array (then `axes`, `unit` and `name` are its own) or a dict from name to (array, axes, unit), the
    main variable first. `coords` names the steps of an axis (tokens of a position, strengths), `parts` those of axis
    "part". `tables` holds further tables (name -> rows), `notes` sentences to the reader, `highlights` parts to mark.
    """

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
        return self.coords.get(axis) or list(range(self.sizes[axis]))

    def __getitem__(self, variable: str) -> Tensor:
        if variable not in self._tensors:
            known = self.variables
            raise PatchbayError(
                f"no variable {variable!r}; this Result has {', '.join(known)}" + suggest(variable, known)
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
        """Columns of `table`: rank, part, value, and the other variables on the same axes."""
        return ["rank", "part", "value", *self._beside()]

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
        """Rows of rank (from 1), part, value and the other variables on the same axes, highest first."""
        columns = {"value": self.name} | {name: name for name in self._beside()}
        flat = {column: self._tensors[name].flatten() for column, name in columns.items()}
        return [
            {"rank": i, "part": self._part(place)} | {column: values[place].item() for column, values in flat.items()}
            for i, place in enumerate(self._order(n, by, True), start=1)
        ]

    # --- comparison -------------------------------------------------------------------------------

    def differences(self, other: Result, *, atol: float = 0.0, rtol: float = 1e-5) -> list[str]:
        """What differs, in words; nothing when they agree. `rtol` is relative to the largest value of each variable."""
        if (self._axes, self.units) != (other._axes, other.units):
            return [
                f"variables differ: {printed.shapes(self, self.variables)} against {printed.shapes(other, other.variables)}"
            ]
        found = [
            f"{what} differ"
            for what in ("sizes", "coords", "parts")
            if packed(getattr(self, what)) != packed(getattr(other, what))
        ]
        for name in () if found else self.variables:
            ours, theirs = self[name].double(), other[name].double()
            scale = ours[ours.isfinite()].abs().max().item() if ours.isfinite().any() else 0.0
            gap = largest_difference(ours, theirs)
            if not gap <= atol + rtol * scale:
                found.append(f"{name} differs by up to {gap:.3g} where its largest value is {scale:.3g}")
        return found

    def agrees(self, other: Result, atol: float = 0.0, *, rtol: float = 1e-5) -> bool:
        """Same variables, axes, units, labels and parts, and values equal within `atol + rtol * largest value`."""
        return not self.differences(other, atol=atol, rtol=rtol)

    def equal(self, other: Result) -> bool:
        """Everything equal but the provenance (which holds the date): arrays to the last bit, NaN equal to NaN."""
        return (
            self.agrees(other, rtol=0.0)
            and [t.dtype for t in self._tensors.values()] == [t.dtype for t in other._tensors.values()]
            and all(packed(getattr(self, w)) == packed(getattr(other, w)) for w in ("tables", "notes", "highlights"))
        )

    # --- print and plot ---------------------------------------------------------------------------

    def plot(self, path: str | Path | None = None, *, graph: bool = False) -> Figure:
        """A figure of the main variable, or with `graph` of a circuit's edges; written to `path` (.png, .svg or .pdf) when given."""
        figure: Figure = late("figure")(self, graph=graph)
        if path is not None:
            late("save_figure")(figure, path)
        return figure

    def origin(self) -> str:
        """One line on where the numbers came from."""
        return printed.origin(self)

    def summary(self, n: int = 10) -> str:
        """The top rows, units, notes and provenance as plain text."""
        return printed.summary(self, n)

    def __str__(self) -> str:
        return self.summary()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return printed.as_html(self)

    # --- files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the Result as a folder, whole or not at all; one that is already there stays unless `overwrite`."""
        target = Path(os.path.realpath(folder))
        _refuse_to_replace(target, overwrite)
        arrays = safetensors.torch.save(self._tensors)
        record = {"format": FORMAT, "version": VERSION, "arrays_sha256": hashlib.sha256(arrays).hexdigest()}
        record |= described(self)
        text = json.dumps(packed(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_folder(target, dict(zip(FILES, (arrays, text.encode()), strict=True)))
        return target


def described(result: Result) -> dict[str, Any]:
    """A Result without its arrays, as data that `packed` takes."""
    return {
        "variables": [{"name": v, "axes": result.axes_of(v), "unit": result.units[v]} for v in result.variables],
        "coords": {axis: labels for axis, labels in result.coords.items() if axis != "part"},
        "parts": result.parts,
        "tables": result.tables,
        "notes": result.notes,
        "highlights": result.highlights,
        "provenance": result.provenance,
    }


def from_described(record: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Result:
    """The Result that `described` was given, with its arrays by name."""
    variables = {v["name"]: (arrays[v["name"]], v["axes"], v["unit"]) for v in record["variables"]}
    fields = ("coords", "parts", "tables", "notes", "highlights", "provenance")
    return Result(variables, **{field: record[field] for field in fields})


def load_result(folder: str | Path) -> Result:
    """Read a folder that `Result.save` wrote. Runs nothing from it; refuses all but a whole, undamaged Result."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PatchbayError(
            f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}: no Result to load"
        )
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise PatchbayError(f"{folder} is not a saved Result: it lacks {' and '.join(missing)}; it holds {found}")
    try:
        record = json.loads((folder / FILES[1]).read_bytes())
        marker, version = record["format"], record["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PatchbayError(f"{folder}: result.json is damaged or no Patchbay file ({error!r})") from error
    if marker != FORMAT:
        raise PatchbayError(f"{folder} holds {marker!r}, not {FORMAT!r}")
    if version != VERSION:
        raise PatchbayError(
            f"{folder} has format version {version!r}; this Patchbay reads version {VERSION}: update it"
        )
    try:
        arrays = (folder / FILES[0]).read_bytes()
        if hashlib.sha256(arrays).hexdigest() != record["arrays_sha256"]:
            raise PatchbayError(f"arrays.safetensors is truncated or altered ({len(arrays)} bytes, checksum differs)")
        tensors = safetensors.torch.load(arrays)
        record = unpacked(record)
        arrays_of = {variable["name"]: tensors.pop(variable["name"]) for variable in record["variables"]}
        if tensors:
            raise PatchbayError(f"arrays without an entry in result.json: {', '.join(tensors)}")
        return from_described(record, arrays_of)
    except Exception as error:  # whatever a damaged file leads to
        reason = str(error) if isinstance(error, PatchbayError) else repr(error)
        raise PatchbayError(f"{folder} is a damaged Result: {reason}") from error


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference. NaN equals NaN, an infinity itself; against others they are infinitely far."""
    a, b = a.double(), b.double()
    gap = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    return gap.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if gap.numel() else 0.0


# --- parts -------------------------------------------------------------------------------------


def _placed(value: Any) -> Any:
    """A part, or a channel between parts: what axis "part" may list."""
    between = isinstance(value, Channel) or (isinstance(value, str) and ">" in value)
    return parse_channel(value) if between else as_part(value)


# --- folders ----------------------------------------------------------------------------------------


def _refuse_to_replace(target: Path, overwrite: bool) -> None:
    """Raise unless `target` is free, or holds nothing but a Result that may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise PatchbayError(f"{target} is a file; a Result is saved as a folder")
    found = sorted(path.name for path in target.iterdir())
    if found and not overwrite:
        raise PatchbayError(
            f"{target} is already there and holds {', '.join(found[:5])}; overwrite=True replaces a Result"
        )
    others = [name for name in found if name not in FILES]
    if others:
        raise PatchbayError(
            f"{target} also holds {', '.join(others[:5])}: only a folder with nothing but a Result is replaced"
        )
    if found and FORMAT.encode() not in b"".join(p.read_bytes() for p in target.glob("result.json")):
        raise PatchbayError(f"{target} holds {', '.join(found)}, which Patchbay did not write: not replaced")
