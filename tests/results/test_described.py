"""The parts of a docstring: every option of every method has a word, the same in `help()` and in `--help`."""

from __future__ import annotations

import importlib
import inspect
import pydoc

import pytest
from click.testing import CliRunner

from patchbay.cli import cli, options
from patchbay.cli.commands import _sentence
from patchbay.results.described import COMMON, whole, words

METHODS = [(room, name) for room in options.rooms() for name in options.files(room)]
DOC = """The claim `first` of it.

`first`: one, or two. More of something. `second`, `third`: of both,
over two lines; e.g. so.

See `fourth`. `fifth`: 0.5 of it
"""


def test_a_word_is_the_sentence_that_starts_with_the_name() -> None:
    found = words(DOC, ["first", "second", "third", "fourth", "fifth", "seed"])
    assert found == {
        "first": "one, or two.",
        "second": "of both, over two lines; e.g. so.",
        "third": "of both, over two lines; e.g. so.",
        "fifth": "0.5 of it",
        "seed": COMMON["seed"],
    }


def test_the_whole_text_adds_what_is_not_said() -> None:
    text = whole("File: the claim.", DOC, ["first", "seed"])
    assert text.count("one, or two.") == 1
    assert f"`seed`: {COMMON['seed']}" in text
    assert text.endswith("File: the claim.\n")


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_every_option_has_a_word_in_help_and_on_the_command_line(room: str, name: str) -> None:
    module = importlib.import_module(f"patchbay.{room}.{name}")
    function = getattr(module, name)
    parameters = list(inspect.signature(function).parameters)
    said = words(inspect.unwrap(function).__doc__, parameters)
    assert [key for key in parameters if not said.get(key)] == []
    told = " ".join(pydoc.render_doc(function, renderer=pydoc.plaintext).split())
    shown = " ".join(CliRunner().invoke(cli, [room, name, "--help"], terminal_width=300).output.split())
    for key, word in said.items():
        assert word in told, key
        general = key in ("task", "prompts", "seed") and word == COMMON[key]  # said of all tasks and seeds
        if f"--{key.replace('_', '-')}" in shown and not general:
            assert " ".join(_sentence(word).split()) in shown, key
    for paragraph in (module.__doc__ or "").split("\n\n"):
        assert " ".join(paragraph.split()) in told
