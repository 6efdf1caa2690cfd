"""The planted bugs fit the tree, and the tool that plants them tells what is noticed from what is not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from patchbay.contract.beside import FEWEST
from tests.planted import ROOT, ROWS, Bug, bugs, rows_of, share
from tests.planted.__main__ import known, main, of_changed, plant, sound
from tests.test_layers import ROOMS

BUGS = bugs()
VERBS = ("find", "prove", "turn", "decode", "train", "measure")
METHODS = [f"{verb}.{path.stem}" for verb in VERBS for path in sorted((ROOT / "patchbay" / verb).glob("[!_]*.py"))]
ROWLESS = {"late": "a table of names: one that leads nowhere raises, and a test calls them all"}


def test_rows_are_bugs_of_the_package() -> None:
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names)
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
    assert all(bug.file.startswith("patchbay/") and bug.old != bug.new for bug in BUGS)
    for path in ROWS.glob("*.toml"):
        rooms = {bug.room for bug in rows_of(path.read_text(encoding="utf-8"))}
        assert rooms == {path.stem}, f"{path.name} holds the rows of one room"
    with pytest.raises(ValueError, match="no key"):
        Bug.of({"name": "b", "file": "x.py", "old": "a", "new": "b", "tests": [], "test": []})


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_row_fits_the_tree(bug: Bug) -> None:
    """What is changed stands there once and compiles when changed; the tests that must notice are there."""
    compile(bug.planted((ROOT / bug.file).read_text(encoding="utf-8")), bug.file, "exec")
    assert bug.tests
    for test in bug.tests:
        path, _, function = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        name = function.split("[")[0]
        assert not name or re.search(rf"^def {re.escape(name)}\(", text, re.M), test


def test_every_method_has_bugs() -> None:
    counted = Counter(name for bug in BUGS for name in bug.belongs_to)
    lacking = {name: counted[name] for name in METHODS if counted[name] < FEWEST}
    assert not lacking, f"each brings {FEWEST} rows in tests/planted/VERB.toml"


def test_every_room_has_bugs() -> None:
    assert {bug.room for bug in BUGS} == set(ROOMS) - set(ROWLESS)
    assert len(BUGS) >= 250


def test_a_row_that_fits_twice_is_refused() -> None:
    bug = Bug("b", "x.py", "a + b", "a - b", ("t.py",))
    assert bug.planted("c = a + b") == "c = a - b"
    for text in ("", "a + b; a + b"):
        with pytest.raises(ValueError, match="stands [02] times"):
            bug.planted(text)


def _tree(root: Path) -> tuple[str, str]:
    """A package of one function with its test; their paths."""
    (root / "patchbay").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "patchbay" / "__init__.py").write_text("import math\n\n\ndef size(x):\n    return abs(x) + 0\n")
    tests = "import patchbay\n\ndef test_size():\n    assert patchbay.size(-2) == 2\n\ndef test_red():\n    assert 0\n"
    (root / "tests" / "test_size.py").write_text(tests)
    return "patchbay/__init__.py", "tests/test_size.py"


@pytest.mark.slow  # it plants bugs in a copy and runs tests in it; `make planted` does so in CI
def test_planting_tells_noticed_from_survived_and_goes_on(tmp_path: Path) -> None:
    """A bug that a test sees, one that it does not, one that never ends, and what is no planted bug at all."""
    root, results = tmp_path / "root", tmp_path / "results.jsonl"
    file, tests = _tree(root)
    size, red = (f"{tests}::test_size",), (f"{tests}::test_red",)
    rows = {
        "no abs": (Bug("no abs", file, "abs(x)", "x", size), "noticed", "AssertionError"),
        "minus": (Bug("minus", file, "+ 0", "- 0", size), "survived", ""),
        "same": (Bug("same", file, "+ 0", "+ 0.0", size, argued="as large"), "argued", ""),
        "wrongly argued": (Bug("wrongly argued", file, "+ 0", "+ 1", size, argued="as large"), "broken", "noticed"),
        "endless": (Bug("endless", file, "return abs(x) + 0", "while True: x", size), "noticed", "ended: time"),
        "gone": (Bug("gone", file, "max(x)", "x", size), "broken", "stands 0 times"),
        "unimportable": (Bug("unimportable", file, "import math", "import maths_", size), "broken", "imported"),
        "late import": (Bug("late import", file, "return abs", "import maths_; abs", size), "broken", "never ran"),
        "no test": (Bug("no test", file, "+ 0", "+ 2", (f"{tests}::test_gone",)), "broken", "collected"),
        "red": (Bug("red", file, "+ 0", "+ 3", red), "noticed", "AssertionError"),
    }
    chosen, expected = [bug for bug, _, _ in rows.values()], {name: what for name, (_, what, _) in rows.items()}
    found = plant(chosen, results, 1, float("inf"), 5, root)
    assert {name: one.what for name, one in found.items()} == expected
    assert all(how in found[name].how for name, (_, _, how) in rows.items())
    after = sound(chosen, found, root)
    assert after["red"].what == "broken", "a test that fails without the bug notices nothing"
    assert after["no abs"].what == "noticed"
    assert len(known(results)) == len(rows)
    assert plant(chosen, results, 1, 0.0, 5, root) == found, "kept outcomes need no time"
    path = root / tests
    assert "abs(x) + 0" in (root / file).read_text()
    path.write_text(path.read_text().replace("-2", "2"))
    assert plant(chosen, results, 1, 0.0, 5, root) == {}, "another test, another outcome"


def test_the_share_leaves_out_what_is_argued() -> None:
    assert share(["noticed", "survived", "noticed", "noticed", "argued"]) == 0.75
    assert share(["broken", "noticed"]) == 0.5
    assert share([]) == 1.0


def test_changed_files_choose_their_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs of a changed file and rows that are new come first, then those whose tests changed."""
    one = Bug("one", "patchbay/find/a.py", "a", "b", ("tests/find/test_a.py::test_x",))
    two = Bug("two", "patchbay/find/b.py", "a", "b", ("tests/find/test_b.py",))
    three = Bug("three", "patchbay/find/c.py", "a", "b", ("tests/find/test_c.py",))
    rest = Bug("rest", "patchbay/prove/d.py", "a", "b", ("tests/prove/test_d.py",))
    row = '[[bug]]\nname="{}"\nfile="{}"\nold="a"\nnew="b"\ntests=["{}"]\n'
    old = "".join(row.format(bug.name, bug.file, bug.tests[0]) for bug in (one, two))
    changed = "tests/find/test_a.py\npatchbay/find/b.py\ntests/planted/find.toml\n"
    answers = {"diff": changed, "show": old}
    monkeypatch.setattr("tests.planted.__main__.git", lambda command, *rest: answers[command])
    assert [bug.name for bug in of_changed([one, two, three, rest], "base")] == ["two", "three", "one"]


def test_without_the_commit_to_compare_with_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.planted.__main__.git", lambda *command: None)
    assert main(["--changed"]) == 0
    assert "no planted bugs are run" in capsys.readouterr().out
    assert main(["no bug has this name"]) == 0
