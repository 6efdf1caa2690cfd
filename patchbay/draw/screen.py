"""What the command line prints: tables for people, JSON for programs, progress for whoever waits at a terminal.

Answers go to stdout; progress and errors to stderr. Progress falls silent where stderr is no terminal, and with `--json`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from patchbay.draw.coloured import DIM
from patchbay.draw.report import MARKED, number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from patchbay.draw.report import Section
    from patchbay.results.result import Result

BAR, WIDE = 16, 120
ACCENT, GOOD, BAD = "bold cyan", "green", "red"


def console(*, err: bool = False) -> Console:
    """A terminal's own width; 120 columns elsewhere, so that tables in files and pipes are not squeezed."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    made = Console(stderr=err, highlight=False, soft_wrap=False, emoji=False)
    return made if stream.isatty() else Console(stderr=err, highlight=False, width=WIDE, emoji=False)


def say(*renderables: RenderableType | str) -> None:
    """Print to stdout; texts are taken as rich markup."""
    out = console()
    for item in renderables:
        out.print(item)


def emit(value: Any) -> None:
    """Print one JSON document; what is not a number becomes null."""
    whole = (
        "utf" in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    )  # elsewhere letters are escaped, not lost
    sys.stdout.write(json.dumps(plain(value), indent=1, ensure_ascii=not whole, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """JSON's own types: NaN and infinities as null, tensors as lists, Parts and Ports as their text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "") -> Table:
    """A table with numbers to the right. Cells are texts (rich markup) or numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left",
                 title_style="bold", header_style=DIM, pad_edge=False)  # fmt: skip
    for i, name in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) or row[i] == "" for row in rows)
        made.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        made.add_row(*(number(cell) for cell in row))
    return made


def bar(value: float, largest: float, *, signed: bool = False) -> str:
    """A horizontal bar, blue above 0 and red below, scaled to the largest absolute value; `signed`: with its sign before it."""
    if not (math.isfinite(value) and largest > 0):
        return ""
    eighths = round(8 * BAR * min(1.0, abs(value) / largest))
    blocks = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    sign = ("-" if value < 0 else "+") if signed else ""
    return f"[{'blue' if value >= 0 else 'red'}]{sign}{blocks}[/]"


def share(value: float) -> str:
    """A share of prompts as a percentage."""
    return f"{100 * value:.0f} %" if math.isfinite(value) else "-"


def shown(title: str, rows: Sequence[Mapping[str, Any]], said: Sequence[str]) -> list[RenderableType | str]:
    """One of the tables that a Result shows, with its sentences beneath."""
    from rich.markup import escape

    cells = [["" if c is None else escape(c) if isinstance(c, str) else c for c in row.values()] for row in rows]
    head = table(escape(title), list(rows[0]), cells) if rows else f"[bold]{escape(title)}[/]"
    return ["", head, *map(escape, said)]


def result_json(result: Result, n: int | None = None) -> dict[str, Any]:
    """A Result as plain data: every variable with axes, unit and values, the ranked table, notes, provenance.

    The prompts of the task are counted, not listed; the saved folder (`--out`) holds them.
    """
    provenance = dict(result.provenance)
    if isinstance(task := provenance.get("task"), Mapping):
        prompts = task.get("clean") or task.get("prompts") or ()
        kept = {key: task[key] for key in ("name", "metric", "seed", "options") if key in task}
        provenance["task"] = kept | {"prompts": len(prompts)}
    return {
        "method": result.provenance.get("method"),
        "name": result.name,
        "unit": result.unit,
        "table": result.table(n) if result.ranked else None,
        "variables": {
            v: {"axes": result.axes_of(v), "unit": result.units[v], "values": result[v]} for v in result.variables
        },
        "coords": result.coords,
        "tables": result.tables,
        "notes": result.notes,
        "provenance": provenance,
    }


def sections(section: Section, place: int) -> list[RenderableType | str]:
    """A section of a report for the terminal: heading, sentences, the first rows of its tables."""
    from rich.markup import escape

    def marked(text: str) -> str:
        return MARKED.sub(r"[bold]\1[/]", escape(text))

    colour = {True: f"bold {GOOD}", False: f"bold {BAD}", None: ACCENT}[section.verdict]
    lines: list[RenderableType | str] = [f"\n[{colour}]{place}  {escape(section.title)}[/]", *map(marked, section.text)]
    for held in section.tables:
        cells = [[marked(c) if isinstance(c, str) else c for c in row] for row in held.rows[: held.on_screen]]
        left = f"{len(cells)} of {len(held.rows)} rows" if len(held.rows) > len(cells) else ""
        lines.append(table(held.title, held.columns, cells, caption=left))
    return lines


# --- models and parts ---------------------------------------------------------------------------------


def model_lines(card: Mapping[str, Any]) -> list[RenderableType | str]:
    """`show MODEL` for the terminal: layers of one shape share a row."""
    from rich.markup import escape

    check, rows = card["check"], []
    same: list[dict[str, Any]] = []
    for layer in [*card["layers"], None]:
        if same and (layer is None or {**layer, "layer": 0} != {**same[0], "layer": 0}):
            first, last = same[0], same[-1]
            name = f"L{first['layer']}" + (f" - L{last['layer']}" if last is not first else "")
            rows.append([name, *(first[key] or "" for key in ("heads", "groups", "d_head", "neurons", "experts")),
                         " ".join(first["signals"])])  # fmt: skip
            same = []
        same = [*same, layer] if layer is not None else same
    verdict = f"[{GOOD}]passed[/]" if check["passed"] else f"[{BAD}]failed[/]"
    return [
        f"[{ACCENT}]{escape(str(card['source'] or card['model_type']))}[/]  family {card['family']} ({card['model_type']}), "
        f"{card['parameters']:,} parameters, d_model {card['d_model']}, vocab {card['vocab']}, {card['dtype']} on {card['device']}"
        + "".join(f", {escape(piece)}" for piece in card["carried"]),
        f"self-check {verdict}: parts sum to the final stream within {check['stream']:.1e}, norm and unembedding give the "
        f"logits within {check['logits']:.1e}, heads sum to attention out within {check['heads']:.1e} "
        f"[{DIM}](tolerance {check['tolerance']:.0e}; weights {card['fingerprint']})[/]",
        table("", ("layers", "heads", "k/v groups", "d_head", "neurons", "experts", "signals"), rows),
    ]


def card_lines(
    title: str, sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]
) -> list[RenderableType | str]:
    """`show MODEL PART` for the terminal: its ports, what it reads and writes as tokens, contexts and roles."""
    made: list[RenderableType | str] = []
    for i, (name, columns, rows) in enumerate(sections):
        cells = [[escaped(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
        made.append(table(escaped(title if i == 0 else name), columns, cells))
    return made


def families_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Families, how many statements of each were checked, the ports it offers, and what failed."""
    from rich.markup import escape

    cells = [
        [
            str(row["family"]),
            f"[{GOOD}]yes[/]" if row["verified"] else f"[{BAD}]no[/]",
            row.get("checks", ""),
            " ".join(map(str, row["ports"])) + "".join(f"\n[{BAD}]{escape(str(error))}[/]" for error in row["errors"]),
        ]
        for row in rows
    ]
    return table("families", ("family", "verified", "checks", "ports"), cells)


def side_by_side(
    rows: Sequence[Mapping[str, str]], edits: Sequence[str], *, changed: bool
) -> list[RenderableType | str]:
    """Generations: the prompt dim, what follows it bright; before and after in two columns."""
    from rich.markup import escape

    def shown(row: Mapping[str, str], name: str) -> str:
        text = row[name]
        same = text.startswith(row["prompt"])
        return (
            f"[{DIM}]{escape(row['prompt'])}[/][bold]{escape(text[len(row['prompt']) :])}[/]" if same else escape(text)
        )

    if not changed:
        return [shown(row, "before") for row in rows]
    made = table("", ("before", "after"), [[shown(row, "before"), shown(row, "after")] for row in rows])
    return [f"[{DIM}]after: {escape(', '.join(edits) or 'no edits: the knob is at its neutral strength')}[/]", made]


@contextmanager
def growing(
    rows: Sequence[Mapping[str, str]], edits: Sequence[str], *, changed: bool, quiet: bool = False
) -> Iterator[Callable[[int, str, str], None] | None]:
    """Show generations as they grow, where stdout is a terminal: call with row, column and the text so far; gone when it ends."""
    if quiet or not sys.stdout.isatty():
        yield None
        return
    from rich.console import Group
    from rich.live import Live

    now = [{"before": row["prompt"], "after": row["prompt"], **row} for row in rows]

    def picture() -> Group:
        return Group(*side_by_side(now, edits, changed=changed))

    with Live(picture(), console=console(), transient=True, refresh_per_second=12) as live:

        def note(row: int, column: str, text: str) -> None:
            now[row][column] = text
            live.update(picture())

        yield note


# --- progress -----------------------------------------------------------------------------------------


def watched() -> bool:
    """Whether somebody may be looking at stderr."""
    return sys.stderr.isatty()


@contextmanager
def working(text: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner while something runs whose length is not known."""
    if quiet or not watched():
        yield
        return
    with console(err=True).status(text):
        yield


@contextmanager
def sweeping(text: str, *, quiet: bool = False) -> Iterator[dict[str, Callable[..., None]]]:
    """A bar for sweeps inside a method, with the estimate of each before it; what `sweep.using` is to be told."""
    if quiet or not watched():
        yield {}
        return
    with progress(text) as bar:

        def announce(estimate: Any) -> None:
            console(err=True).print(f"[{DIM}]{text}: a sweep of {estimate}[/]")
            bar(0, 1)

        yield {"progress": bar, "announce": announce}


@contextmanager
def progress(text: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar for something that calls back with (done, total); gone when it ends."""
    if quiet or not watched():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(28), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console(err=True), transient=True) as bars:
        row = bars.add_task(text)
        yield lambda done, total: bars.update(row, completed=done, total=total)


# --- papers -------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
