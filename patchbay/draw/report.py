"""Reports: what was measured, as sections that a terminal, a web page and a program can each show.

A Section holds sentences, tables, figures and data, made once from the numbers of a run. `page` writes sections as one HTML
file that needs nothing else: styles and figures (SVG) stand in it, no script runs, nothing is fetched. Computes nothing.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.errors import PatchbayError
from patchbay.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from patchbay.results import maps
    from patchbay.results.result import Result

MARKED = re.compile(r"\*\*(.+?)\*\*")  # **this** stands out
WIDE = 7.5  # inches, from which a figure takes the whole width of a page
INK, FAINT, GOOD, BAD, GREY = "#1f2933", "#9aa5b1", "#0072b2", "#d55e00", "#e4e7eb"


@dataclass(frozen=True)
class Table:
    """Rows under column names; cells are texts or numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    on_screen: int = 12  # rows that a terminal shows


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn when a page is made, and what it shows in words."""

    draw: Callable[[], Figure]
    caption: str


@dataclass
class Section:
    """One step of a report. In `text`, **two stars** make words stand out; `data` is for programs."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    verdict: bool | None = None  # a good or a bad end: set in colour
    maps: Sequence[maps.Map] = ()  # cells in colour, with their numbers


# --- HTML ---------------------------------------------------------------------------------------------


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    tiles: Sequence[tuple[str, str]] = (),
    foot: Sequence[str] = (),
) -> str:
    """A whole HTML document. `tiles` are the numbers to see first, each with what it is."""
    links = "".join(f'<a href="#s{i}">{_text(section.title)}</a>' for i, section in enumerate(sections, 1))
    body = "\n".join(_section(section, i) for i, section in enumerate(sections, 1))
    first = "".join(f"<div><b>{_text(big)}</b>{_text(what)}</div>" for big, what in tiles)
    first = f'<div class="tiles">{first}</div>' if tiles else ""
    small = "".join(f"<p>{_text(line)}</p>" for line in foot)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{_text(title)}</h1><p>{_text(lead)}</p>{first}<nav>{links}</nav></header>\n"
        f"<main>\n{body}\n</main>\n<footer>{small}</footer>\n</body>\n</html>\n"
    )


def check_place(path: str | Path) -> None:
    """Raise PatchbayError, before anything runs, where a page could not be written."""
    page = Path(path)
    place = next(parent for parent in page.absolute().parents if parent.exists())
    if page.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise PatchbayError(f"cannot write the report to {page}: give a file in a folder that can be written")
    if page.suffix.lower() not in (".html", ".htm"):
        raise PatchbayError(f"cannot write the report to {page}: the suffix is .html")


def write(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all; its folder is made where there is none."""
    return write_file(path, text.encode())


def _section(section: Section, number: int) -> str:
    mark = {True: ' class="good"', False: ' class="bad"', None: ""}[section.verdict]
    pieces = [f'<section id="s{number}"{mark}>', f"<h2><span>{number}</span>{_text(section.title)}</h2>"]
    pieces += [f"<p>{_text(line)}</p>" for line in section.text]
    shown = [*map(_picture, section.pictures), *map(_map, section.maps), *map(_table, section.tables)]
    pieces += ['<div class="shown">', *shown, "</div>"] if shown else []
    return "\n".join([*pieces, "</section>"])


def _picture(picture: Picture) -> str:
    from patchbay.draw.style import svg

    drawn = picture.draw()
    wide = ' class="wide"' if drawn.get_size_inches()[0] > WIDE else ""
    return f"<figure{wide}>{svg(drawn)}<figcaption>{_text(picture.caption)}</figcaption></figure>"


def _map(drawn: maps.Map) -> str:
    from patchbay.results import maps

    return f'<div class="table">{maps.as_html(drawn)}</div>'


def _table(table: Table) -> str:
    numeric = [
        all(isinstance(row[i], int | float) or row[i] == "" for row in table.rows) for i in range(len(table.columns))
    ]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{kind}>{_text(str(name))}</th>" for name, kind in zip(table.columns, kinds, strict=True))
    rows = [
        "".join(f"<td{kind or _whole(cell)}>{_text(number(cell))}</td>" for cell, kind in zip(row, kinds, strict=True))
        for row in table.rows
    ]
    title = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="table"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _whole(cell: Any) -> str:
    """A short text stays on one line, so that a token is not torn from its space."""
    return ' class="whole"' if len(str(cell)) <= 24 else ""


def number(cell: Any) -> str:
    """Four figures of a float; everything else as it is."""
    if not isinstance(cell, float):
        return str(cell)
    if not math.isfinite(cell):
        return "-"
    if cell and not 1e-3 <= abs(cell) < 1e5:
        return f"{cell:.3g}"
    return f"{cell:.{max(0, 3 - (math.floor(math.log10(abs(cell))) if abs(cell) >= 1 else 0))}f}"


def _text(text: str) -> str:
    """Escaped, with **marked** words strong."""
    return MARKED.sub(r"<b>\1</b>", html.escape(text)).replace("\n", "<br>")


STYLE = """
:root{--ink:#1f2933;--soft:#52606d;--line:#e4e7eb;--ground:#f5f7fa;--sheet:#fff;--accent:#0072b2;--bad:#b34700;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#a3b0bd;--line:#36424e;--ground:#11161b;--sheet:#1a2128;--accent:#5db4e6;--bad:#f0965a}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.01em;overflow-wrap:anywhere}
header p{color:var(--soft);margin:.2rem 0 1rem;max-width:46rem}
nav{display:flex;flex-wrap:wrap;gap:.4rem .5rem;margin-bottom:1.4rem}
nav a{color:var(--accent);text-decoration:none;background:var(--sheet);border:1px solid var(--line);border-radius:99px;padding:.1rem .8rem;font-size:.88rem}
nav a:hover{border-color:var(--accent)}
section{background:var(--sheet);border:1px solid var(--line);border-radius:12px;padding:1.3rem 1.5rem 1.1rem;margin:0 0 1.1rem}
section.good{border-left:5px solid var(--accent)}
section.bad{border-left:5px solid var(--bad)}
h2{font-size:1.2rem;margin:0 0 .6rem;display:flex;gap:.6rem;align-items:baseline}
h2 span{color:var(--accent);font-variant-numeric:tabular-nums}
section p{margin:.45rem 0;max-width:50rem;overflow-wrap:anywhere}
h2{overflow-wrap:anywhere;min-width:0}
.shown{display:flex;flex-wrap:wrap;gap:1rem 2.2rem;align-items:flex-start;margin:.9rem 0 .2rem}
figure{margin:0;width:29rem;max-width:100%}
figure.wide{width:100%}
figure svg{display:block;width:100%;height:auto;background:#fff;border-radius:6px}
figcaption{color:var(--soft);font-size:.86rem;line-height:1.4;margin-top:.2rem}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:0 0 1.2rem}
.tiles div{background:var(--sheet);border:1px solid var(--line);border-radius:12px;padding:.7rem 1rem;color:var(--soft);font-size:.86rem;flex:1 1 10rem;line-height:1.35}
.tiles b{display:block;color:var(--ink);font-size:1.3rem;white-space:nowrap;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.table{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.88rem}
caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
th{color:var(--soft);font-weight:600;text-align:left}
th,td{padding:.26rem .95rem .26rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
td.whole{white-space:nowrap}
table.map th,table.map td{padding:.26rem .6rem;white-space:nowrap}
table.map th:first-child{padding-left:0}
table.map th+th{text-align:right}
@media (max-width:30rem){header,main,footer{padding:0 .7rem}section{padding:1rem .9rem .8rem}h1{font-size:1.5rem}}
footer{color:var(--soft);font-size:.84rem;padding-bottom:3rem}
footer p{margin:.25rem 0;overflow-wrap:anywhere}
@media print{:root{color-scheme:light}body{background:#fff}section{break-inside:avoid;border-color:#bbb}}
"""


# --- figures that no single Result draws --------------------------------------------------------------


def _length(gap: float) -> float:
    """Of a whisker; none (NaN) where there is no interval."""
    return gap if gap != gap else max(0.0, gap)


def ablation_figure(result: Result) -> Figure:
    """What is lost without the parts, together and one by one, above a strip of the random draws."""
    labels = ["together", *(str(part) for part in result.parts or [])]
    values = [float(result["joint"]), *result["effect"].tolist()]
    lows = [float(result["joint_low"]), *result["low"].tolist()]
    highs = [float(result["joint_high"]), *result["high"].tolist()]
    draws = result["random"].tolist()
    drawn, axis = _axes((5.2, 0.9 + 0.34 * (len(labels) + 1)))
    places = range(len(labels))
    axis.barh(places, values, height=0.62, color=[GOOD] + ["#7fb8d8"] * (len(labels) - 1))
    ends = [[_length(v - low) for v, low in zip(values, lows, strict=True)],
            [_length(high - v) for v, high in zip(values, highs, strict=True)]]  # fmt: skip
    axis.errorbar(values, list(places), xerr=ends, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    row = len(labels)
    spread = [row + 0.22 * math.sin(2.4 * i) for i in range(len(draws))]  # apart, so that equal draws can be told
    axis.plot(draws, spread, "o", ms=4.5, color=BAD, alpha=0.6, mec="none")
    axis.set_yticks([*places, row], [*labels, f"{len(draws)} random draws"])
    axis.set_ylim(row + 0.6, -0.6)
    axis.axvline(0, color=INK, lw=0.8)
    axis.set_xlabel(f"lost without them ({result.unit})")
    axis.grid(axis="x", color=GREY, lw=0.7)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return drawn


@dataclass(frozen=True)
class Curve:
    """A line over strengths with its band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str = GOOD
    dashed: bool = False


def curves_figure(
    curves: Sequence[Curve], y_label: str, *, chosen: float | None = None, top: float | None = None
) -> Figure:
    """Lines with bands over a knob's strength; a dotted line at 1, where nothing is changed, and one at the chosen strength."""
    drawn, axis = _axes((5.2, 3.3))
    for curve in curves:
        style = "--" if curve.dashed else "-"
        axis.plot(
            curve.x,
            curve.y,
            style,
            color=curve.colour,
            lw=1.6 if curve.dashed else 2.2,
            marker="o",
            ms=3.5,
            label=curve.name,
        )
        if curve.low is not None and curve.high is not None:
            axis.fill_between(curve.x, curve.low, curve.high, color=curve.colour, alpha=0.16, lw=0)
    axis.axvline(1, color=FAINT, lw=1, ls=":")
    if chosen is not None:
        axis.axvline(chosen, color=INK, lw=1, ls=":")
        axis.annotate(
            "chosen", (chosen, 0.5), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8
        )
    axis.set_xlabel("strength (1 leaves the model as it is)")
    axis.set_ylabel(y_label)
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), top)
    axis.grid(axis="y", color=GREY, lw=0.7)
    axis.set_axisbelow(True)
    if len(curves) > 1:
        axis.legend(
            frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(3, len(curves))
        )
    return drawn


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from patchbay.draw.style import Shown

    drawn = Shown(figsize=size, layout="constrained")
    axis = drawn.add_subplot()
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(labelsize=8.5, colors=INK)
    return drawn, axis
