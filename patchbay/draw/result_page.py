"""What a method returned as one page of HTML: the figure, the map, the table, what else it holds, notes, and where it came from.

A Result is a section, a knob one for what it does and one for each Result of its evidence. What is drawn and listed is what the
Result holds; computes nothing. All text is escaped and nothing is fetched; see `report.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from patchbay.draw import plot, plot_circuit, plot_compare, plot_effects, report
from patchbay.draw.report import Picture, Section, Table
from patchbay.results import letters, maps, printed
from patchbay.results.result import Result

ROWS = 60  # of any further table


def page_of(returned: Any, n: int = 20) -> str:
    """The page of a Result, or of a knob with its evidence; `n` rows of a ranking."""
    record = dict(returned.provenance)
    method = str(record.get("method") or type(returned).__name__)
    if isinstance(returned, Result) and returned.shown:
        sections, lead = _own_figure(returned) + of_shown(returned), _asked(returned)
    elif isinstance(returned, Result):
        sections, lead = [of_result(returned, n), *_tables(returned, n)], printed.title(returned)
    else:
        lead = f"{returned.name} at strength {returned.strength:g}, neutral at {returned.neutral:g}"
        edits = [f"{edit}" for edit in returned.edits]
        said = [*edits[:n], *([f"and {len(edits) - n} more edits"] if len(edits) > n else [])]
        sections = [Section("What it does", said)]
        for name, result in returned.evidence.items():
            held = of_result(result, n)
            sections.append(Section(f"{name}: {held.title}", held.text, held.tables, held.pictures, maps=held.maps))
    return report.page(
        method.removeprefix("stories."),
        lead,
        [*sections, _whence(record)],
        foot=[f"Made by patchbay. {printed.origin(returned)}"],
    )


def _asked(result: Result) -> str:
    """What a Result that shows tables was asked: its text where it was one, else its task."""
    record = result.provenance
    text = next(iter((record.get("options") or {}).values()), None)
    if isinstance(text, str):
        return printed.short(text)
    return str((record.get("task") or {}).get("name") or printed.title(result))


def of_result(result: Result, n: int = 20) -> Section:
    """Any Result as a section: its figure where it has one, its map or ranked table, notes and origin."""
    text = [f"{result.name} in {result.unit or 'no unit'}", *result.notes, result.origin()]
    pictures = []
    if plot.drawable(result):
        caption = f"{result.name} by {', '.join(result.axes)}"
        caption = plot_effects.CAPTION if plot_effects.is_effects(result) else caption
        pictures.append(Picture(partial(plot.figure, result), caption))
    if any(" -> " in str(row.get("unit")) for row in result.tables.get("circuit", [])):
        pictures.append(Picture(partial(plot_circuit.circuit, result), "the circuit's first edges"))
    drawn = None if {"effects", "texts"} & set(result.tables) else maps.map_of(result)
    grid = [drawn] if drawn is not None and len(drawn.columns) <= 64 else []
    return Section(str(result.provenance.get("method", "Result")), text, _numbers(result, n), pictures, maps=grid)


def _own_figure(result: Result) -> list[Section]:
    """The figure of a Result that shows tables, where it has one of its own."""
    if not plot_compare.is_comparison(result):
        return []
    return [Section("effect and cost", [], pictures=[Picture(partial(plot.figure, result), plot_compare.CAPTION)])]


def of_shown(result: Result) -> list[Section]:
    """The tables that a Result shows, each as a section with its sentences, and the notes that belong to none."""
    held = sorted(
        result.sections(), key=lambda section: section[0] != "in short"
    )  # a page begins with what it comes to
    made = [Section(name, said, [_of_rows(rows)] if rows else []) for name, rows, said in held]
    return made + ([Section("Notes", result.other_notes)] if result.other_notes else [])


def _numbers(result: Result, n: int) -> list[Table]:
    """The ranked parts, the steps of one axis, or the strongest cells; and the single numbers."""
    found = []
    if result.ranked:
        measured, rows = int((~result.values.isnan()).sum()), result.told(n)
        found.append(_of_rows(rows, f"{len(rows)} of {measured} parts" if measured > len(rows) else ""))
    elif len(result.axes) == 1:
        columns, steps, left = printed.shown(result, n)
        found.append(Table(columns, steps, left))
    elif len(result.axes) > 1 and not {"effects", "texts"} & set(result.tables):
        found.append(Table(["cell", result.name], [*maps.strongest(result, n)], "the largest cells, either sign"))
    single = [name for name in result.variables if not result.axes_of(name)]
    if single:
        found.append(
            Table(["single number", "value", "unit"], [[v, result[v].item(), result.units[v]] for v in single])
        )
    return found


def _of_rows(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["part"]
    return Table(columns, [[_said(row.get(key, "")) for key in columns] for row in rows], title)


def _said(cell: Any) -> Any:
    if cell is None:
        return ""
    if isinstance(cell, list | tuple):
        return ", ".join(letters.visible(one) for one in cell)
    return cell if isinstance(cell, int | float) else letters.visible(cell, 60)


def _tables(result: Result, n: int) -> list[Section]:
    """The further tables that a Result holds, one section for all; not the one whose rows stand in its own section."""
    there = ["cells", "tokens"]
    if len(result.axes) == 1 and not result.ranked:
        name, told = printed.table_of(result), printed.shown(result, n)[1]
        there += [name] if len(told) >= min(ROWS, len(result.tables.get(name, []))) else []
    held = {name: rows for name, rows in result.tables.items() if rows and name not in there}
    tables = []
    for name, rows in held.items():
        left = f"{name}: the first {ROWS} of {len(rows)} rows" if len(rows) > ROWS else name
        tables.append(_of_rows(rows[:ROWS], left))
    return [Section("Further tables", [], tables)] if tables else []


def _whence(record: Mapping[str, Any]) -> Section:
    """Where the numbers came from, as rows of a name and a value."""
    rows = []
    for key, value in record.items():
        if key == "task" and isinstance(value, Mapping):
            prompts = value.get("clean") or value.get("prompts") or ()
            value = {k: value[k] for k in ("name", "metric", "seed", "options") if k in value} | {
                "prompts": len(prompts)
            }
        pieces = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{key} {name}".strip(), printed.short(piece)] for name, piece in pieces]
    return Section(
        "Where the numbers came from", [] if rows else ["made by hand"], [Table(["", ""], rows)] if rows else []
    )
