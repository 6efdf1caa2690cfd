"""`patchbay new ROOM NAME --paper KEY`: the files of a new method in a checkout, so that what is left to write is the method.

Writes the method's file, which refuses until it is written, its test file, whose three tests fail and say what belongs in them, and
three rows of planted bugs, which fit nothing until they are written; adds the lines of the room's listing, the catalogue's entry and docs/papers.md. All of it or nothing.
"""

from __future__ import annotations

import keyword
import re
import tomllib
from pathlib import Path

import click

from patchbay.cli import options
from patchbay.cli.signatures import PACKAGE
from patchbay.files import write_file
from patchbay.papers import catalogue
from patchbay.signal.port import PatchbayError, suggest

DOES = "(to be written: what it is, in a line)"
TAKEN = ("all", "help")  # other commands of a room
METHOD = '''"""{title}: {does}

    (to be written: the formula, what its letters mean, the unit, the estimator and the cost in passes)

{source}

(to be written: what it does not show)
"""

from __future__ import annotations

{imports}


@method(paper="{key}")
def {name}({takes}) -> {returns}:
    """{does}

    {words}
    """
    raise PatchbayError("{room}.{name} is not written yet: write it in patchbay/{room}/{name}.py")
'''
IMPORTS = {
    "Knob": ["knobs.knob import Knob", "model.model import Model", "results.method import method"],
    "Result": ["model.model import Model", "results.method import method", "results.result import Result"],
}
TAKES = {
    "Knob": "model: Model, *, strength: float = 1.0",
    "Result": "model: Model, task: Task, *, batch_size: int = 16",
}
WORDS = {"Knob": "`strength`: (to be written: what it is at 0 and at 1).", "Result": "(to be written: what the Result holds, and a word for each option)"}  # fmt: skip
TEST = '''"""{title}: what was planted, the formula as loops, nothing where nothing was planted."""

from __future__ import annotations

import pytest


def test_planted() -> None:
    pytest.fail("to be written: it finds what patchbay.tiny.planted built into a model, by name and size")


def test_reference() -> None:
    pytest.fail("to be written: it equals the paper's formula as plain loops that share no code with it")


def test_null() -> None:
    pytest.fail("to be written: it finds nothing in a model where nothing was planted")
'''
ENTRY = """[[paper]]
key = "{key}"
title = "{title}"
year = {year}
kind = "mechanism"
does = "{does}"
headline = "(to be written: what the paper found)"
methods = ["{method}"]
state = "partly"
"""
BUG = """
[[bug]]
name = "{room}.{name}: (to be written: mistake {number}, that leaves it running and a number wrong)"
file = "patchbay/{room}/{name}.py"
old = "(to be written: what stands there once)"
new = "(to be written: what stands there by mistake {number})"
tests = ["tests/{room}/test_{name}.py::{test}"]
"""


@click.command("new", help=__doc__)
@click.argument("room", metavar="ROOM")
@click.argument("name", metavar="NAME")
@click.option("--paper", "key", required=True, metavar="KEY", help="The paper's key: author and year, as olsson2022.")
@click.option("--title", metavar="TEXT", help="The paper's title; needed where the catalogue has not got KEY.")
@click.option("--does", metavar="TEXT", help="What the method is, in a line, as the listing says it.")
def new(room: str, name: str, key: str, title: str | None, does: str | None) -> None:
    write_method(room, name, key, title, does)


def write_method(room: str, name: str, key: str, title: str | None, does: str | None) -> None:
    """Write a method's files and lines into the checkout, say which, and what is left. Raises PatchbayError before the first."""
    root, name = PACKAGE.parent, name.replace("-", "_")
    _refuse(root, room, name)
    line = " ".join((does or DOES).split()).rstrip(".")
    _plain("--does", line)
    listing = PACKAGE / room / "__init__.py"
    method = {"room": room, "name": name, "key": key}
    entries = PACKAGE / "papers" / "papers.toml"
    text, source = with_method(entries.read_text(encoding="utf-8"), key, f"{room}.{name}", title, line)
    wanted = {
        PACKAGE / room / f"{name}.py": _method(method, line, source),
        root / "tests" / room / f"test_{name}.py": TEST.format(title=_spoken(name), **method),
        root / "tests" / "planted" / f"{room}.toml": with_bugs(root / "tests" / "planted" / f"{room}.toml", method),
        listing: with_lines(listing.read_text(encoding="utf-8"), room, name, line),
        entries: text,
    }
    _write(wanted, root / "docs" / "papers.md")
    for path in [*wanted, root / "docs" / "papers.md"]:
        click.echo(f"wrote {path.relative_to(root)}")
    click.echo(f'by hand: Case("{room}.{name}", pb.{room}.{name}) in tests/test_contract.py')
    if "claim =" not in text.partition(f'key = "{key}"')[2].partition("[[paper]]")[0]:
        click.echo(f"and a claim for {key} in patchbay/papers/claims/, which `patchbay papers run {key}` checks")


def _refuse(root: Path, room: str, name: str) -> None:
    """What is no checkout, no room, no name, or already there."""
    if not (root / "tests" / "test_contract.py").is_file():
        raise PatchbayError(
            f"{root} is an installed package, without tests: `patchbay new` runs from a checkout of the repository"
        )
    if room not in options.rooms():
        raise PatchbayError(
            f"{room!r} is no room of methods; those are {', '.join(options.rooms())}{suggest(room, options.rooms())}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name) or name in TAKEN:
        raise PatchbayError(
            f"{name!r} cannot name a method; a name is lower-case words joined by _, such as fact_heads"
        )
    for path in (PACKAGE / room / f"{name}.py", root / "tests" / room / f"test_{name}.py"):
        if path.exists():
            raise PatchbayError(f"{path.relative_to(root)} is already there; nothing was written")


def _plain(what: str, text: str) -> None:
    """Refuse what would end the text that it is written into."""
    if not text.strip() or not text.isprintable() or '"' in text or "\\" in text:
        raise PatchbayError(f'{what} is one line of text without " and \\, got {text!r}')


def _spoken(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _method(method: dict[str, str], line: str, source: str) -> str:
    returns = "Knob" if method["room"] == "turn" else "Result"
    imports = [*IMPORTS[returns], "signal.port import PatchbayError"]
    imports += ["tasks.task import Task"] if returns == "Result" else []
    return METHOD.format(
        title=_spoken(method["name"]),
        does=f"{line}.",
        source=f"{source}.",
        imports="\n".join(f"from patchbay.{one}" for one in imports),
        takes=TAKES[returns],
        returns=returns,
        words=WORDS[returns],
        **method,
    )


def with_bugs(path: Path, method: dict[str, str]) -> str:
    """The room's planted bugs, with three rows for the method, one for each of its tests."""
    held = path.read_text(encoding="utf-8") if path.exists() else f"# What {method['room']} does.\n"
    tests = enumerate(("test_planted", "test_reference", "test_null"), 1)
    return held.rstrip("\n") + "\n" + "".join(BUG.format(number=number, test=test, **method) for number, test in tests)


# --- lines in files that are there ----------------------------------------------------------------------


def with_lines(text: str, room: str, name: str, line: str) -> str:
    """The room's `__init__.py` with the method's line in the listing, its import, and its name in `__all__`, each in its place."""
    _, opening, rest = text.partition('"""')
    docstring, closing, code = rest.partition('"""')
    lines = docstring.split("\n")
    rows = [at for at, one in enumerate(lines) if re.match(r"[a-z]\w* +\S", one)]
    width = len(lines[rows[0]]) - len(lines[rows[0]].partition(" ")[2].lstrip())  # where the first says what it is
    after = [at for at in rows if lines[at].split()[0] < name]
    lines.insert(after[-1] + 1 if after else rows[0], f"{name:<{width - 1}} {line}")
    exported = sorted({name, *re.findall(rf"^from patchbay\.{room}\.(\w+) import", code, re.MULTILINE)})
    imports = "\n".join(f"from patchbay.{room}.{one} import {one}" for one in exported)
    listed = "\n".join(f'    "{one}",' for one in exported)
    listing = "\n".join(lines)
    return f"{opening}{listing}{closing}\n\n{imports}\n\n__all__ = [\n{listed}\n]\n"


def with_method(text: str, key: str, method: str, title: str | None, line: str) -> tuple[str, str]:
    """The catalogue with the method in the paper's entry, a new one where there is none; and the paper in a line."""
    head, *blocks = text.split("[[paper]]\n")
    keys = [str(tomllib.loads(block)["key"]) for block in blocks]
    if key in keys:
        at = keys.index(key)
        entry = tomllib.loads(blocks[at])
        held = ", ".join(f'"{one}"' for one in [*entry["methods"], method])
        state = entry["state"] if entry["state"] in ("works", "partly") else "partly"
        changed = re.sub(r"^methods = \[[^]]*\]", f"methods = [{held}]", blocks[at], flags=re.MULTILINE)
        blocks[at] = re.sub(r'^state = ".*"', f'state = "{state}"', changed, flags=re.MULTILINE)
        title, year = str(entry["title"]), int(entry["year"])
    else:
        written = re.fullmatch(r"[a-z]+((?:19|20)\d\d)[a-z]*", key)
        if written is None:
            raise PatchbayError(f"{key!r} is no key: an author's name and a year, as olsson2022{suggest(key, keys)}")
        if title is None:
            raise PatchbayError(f"the catalogue has no paper {key!r}{suggest(key, keys)}; --title TEXT makes its entry")
        _plain("--title", title)
        year = int(written[1])
        block = ENTRY.format(key=key, title=title, year=year, does=line, method=method).removeprefix("[[paper]]\n")
        at = sum(one < key for one in keys)
        blocks.insert(at, f"{block}\n")
        if at == len(blocks) - 1:  # at the end of the file: the blank line stands before it
            blocks[at - 1], blocks[at] = blocks[at - 1].rstrip("\n") + "\n\n", block
    return "[[paper]]\n".join(
        [head, *blocks]
    ), f'{key.rstrip("abcdefghijklmnopqrstuvwxyz")[:-4].capitalize()} {year}, "{title}"'


def _write(wanted: dict[Path, str], page: Path) -> None:
    """Write all files, and the page that follows from them; where one fails, all are again as they were."""
    before = {path: path.read_bytes() if path.exists() else None for path in [*wanted, page]}
    try:
        for path, text in wanted.items():
            write_file(path, text.encode())
        catalogue.papers.cache_clear()
        write_file(page, catalogue.page().encode())
    except BaseException:
        for path, held in before.items():
            if held is not None:
                path.write_bytes(held)
            else:
                path.unlink(missing_ok=True)
        raise
