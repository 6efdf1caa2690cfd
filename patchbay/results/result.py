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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors.torch
from torch import Tensor

from patchbay.errors import by_kind
from patchbay.files import write_file, write_folder
from patchbay.late import late
from patchbay.results import printed
from patchbay.results.arrays import Arrays
from patchbay.results.dashboards import batch
from patchbay.results.graph_file import as_file, read_file
from patchbay.results.saved import FILES, FORMAT, VERSION, packed, read_saved, unpacked
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    import numpy
    from matplotlib.figure import Figure

    Array: TypeAlias = "Tensor | numpy.ndarray[Any, Any] | Sequence[Any] | float"


class Result(Arrays):
    """Labelled arrays with units, ranked parts and provenance.

    `values` is one array (then `axes`, `unit` and `name` are its own) or a dict from name to (array, axes, unit), the
    main variable first. `coords` names the steps of an axis (tokens of a position, strengths), `parts` those of axis
    "part". `tables` holds further tables (name -> rows), `notes` sentences to the reader, `highlights` parts to mark. `shown` names the
    tables that print in place of a ranking, in their order; a note that begins with such a name and ": " prints beneath its table.
    """

    # --- comparison -------------------------------------------------------------------------------

    @by_kind
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

    @by_kind
    def agrees(self, other: Result, atol: float = 0.0, *, rtol: float = 1e-5) -> bool:
        """Same variables, axes, units, labels and parts, and values equal within `atol + rtol * largest value`."""
        return not self.differences(other, atol=atol, rtol=rtol)

    @by_kind
    def equal(self, other: Result) -> bool:
        """Everything equal but the provenance (which holds the date): arrays to the last bit, NaN equal to NaN."""
        return (
            self.agrees(other, rtol=0.0)
            and [t.dtype for t in self._tensors.values()] == [t.dtype for t in other._tensors.values()]
            and all(
                packed(getattr(self, w)) == packed(getattr(other, w))
                for w in ("tables", "notes", "highlights", "shown")
            )
        )

    # --- print and plot ---------------------------------------------------------------------------

    @by_kind
    def plot(self, path: str | Path | None = None, *, graph: bool = False) -> Figure:
        """A figure of the main variable, or with `graph` of a circuit's edges; written to `path` (.png, .svg or .pdf) when given."""
        figure: Figure = late("figure")(self, graph=graph)
        if path is not None:
            late("save_figure")(figure, path)
        return figure

    def view(self) -> Any:
        """The Result as a widget of a notebook, to look at, point at and sort: the views of `patchbay ui`, without a server. Needs anywidget."""
        return late("view")(self)

    def save_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """The same as one file of HTML that holds everything and fetches nothing."""
        written: Path = late("save_html")(self, path, overwrite=overwrite)
        return written

    @by_kind
    def save_graph(self, path: str | Path, *, prompt: int = 0, overwrite: bool = False) -> Path:
        """Write one prompt's attribution graph as circuit-tracer's JSON, which its viewer opens and `pb.load_result` reads back."""
        return _write_json(path, as_file(self, prompt), overwrite)

    @by_kind
    def save_dashboards(self, path: str | Path, *, set_name: str = "patchbay", overwrite: bool = False) -> Path:
        """Write the contexts of features as a batch of Neuronpedia's; `set_name`: the set that they belong to there."""
        return _write_json(path, batch(self, set_name), overwrite)

    def origin(self) -> str:
        """One line on where the numbers came from."""
        return printed.origin(self)

    @by_kind
    def summary(self, n: int = 10) -> str:
        """The top rows, units, notes and provenance as plain text."""
        return printed.summary(self, n)

    def __str__(self) -> str:
        return self.summary()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return printed.as_html(self)

    # --- files ------------------------------------------------------------------------------------

    @by_kind
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


def _write_json(path: str | Path, held: dict[str, Any], overwrite: bool) -> Path:
    target = Path(path)
    if target.suffix != ".json" or (target.exists() and not overwrite):
        why = "is already there; overwrite=True replaces it" if target.suffix == ".json" else "does not end in .json"
        raise PatchbayError(f"{target} {why}: it is written as one JSON file")
    return write_file(target, (json.dumps(held, ensure_ascii=False, allow_nan=False) + "\n").encode())


def described(result: Result) -> dict[str, Any]:
    """A Result without its arrays, as data that `packed` takes."""
    return {
        "variables": [{"name": v, "axes": result.axes_of(v), "unit": result.units[v]} for v in result.variables],
        "coords": {axis: labels for axis, labels in result.coords.items() if axis != "part"},
        "parts": result.parts,
        "tables": result.tables,
        "notes": result.notes,
        "highlights": result.highlights,
        "shown": result.shown,
        "provenance": result.provenance,
    }


def from_described(record: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Result:
    """The Result that `described` was given, with its arrays by name."""
    variables = {v["name"]: (arrays[v["name"]], v["axes"], v["unit"]) for v in record["variables"]}
    fields = ("coords", "parts", "tables", "notes", "highlights", "provenance")
    return Result(variables, shown=record.get("shown", ()), **{field: record[field] for field in fields})


@by_kind
def load_result(folder: str | Path) -> Result:
    """Read a folder that `Result.save` wrote, or one of circuit-tracer's files, FILE.json. Runs nothing from it; refuses all but a whole,
    undamaged Result."""
    if str(folder).endswith(".json") and Path(folder).is_file():
        held = read_file(Path(folder))
        return Result(held.pop("values"), **held)
    record, arrays = read_saved(folder)
    try:
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
