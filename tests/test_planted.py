"""The planted bugs fit the tree, and the tool that plants them tells what is noticed from what is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.planted import ROOT, Bug, bugs, share
from tests.planted.__main__ import known, plant

BUGS = bugs()


def test_rows_are_bugs_of_the_package() -> None:
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names)
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
    assert all(bug.file.startswith("patchbay/") and bug.old != bug.new for bug in BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_row_fits_the_tree(bug: Bug) -> None:
    """What is changed stands there once and compiles when changed; the tests that must notice are there."""
    compile(bug.planted((ROOT / bug.file).read_text(encoding="utf-8")), bug.file, "exec")
    assert bug.tests
    for test in bug.tests:
        path, _, function = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not function or re.search(rf"^def {re.escape(function)}\(", text, re.M), test


def test_a_row_that_fits_twice_is_refused() -> None:
    bug = Bug("b", "x.py", "a + b", "a - b", ("t.py",))
    assert bug.planted("c = a + b") == "c = a - b"
    for text in ("", "a + b; a + b"):
        with pytest.raises(ValueError, match="stands [02] times"):
            bug.planted(text)


def test_planting_tells_noticed_from_survived_and_goes_on(tmp_path: Path) -> None:
    """A package of one function in a tree of its own: a bug that a test sees, one that it does not, one that does not fit."""
    root, results = tmp_path / "root", tmp_path / "results.jsonl"
    (root / "patchbay").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "patchbay" / "__init__.py").write_text("def size(x):\n    return abs(x) + 0\n")
    test = "import patchbay\n\ndef test_size():\n    assert patchbay.size(-2) == 2\n"
    (root / "tests" / "test_size.py").write_text(test)
    where = ("patchbay/__init__.py", "tests/test_size.py")
    rows = [
        Bug("no abs", where[0], "abs(x)", "x", (where[1],)),
        Bug("minus", where[0], "+ 0", "- 0", (where[1],)),
        Bug("gone", where[0], "max(x)", "x", (where[1],)),
    ]
    expected = {"no abs": "noticed", "minus": "survived", "gone": "broken"}
    assert plant(rows, results, 1, float("inf"), root) == expected
    assert sorted(known(results).values()) == ["broken", "noticed", "survived"]
    assert plant(rows, results, 1, 0.0, root) == expected, "kept outcomes need no time"
    assert (root / "patchbay" / "__init__.py").read_text() == "def size(x):\n    return abs(x) + 0\n"
    (root / "tests" / "test_size.py").write_text(test.replace("-2", "2"))
    assert plant(rows, results, 1, 0.0, root) == {}, "another test, another outcome"
    assert share(["noticed", "survived", "noticed", "noticed"]) == 0.75
