"""The listing is the index: file = function = export = test file = catalogue entry, for every method."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import patchbay
import patchbay as pb
from patchbay.contract.beside import KINDS, lacking
from patchbay.papers import catalogue, claims
from patchbay.papers.catalogue import STATES
from patchbay.train._objectives import names as objectives
from patchbay.train._optimizers import NAMES as OPTIMIZERS

PACKAGE = Path(patchbay.__file__).parent
TESTS = Path(__file__).parent
ROOMS = [room for room in ("find", "prove", "turn", "decode", "train", "measure") if (PACKAGE / room).is_dir()]
METHODS = [(room, path.stem) for room in ROOMS for path in sorted((PACKAGE / room).glob("[!_]*.py"))]
PAPERS = tomllib.loads((PACKAGE / "papers" / "papers.toml").read_text(encoding="utf-8"))["paper"]


def test_there_are_methods() -> None:
    assert {"find", "prove", "turn", "measure"} <= set(ROOMS)
    assert len(METHODS) >= 7


@pytest.mark.parametrize("room", ROOMS)
def test_a_folder_exports_its_files_and_nothing_else(room: str) -> None:
    module = importlib.import_module(f"patchbay.{room}")
    assert list(module.__all__) == [name for where, name in METHODS if where == room]
    for name in module.__all__:
        assert f"{name} " in f"{module.__doc__} ", f"patchbay/{room}/__init__.py does not list {name}"


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_a_file_is_a_method_of_that_name_with_a_test_and_an_entry(room: str, name: str) -> None:
    module = importlib.import_module(f"patchbay.{room}.{name}")
    function = getattr(importlib.import_module(f"patchbay.{room}"), name)
    assert function is getattr(module, name)
    assert function.method_name == f"{room}.{name}"
    entry = next((paper for paper in PAPERS if paper["key"] == function.paper), None)
    assert entry is not None, f"{room}.{name} names paper {function.paper!r}, which papers.toml lacks"
    assert f"{room}.{name}" in entry["methods"]
    assert (TESTS / room / f"test_{name}.py").is_file()


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_a_method_says_what_it_is_and_what_it_does_not_show(room: str, name: str) -> None:
    module = importlib.import_module(f"patchbay.{room}.{name}")
    function = inspect.unwrap(getattr(module, name))
    assert module.__doc__ is not None
    first = module.__doc__.splitlines()[0]
    assert ":" in first, "opens with the name and the claim"
    assert function.__doc__
    assert "(to be written" not in module.__doc__ + function.__doc__, "what `patchbay new` left to say is said"
    year = next(paper["year"] for paper in PAPERS if f"{room}.{name}" in paper["methods"])
    assert str(year) in module.__doc__, "names its source"


@pytest.mark.parametrize("room_name", [f"{room}/test_{name}" for room, name in METHODS])
def test_a_method_has_the_three_tests(room_name: str) -> None:
    text = (TESTS / f"{room_name}.py").read_text(encoding="utf-8")
    assert lacking(ast.parse(text)) == []


@pytest.mark.parametrize("body", ["...", "pass", "assert True", "find(1)", "x = find(1)\n    return", "assert 1 == 1"])
def test_a_test_that_cannot_fail_is_none(body: str) -> None:
    whole = "\n".join(f"def {kind}():\n    assert find(1) == 2" for kind in KINDS)
    assert lacking(ast.parse(whole)) == []
    empty = whole.replace("def test_null():\n    assert find(1) == 2", f"def test_null():\n    {body}")
    assert lacking(ast.parse(empty)) == ["test_null"]
    assert lacking(ast.parse(whole.replace("test_planted", "test_other"))) == ["test_planted"]


def test_the_catalogue_is_whole() -> None:
    assert len({paper["key"] for paper in PAPERS}) == len(PAPERS)
    for paper in PAPERS:
        assert set(paper) >= {"key", "title", "year", "kind", "does", "headline", "methods", "state"}
        assert paper["state"] in STATES
        assert bool(paper["methods"]) == (paper["state"] in ("works", "partly")), paper["key"]
        assert paper["key"].startswith(tuple("abcdefghijklmnopqrstuvwxyz"))
        assert str(paper["year"]) in paper["key"]
    named = [method for paper in PAPERS for method in paper["methods"]]
    methods, blocks = {f"{room}.{name}" for room, name in METHODS}, {f"blocks.{name}" for name in pb.blocks.__all__}
    texts = {f"corpus.{name}" for name in pb.corpus.__all__}
    assert methods <= set(named) <= methods | blocks | texts
    assert all(len(set(paper["methods"])) == len(paper["methods"]) for paper in PAPERS)


def test_every_claim_is_of_a_paper_that_works_and_says_what_was_measured() -> None:
    assert claims.CLAIMS
    for key in claims.CLAIMS:
        entry = catalogue.paper(key)
        assert entry["state"] in ("works", "partly")
        assert set(entry) >= {"claim", "measured", "model", "command"}, key
    for entry in PAPERS:
        assert ("claim" in entry) == (entry["key"] in claims.CLAIMS), entry["key"]


def test_what_was_not_measured_is_here_and_names_a_command() -> None:
    """Each tool is a name of the package; an objective or optimiser that it names is one."""
    rows = [entry for entry in PAPERS if entry["state"] == "unmeasured"]
    for entry in PAPERS:
        assert ("tools" in entry) == (entry["state"] == "unmeasured"), entry["key"]
    for entry in rows:
        assert len(entry["command"]) > 20
        for tool in entry["tools"]:
            name, _, given = tool.partition("(")
            found = functools.reduce(getattr, name.split("."), patchbay)
            assert found is not None
            if named := re.fullmatch(r'(objective|optimizer)="([\w-]+)"\)', given):
                assert named[2] in {"objective": objectives(), "optimizer": OPTIMIZERS}[named[1]], tool


def test_every_paper_that_works_has_a_claim_that_can_be_run() -> None:
    works = {entry["key"] for entry in PAPERS if entry["state"] in ("works", "partly")}
    assert works == set(claims.CLAIMS)


def test_a_row_says_a_number_with_its_interval_and_the_command() -> None:
    for key in claims.CLAIMS:
        entry = catalogue.paper(key)
        assert re.search(r"-?\d\S* to -?\d", entry["measured"]), key
        assert entry["command"].startswith(f"patchbay papers run {key} --model "), key


def test_the_page_is_what_the_catalogue_says() -> None:
    page = PACKAGE.parent / "docs" / "papers.md"
    assert page.read_text(encoding="utf-8") == catalogue.page(), "python -m patchbay.papers.catalogue > docs/papers.md"
    assert "(0):" not in catalogue.page(), "a state that no paper has needs no heading"
