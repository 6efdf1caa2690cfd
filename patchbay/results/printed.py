"""How a Result prints: its best rows as a table in text or HTML, with units, notes and where the numbers came from."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from patchbay.model.carried import said
from patchbay.results import maps
from patchbay.results.arrays import Arrays
from patchbay.tasks.scoring import COMPARED


def origin(result: Arrays) -> str:
    """One line on where the numbers came from."""
    known, pieces = result.provenance, []
    if model := known.get("model"):
        details = ", ".join(model_details(model))
        pieces.append(f"{model.get('source')}" + (f" ({details})" if details else ""))
    for side in ("first", "second"):  # of a difference
        if isinstance(known.get(side), Mapping):
            of = known[side].get("model") or {}
            said_of = ", ".join(str(one) for one in [of.get("source"), str(of.get("fingerprint") or "")[:12]] if one)
            pieces.append(f"{side}: {known[side].get('method') or 'made by hand'} on {said_of or 'no model'}")
    if task := known.get("task"):
        pieces.append(f"task {task.get('name', 'prompts')}" + "".join(_task_options(task)))
        pieces += [
            f"{name}: {COMPARED[name]}" for name in [task.get("metric")] if isinstance(name, str) and name in COMPARED
        ]
    if template := known.get("chat_template_sha256"):
        pieces.append(f"chat template {template}")
    pieces += [
        f"{key}={value}"
        for key, value in known.get("options", {}).items()
        if value is not None and len(str(value)) <= 40
    ]
    if (seconds := known.get("wall_time_s")) is not None:
        pieces.append(f"{seconds:.2f} s")
    return " · ".join(pieces) or "no provenance: made by hand"


def model_details(model: Mapping[str, Any]) -> list[str]:
    """What is recorded of a model, in words: family, dtype, fingerprint, quantisation, adapters, edits that were in force."""
    plain = [model.get("family"), model.get("dtype"), model.get("fingerprint")]
    edits = model.get("edits") or []
    under = f"under {len(edits)} edit{'s' * (len(edits) > 1)}: {short(', '.join(map(str, edits)))}"
    return [str(one) for one in plain if one] + said(model) + ([under] if edits else [])


def summary(result: Arrays, n: int = 10) -> str:
    """The top rows, or the tables that the Result shows; units, notes and provenance as plain text."""
    notes = [f"note: {note}" for note in result.other_notes]
    if result.shown:
        body = [line for section in result.sections() for line in section_lines(*section)]
        return "\n".join([*body, *(f"  {line}" for line in (*notes, origin(result)))])
    columns, rows, left = shown(result, n)
    below = [f"({left})" if left else "", _scalars(result), *notes, origin(result)]
    drawn = [f"  {line}" for line in map_lines(result, n)]
    return "\n".join([title(result), *_text_table(columns, rows), *drawn, *(f"  {line}" for line in below if line)])


def section_lines(name: str, rows: Sequence[Mapping[str, Any]], said: Sequence[str]) -> list[str]:
    """One of the tables that a Result shows, with the sentences that belong to it."""
    table = _text_table(*_table_of(rows)) if rows else []
    return [name, *table, *(f"  {line}" for line in said), ""]


def map_lines(result: Arrays, n: int = 10, width: int = maps.WIDE) -> list[str]:
    """The cells of a Result that ranks no parts: its map, or where that is too large, or has more axes, the strongest cells."""
    if result.ranked or {"effects", "texts"} & set(result.tables) or len(result.axes) < 2 or result.values.numel() < 2:
        return []
    drawn = maps.map_of(result)
    if drawn is not None:
        return ["", *maps.lines(drawn, width), ""]
    found = maps.strongest(result, n)
    head = f"the {len(found)} largest of {int((~result.values.isnan()).sum())} cells, either sign:"
    numbers = _numbers([value for _, value in found])
    return (
        [head, *(f"  {number:>10}  {place}" for number, (place, _) in zip(numbers, found, strict=True))]
        if found
        else []
    )


def title(result: Arrays) -> str:
    """The method, the main variable and the ones on other axes."""
    shown = [
        v for v in result.variables if v == result.name or (result.axes_of(v) and result.axes_of(v) != result.axes)
    ]
    return f"{result.provenance.get('method', 'Result')}: {shapes(result, shown)}"


def _scalars(result: Arrays) -> str:
    """The variables that are single numbers, but the main one; each with its ends where it has them."""
    alone = {v: result[v].item() for v in result.variables[1:] if not result.axes_of(v) and not result[v].isnan()}
    ends = {v: [alone.get(f"{v}_{end}") for end in ("low", "high")] for v in alone}
    ends = {v: pair for v, pair in ends.items() if None not in pair}
    hidden = {f"{v}_{end}" for v in ends for end in ("low", "high")}
    between = {v: f" ({low:.4g} to {high:.4g})" for v, (low, high) in ends.items()}
    told = [f"{v} {x:.4g}{between.get(v, '')} {result.units[v]}" for v, x in alone.items() if v not in hidden]
    return " · ".join(line.rstrip() for line in told)


def _units(result: Arrays, columns: Sequence[str]) -> str:
    """`effect in logits, loss in nats per token`, of the columns that are variables of the Result."""
    known = {column: result.units[name] for column in columns if (name := column.lower()) in result.variables}
    return ", ".join(f"{column} in {unit}" for column, unit in known.items() if unit)


def table_of(result: Arrays) -> str:
    """The table whose rows are printed in place of a Result's variables, or nothing."""
    return next((name for name in ("dose", "meters", "texts") if result.tables.get(name)), "")


def shown(result: Arrays, n: int) -> tuple[list[str], list[list[Any]], str]:
    """Columns and rows to print, and a word on what they leave out."""
    if result.ranked:
        return _ranked_rows(result, n)
    if held := table_of(result):
        table = result.tables[held]
        first = table[: 4 * n] if held == "texts" else table
        cut = f"{len(first)} of {len(table)} texts; " if len(first) < len(table) else ""
        return list(table[0]), [list(row.values()) for row in first], cut + _units(result, list(table[0]))
    if len(result.axes) == 1:
        beside = [name for name in result.columns[3:] if not result[name].isnan().all()]
        columns = [result.axes[0], result.name, *beside]
        steps = list(zip(result.labels_of(result.axes[0]), *(result[v].tolist() for v in columns[1:]), strict=True))
        left = f"{4 * n} of {len(steps)} steps" if len(steps) > 4 * n else ""
        return columns, [list(step) for step in steps[: 4 * n]], left
    if ranking := result.tables.get("effects"):
        left = f"{n} of {result.sizes[result.axes[0]]}, largest effect first, either sign" if len(ranking) > n else ""
        return list(ranking[0]), [list(row.values()) for row in ranking[:n]], left
    arrays = [
        name
        for name in result.variables
        if name == result.name or (result.axes_of(name) and not result[name].isnan().all())
    ]
    rows = [[name, *_numbers(_range(result[name]))] for name in arrays]  # a row has one unit, a column many
    return ["variable", "lowest", "mean", "highest"], rows, ""


def _ranked_rows(result: Arrays, n: int) -> tuple[list[str], list[list[Any]], str]:
    rows = result.told(n)
    for row in rows:
        row["part"] = f"{row['part']}{' *' if row['part'] in result.highlights else ''}"
    empty = int(result.values.isnan().sum())
    total = result.values.numel() - empty
    left = [f"{len(rows)} of {total} parts"] if total > len(rows) else []
    left += [f"{empty} without a value"] if empty else []
    return list(rows[0]) if rows else result.columns, [list(row.values()) for row in rows], ", ".join(left)


def as_html(result: Arrays) -> str:
    """The same as tables for a notebook."""
    if result.shown:
        body = "".join(_html_table(name, *_table_of(rows), said) for name, rows, said in result.sections())
        return f"<div>{body}{_small([*result.other_notes, origin(result)])}</div>"
    columns, rows, left = shown(result, 10)
    small = [left, _scalars(result), *(f"note: {note}" for note in result.notes), origin(result)]
    drawn = None if {"effects", "texts"} & set(result.tables) else maps.map_of(result)
    cells = maps.as_html(drawn) if drawn is not None and not (result.ranked and len(drawn.columns) > 32) else ""
    if not cells and (listed := map_lines(result)):
        cells = f"<pre>{html.escape(chr(10).join(listed))}</pre>"
    return f"<div>{_html_table(title(result), columns, rows, small, cells)}</div>"


def _table_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    return list(rows[0]) if rows else [], [list(row.values()) for row in rows]


def _html_table(name: str, columns: list[str], rows: list[list[Any]], small: Sequence[str], above: str = "") -> str:
    lines = _cells(columns, rows)
    named = [any(line[i] and not _is_number(line[i]) for line in lines) for i in range(len(columns))]
    sides = [f' style="text-align:{"left" if text else "right"}"' for text in named]  # notebooks set all to the right
    head = "".join(f"<th{side}>{html.escape(cell)}</th>" for cell, side in zip(columns, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{html.escape(c)}</td>" for c, side in zip(line, sides, strict=True)) + "</tr>"
        for line in lines
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if columns else "<br>"
    return f"<b>{html.escape(name)}</b>{above}{table}{_small(small)}"


def _small(lines: Sequence[str]) -> str:
    return f"<small>{'<br>'.join(html.escape(line) for line in lines if line)}</small>"


# --- text -------------------------------------------------------------------------------------------


def shapes(result: Arrays, names: Sequence[str]) -> str:
    """`score [layer 2, head 4] in attention; mlp [layer 2] in logits`."""
    pieces = []
    for name in names:
        axes = ", ".join(f"{axis} {result.sizes[axis]}" for axis in result.axes_of(name))
        unit = result.units[name]
        pieces.append(name + (f" [{axes}]" if axes else "") + (f" in {unit}" if unit else ""))
    return "; ".join(pieces)


def _task_options(task: Mapping[str, Any]) -> list[str]:
    options = task.get("options") if isinstance(task.get("options"), Mapping) else {}
    shown = {**(options or {}), "seed": task.get("seed")}
    return [f" {key}={value}" for key, value in shown.items() if isinstance(value, (int, float, str, bool))]


def short(value: Any) -> str:
    """A value on one line of at most 80 letters."""
    text = re.sub(r"\s+", " ", str(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _range(tensor: Tensor) -> list[float]:
    finite = tensor.double()[tensor.double().isfinite()]
    return [finite.min().item(), finite.mean().item(), finite.max().item()] if len(finite) else [math.nan] * 3


def _numbers(column: list[float]) -> list[str]:
    """One format for a column: about four figures of its largest, or powers of ten where that hides the small."""
    sizes = [abs(x) for x in column if math.isfinite(x) and x]
    if not sizes:
        return [f"{x:g}" for x in column]
    if max(sizes) >= 1e6 or max(sizes) < 1e-3 or (max(sizes) <= 1 and min(sizes) < 1e-4 <= max(sizes) / 100):
        return [f"{x:.3g}" for x in column]
    decimals = max(0, 3 - math.floor(math.log10(max(sizes))))
    return [f"{x:.{decimals}f}" for x in column]


def _cells(columns: list[str], rows: list[list[Any]]) -> list[list[str]]:
    texts = []
    for column in zip(*rows, strict=True) if rows else [[] for _ in columns]:
        known = [cell for cell in column if cell is not None]  # a cell without a value is empty
        is_float = bool(known) and all(isinstance(cell, float) for cell in known)
        told = iter(_numbers(known) if is_float else (str(cell).replace("\n", "\\n") for cell in known))
        texts.append(["" if cell is None else next(told) for cell in column])
    return [list(line) for line in zip(*texts, strict=True)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text_table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of a table with numbers to the right and names to the left."""
    lines = [columns, *_cells(columns, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    left = [any(line[i] and not _is_number(line[i]) for line in lines[1:]) for i in range(len(columns))]
    return [
        "  "
        + "  ".join(
            c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    ]
