"""What every command of a method can do with what it returned: print it, save it, draw it, write a page of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from patchbay.signal.port import PatchbayError

FIGURES = (".png", ".svg", ".pdf")


def output_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--rows"], type=click.IntRange(0), default=10, show_default=True, help="Rows of the table to print."
        ),
        click.Option(
            ["--columns"],
            type=click.Choice(("main", "all")),
            default="main",
            show_default=True,
            help="Columns of the table: six, or all.",
        ),
        click.Option(["-o", "--out"], metavar="PATH", help="Save the Result as a folder, or the knob as a file."),
        click.Option(["--overwrite"], is_flag=True, help="Replace what --out, --plot and --report wrote before."),
        click.Option(
            ["--report"],
            metavar="FILE.html",
            help="Write one page: figure, map, table, notes, where the numbers came from.",
        ),
        click.Option(["--plot", "figure"], metavar="FILE", help="Draw the Result: .png, .svg or .pdf."),
    ]


def page_options(default: str | None, word: str) -> list[click.Parameter]:
    """The page of a story."""
    return [
        click.Option(["--report"], default=default, show_default=True, metavar="FILE", help=word),
        click.Option(
            ["--overwrite"], is_flag=True, help="Replace a page, and a knob beside it, of another story or seed."
        ),
    ]


def refuse_to_replace_page(page: str, command: str, seed: int, overwrite: bool) -> None:
    """Refuse to replace a page, or the knob beside it, that the same command with the same seed did not make."""
    path, knob = Path(page), Path(page).with_suffix(".knob")
    made = path.is_file() and f"Made by the command {command}, seed {seed}," in path.read_text(errors="replace")
    there = next((one for one in (path, knob) if one.is_file()), None)
    if there is not None and not made and not overwrite:
        raise PatchbayError(f"{there} is already there, and not of {command}, seed {seed}; --overwrite replaces it")


def refuse_to_replace(given: Mapping[str, Any]) -> None:
    out = given["out"]
    if out is not None and not given["overwrite"] and Path(out).exists():
        raise PatchbayError(f"{out} is already there; --overwrite replaces it")
    figure, report = given["figure"], given.get("report")
    if report is not None and Path(report).suffix.lower() not in (".html", ".htm"):
        raise PatchbayError(f"cannot write a report to {report!r}: the suffix is .html")
    if report is not None and not given["overwrite"] and Path(report).exists():
        raise PatchbayError(f"{report} is already there; --overwrite replaces it")
    if figure is not None and Path(figure).suffix.lower() not in FIGURES:
        raise PatchbayError(f"cannot draw to {figure!r}: the suffix is one of {', '.join(FIGURES)}")
    if figure is not None and not given["overwrite"] and Path(figure).exists():
        raise PatchbayError(f"{figure} is already there; --overwrite replaces it")
    for path in (path for path in (out, figure, report) if path is not None):
        if not Path(path).absolute().parent.is_dir():
            raise PatchbayError(f"cannot write {path}: there is no folder {Path(path).absolute().parent}")


def show(returned: Any, given: Mapping[str, Any]) -> None:
    """Save what was asked, and print."""
    from patchbay.draw import result_lines, screen

    written = save(returned, given)
    if given["as_json"]:
        screen.emit(_as_json(returned, given["rows"]) | ({"saved": written} if written else {}))
    else:
        shown = (
            result_lines.of_result(returned, given["rows"], given["columns"])
            if hasattr(returned, "ranked")
            else [escaped(str(returned))]
        )
        screen.say(*shown, *(f"[dim]saved[/] {escaped(path)}" for path in written))


def save(returned: Any, given: Mapping[str, Any]) -> list[str]:
    """Write what was asked: a Result as a folder, a knob as a file, a figure."""
    written = []
    if given["figure"] is not None and not hasattr(returned, "plot"):
        raise PatchbayError(f"--plot draws a Result; this returned a {type(returned).__name__}; nothing was written")
    if given["out"] is not None:
        overwrite = {"overwrite": True} if "overwrite" in inspect.signature(returned.save).parameters else {}
        returned.save(given["out"], **(overwrite if given["overwrite"] else {}))
        written.append(str(given["out"]))
    if given["figure"] is not None:
        returned.plot(given["figure"])
        written.append(str(given["figure"]))
    if given.get("report") is not None:
        from patchbay.draw import report, result_page

        report.write(given["report"], result_page.page_of(returned, given["rows"] or 20))
        written.append(str(given["report"]))
    return written


def _as_json(returned: Any, n: int | None) -> dict[str, Any]:
    from patchbay.draw import screen

    if hasattr(returned, "ranked"):
        return screen.result_json(returned, n)
    if hasattr(returned, "to_json"):
        return dict(returned.to_json())
    return {"kind": type(returned).__name__, "text": str(returned), "provenance": getattr(returned, "provenance", None)}


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
