"""Pages made from docstrings when the site is built: one for each method, their list, and the public names.

A hook of mkdocs. A method's page holds what `help()` and `--help` say, read from the file's text: its signature, the claim with
formula, paper and caveat, what it returns, and a word on every option. Nothing of it is kept in the repository.
"""

from __future__ import annotations

import ast
import functools
import html
import inspect
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from patchbay.cli.signatures import parameters_of, source, written  # noqa: E402
from patchbay.results.described import words  # noqa: E402

REFUSALS = ("PatchbayError", "NotFoldableError")
VERBS = ("find", "prove", "turn", "decode", "train", "measure")


def methods() -> list[tuple[str, str]]:
    """(verb, name) of every method, in the order of the rooms."""
    files = [(verb, path.stem) for verb in VERBS for path in sorted((ROOT / "patchbay" / verb).glob("[a-z]*.py"))]
    return [(verb, name) for verb, name in files if source(_path(verb, name)).function(name) is not None]


def _path(verb: str, name: str) -> Path:
    return ROOT / "patchbay" / verb / f"{name}.py"


def method_page(verb: str, name: str) -> str:
    """The page of one method, as Markdown."""
    file = source(_path(verb, name))
    node = file.function(name)
    assert node is not None
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    given = parameters_of(file, name)
    said = words(doc, list(given))
    defaults = {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None}
    rows = [
        f"| `{option}` | {_cell('`' + written(defaults[option], file) + '`') if option in defaults else 'needed'} | "
        f"{_cell(said.get(option, ''))} |"
        for option in given
    ]
    return "\n".join(
        [f"# {verb}.{name}", "", f"`pb.{verb}.{name}({', '.join(given)})`", "",
         f"`patchbay {verb} {name.replace('_', '-')} --help`", "", file.doc, "", "## What it returns", "", doc, "",
         "## Options", "", "| option | without | |", "|---|---|---|", *rows, ""]
    )  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[")


def method_list() -> str:
    """All methods with the first sentence of their claims."""
    lines = ["# Methods", ""]
    for verb in VERBS:
        lines += [f"## {verb}", ""]
        for found, name in methods():
            if found == verb:
                claim = source(_path(verb, name)).doc.split("\n", 1)[0]
                lines.append(f"- [{verb}.{name}]({verb}.{name}.md): {claim}")
        lines.append("")
    return "\n".join(lines)


def api_page() -> str:
    """The public names of `patchbay` with their docstrings, and the public methods of classes."""
    import patchbay

    lines = ["# API", ""]
    for name in patchbay.__all__:
        thing = getattr(patchbay, name)
        lines += [f"## pb.{name}", "", inspect.getdoc(thing) or "", ""]
        if inspect.isclass(thing):
            for inner, member in vars(thing).items():
                if not inner.startswith("_") and callable(getattr(thing, inner)) and inspect.getdoc(member):
                    lines += [f"### {name}.{inner}", "", inspect.getdoc(member) or "", ""]
    return "\n".join(lines)


@functools.cache
def refusals() -> dict[str, list[tuple[str, int, str]]]:
    """Room -> (file, line, message) of every PatchbayError that the package makes, read from its text."""
    found: dict[str, list[tuple[str, int, str]]] = {}
    for path in sorted((ROOT / "patchbay").rglob("*.py")):
        file = path.relative_to(ROOT / "patchbay")
        nodes = list(ast.walk(source(path).tree))
        names: dict[str, list[ast.expr]] = {}
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names.setdefault(node.targets[0].id, []).append(node.value)
        for node in nodes:
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in REFUSALS:
                room = file.parts[0].removesuffix(".py")
                found.setdefault(room, []).append((file.as_posix(), node.lineno, message(node.args[0], names)))
    return {room: sorted(rows) for room, rows in found.items()}


def message(node: ast.expr, names: dict[str, list[ast.expr]]) -> str:
    """What an error says; `...` stands for what is filled in, a name for all that the file gives it."""
    if isinstance(node, ast.Name) and node.id in names:
        return " / ".join(dict.fromkeys(message(value, {}) for value in names[node.id]))
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part, {}) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message(node.left, names) + message(node.right, names)
    if isinstance(node, ast.IfExp):
        return f"{message(node.body, names)} / {message(node.orelse, names)}"
    return "..."


def refusal_page() -> str:
    """All refusals, room by room."""
    lines = ["# Every refusal", "", "As the code has them; `...` is what a call fills in. [What is refused, and why](limits.md) "
             "explains the large ones.", ""]  # fmt: skip
    for room, rows in refusals().items():
        lines += [f"## {room}", "", "| file | message |", "|---|---|"]
        lines += [
            f"| {file}:{line} | {_cell(html.escape(' '.join(text.split()), quote=False))} |"
            for file, line, text in rows
        ]
        lines.append("")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Path in the site's source -> text."""
    made = {f"methods/{verb}.{name}.md": method_page(verb, name) for verb, name in methods()}
    return {**made, "methods/index.md": method_list(), "api.md": api_page(), "refusals.md": refusal_page()}


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with the pages that it found."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
