"""How every figure looks: colours, type, the empty axis with its title, and how it is written. No window, no global state."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from patchbay.errors import PatchbayError
from patchbay.files import write_file
from patchbay.results.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GREY = "#1f2933", "#9aa5b1", "#d9dee4"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")  # Okabe and Ito
DIVERGING, SEQUENTIAL = "RdBu", "viridis"
DATES = {"svg": "Date", "pdf": "CreationDate"}  # left out: the same Result gives the same file
WRITTEN = {  # methods that their papers write otherwise than with one capital in front; the page has the same (web/src/data.ts)
    "acdc": "ACDC",
    "atp_star": "AtP*",
    "das": "DAS",
    "dexperts": "DExperts",
    "dola": "DoLa",
    "knn": "kNN-LM",
    "knn_parts": "kNN-LM by parts",
    "longheads": "LongHeads",
}
SUFFIXES = (".png", ".svg", ".pdf")
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a token may be a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "patchbay",
}


class Shown(Figure):
    """A figure that a notebook shows as the last line of a cell, whatever has been imported; no window, no global state."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        with style():
            self.savefig(content, format="png", dpi=110)
        return content.getvalue()


def svg(drawn: Figure) -> str:
    """The figure as an `<svg>` element to set into HTML; text stays text."""
    text = StringIO()
    with style():
        drawn.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def save(drawn: Figure, path: str | Path) -> Path:
    """Write the figure as .png, .svg or .pdf, by the suffix; a file that cannot be written whole is not written."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise PatchbayError(f"cannot draw to {path.name!r}: the suffix is one of {', '.join(SUFFIXES)}")
    content = BytesIO()
    kind = path.suffix.lower()[1:]
    undated: dict[str, Any] = {"metadata": {key: None}} if (key := DATES.get(kind)) else {}
    with style():
        drawn.savefig(content, format=kind, dpi=200, **undated)
    write_file(path, content.getvalue())
    return path


@contextmanager
def style() -> Iterator[None]:
    with rc_context(cast("Any", STYLE)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a token in a script that no font here has
        yield


def blank(size: tuple[float, float], result: Result) -> tuple[Figure, Axes]:
    drawn = Shown(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axis = drawn.add_subplot()
    title = str(result.provenance.get("method", "")).rpartition(".")[2] or result.name
    source = Path(str((result.provenance.get("model") or {}).get("source") or "")).name
    task = (result.provenance.get("task") or {}).get("name")
    under = ", ".join(str(piece) for piece in (source, task and words(task)) if piece)
    axis.set_title(spoken(title), pad=19 if under else 8)
    if under:
        at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axis.annotate(textwrap.shorten(under, 70), (0, 1), (0, 6), color="#616e7c", fontsize=8, **at)
    return drawn, axis


def spoken(method: str) -> str:
    """A method's name as a title: as its paper writes it, else its words with a capital in front."""
    said = words(method)
    return WRITTEN.get(method, said[:1].upper() + said[1:])


def words(name: str) -> str:
    """A name as people read it, of an axis, a number or a task."""
    return re.sub(r"(?<![a-z])n_parts", "number of parts", name).replace("_", " ")


def quantity(result: Result) -> str:
    """`score (attention)`; the unit alone where the name says no more."""
    name = words(result.name)
    return name if result.unit in ("", name) else f"{name} ({result.unit})"
