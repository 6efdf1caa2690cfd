"""The site: every method and option has its words, what pages name exists, and built pages take nothing from outside."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import patchbay as pb
from patchbay import stories
from patchbay.cli import cli

ROOT = Path(__file__).parents[1]
PASSED_ON = {  # each says again what another function found, in its words
    "app/runs.py",
    "decode/_samplers.py",
    "find/_states.py",
    "results/method.py",
    "tasks/answers.py",
    "tasks/own.py",
    "tasks/rows.py",
    "tasks/table.py",
    "turn/block.py",
}


@functools.cache
def hook():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_with_a_word_for_every_option() -> None:
    pages = hook()
    made = pages.pages()
    exported = {f"methods/{verb}.{name}.md" for verb in pages.VERBS for name in getattr(pb, verb).__all__}
    assert {path for path in made if path.startswith("methods/")} == {*exported, "methods/index.md"}
    for path in exported:
        options = made[path].split("## Options")[1].split("|---|---|---|")[1].strip().splitlines()
        without = [row for row in options if row.count("| needed |") == 0 and row.rstrip().endswith("|  |")]
        assert options, path
        assert not without, (path, without)


def test_the_api_page_has_every_public_name() -> None:
    text = hook().api_page()
    assert re.findall(r"^## pb\.(\w+)$", text, re.MULTILINE) == pb.__all__


def test_the_api_page_names_nothing_that_there_is_not() -> None:
    """Every name on it is there, every public method of a public class with a docstring is on it."""
    text = hook().api_page()
    inner = re.findall(r"^### (\w+)\.(\w+)$", text, re.MULTILINE)
    assert len(inner) > 30
    assert all(callable(getattr(getattr(pb, name), member)) for name, member in inner)
    classes = [name for name in pb.__all__ if isinstance(getattr(pb, name), type)]
    own = {(name, member) for name in classes for member, value in vars(getattr(pb, name)).items()
           if not member.startswith("_") and inspect.isroutine(value) and inspect.getdoc(value)}  # fmt: skip
    assert own <= set(inner)
    assert {name for name in pb.__all__ if not inspect.getdoc(getattr(pb, name))} == set(), (
        "every public name has a docstring"
    )


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, (*path, name)
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_every_option_of_every_command_has_a_word() -> None:
    """Groups, methods and plain commands: each says what it does, and each of its options has help."""
    found = dict(commands(cli))
    assert {"demo", "find", "find all", "find logit-lens", "knob show", "replay", "new", "check-method"} <= set(found)
    assert not [name for name, command in found.items() if not (command.help or "").strip()]
    without = [
        f"{name} {option.opts[-1]}"
        for name, command in [("patchbay", cli), *found.items()]
        for option in command.params
        if isinstance(option, click.Option) and not (option.help or "").strip()
    ]
    assert not without


def test_every_refusal_stands_on_the_page() -> None:
    """As many as the package's text has, counted by its tokens; each says something."""
    rows = [row for found in hook().refusals().values() for row in found]
    made = 0
    for path in (ROOT / "patchbay").rglob("*.py"):
        if b"Error(" not in path.read_bytes():
            continue
        words = [token.string for token in tokenize.tokenize(io.BytesIO(path.read_bytes()).readline)]
        made += sum(
            word in ("PatchbayError", "NotFoldableError") and before != "class" and after == "("
            for before, word, after in zip(words, words[1:], words[2:], strict=False)
        )
    assert len(rows) == made > 700
    silent = {file for file, _, text in rows if not re.search(r"[a-z]{2}", text)}
    assert silent == PASSED_ON
    page = hook().refusal_page()
    assert sum(line.startswith("| ") and ".py:" in line for line in page.splitlines()) == len(rows)
    assert "gradient checkpointing is on" in page


def test_what_pages_say_of_refusals_is_said() -> None:
    """Each quoted message of the guide is one that the package makes: three words of it stand in one."""
    every = " ".join(text for found in hook().refusals().values() for _, _, text in found)
    every = " ".join(every.split())
    quoted = re.findall(r"^> (.+)$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 12
    for line in quoted:
        words = line.split()
        assert any(" ".join(words[i : i + 3]) in every for i in range(len(words) - 2)), line


def test_what_the_question_page_names_exists() -> None:
    text = (ROOT / "docs" / "which-tool.md").read_text()
    calls = re.findall(r"`pb\.(find|prove|turn|decode|train|measure)\.(\w+)\(", text)
    typed = re.findall(r"`patchbay (find|prove|turn|decode|train|measure) ([\w-]+)", text)
    known = set(hook().methods())
    assert len(calls) >= 20
    assert [(verb, name.replace("-", "_")) for verb, name in typed] == calls
    assert set(calls) <= known


def test_the_page_of_stories_has_every_story() -> None:
    text = (ROOT / "docs" / "stories.md").read_text()
    assert (
        sorted(re.findall(r"^\| `([\w-]+)` \|", text.partition("What came of them")[0], re.MULTILINE))
        == stories.names()
    )
    assert set(re.findall(r"patchbay run ([\w-]+)", text)) <= set(stories.names())


@pytest.mark.slow
def test_built_pages_take_nothing_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is in the extra docs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "-q",
        "--strict",
        "-d",
        str(tmp_path),
        "-f",
        str(ROOT / "mkdocs.yml"),
    ]
    subprocess.run(command, check=True, timeout=300)
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > 50
    for page in built:
        taken = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?([^\"' >]+)", page.read_text())
        assert taken
        assert not [address for address in taken if re.match(r"(?:https?:)?//", address)], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:@import\s+|url\(\s*)[\"']?(?:https?:)?//", sheet.read_text()), sheet
