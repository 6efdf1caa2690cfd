"""What lies beside a method: its test file with the three tests, and planted bugs that these notice. Read and run, not imported.

stripes.py          the method
test_stripes.py     (or tests/test_stripes.py) test_planted, test_reference and test_null, each with an assertion
stripes.toml        (or tests/stripes.toml) at least three rows of one-line changes that leave the code running and make a number wrong:

    [[bug]]
    name = "the last query but one"
    file = "stripes.py"
    old = "[0, -1, key]"
    new = "[0, -2, key]"
    tests = ["test_stripes.py::test_reference"]
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from patchbay.contract.held import hold

KINDS = ("test_planted", "test_reference", "test_null")
FEWEST = 3  # planted bugs of a new method
LONGEST = 600  # seconds that its tests may take


def lacking(tree: ast.Module) -> list[str]:
    """Which of the three tests a file has not, or has without anything that can fail: an assertion on what was computed."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = {kind: [name for name in functions if name.startswith(kind)] for kind in KINDS}
    return [
        kind for kind, names in found.items() if not names or not all(asserts(functions[n], functions) for n in names)
    ]


def asserts(node: ast.FunctionDef, functions: dict[str, ast.FunctionDef], seen: tuple[str, ...] = ()) -> bool:
    """Whether a function asserts something that is no constant, expects an error, or calls one of the file that does."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert) and any(isinstance(part, ast.Call) for part in assigned(inner.test, node)):
            return True
        if isinstance(inner, ast.Call):
            called = inner.func.attr if isinstance(inner.func, ast.Attribute) else getattr(inner.func, "id", "")
            if called in ("raises", "warns") or called.startswith("assert_"):
                return True
            if called in functions and called not in seen and asserts(functions[called], functions, (*seen, called)):
                return True
    return False


def assigned(test: ast.expr, function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What an assertion is made of; where it names something at all, also what the function computes."""
    yield from ast.walk(test)
    if any(isinstance(part, ast.Name) for part in ast.walk(test)):
        yield from ast.walk(function)


def found_beside(path: Path, name: str) -> Path:
    """A file beside a method, or in the folder tests beside it."""
    places = [path.parent / name, path.parent / "tests" / name]
    found = next((place for place in places if place.is_file()), None)
    hold(found is not None, f"there is no {name} beside {path.name}, nor in tests/")
    assert found is not None
    return found


def has_its_three_tests(path: Path, name: str) -> None:
    """test_planted, test_reference and test_null stand beside the method, and each asserts something that is computed."""
    tests = found_beside(path, f"test_{name}.py")
    try:
        missing = lacking(ast.parse(tests.read_bytes()))
    except (SyntaxError, ValueError) as error:
        hold(False, f"{tests.name} is not Python: {error}")
    hold(not missing, f"{tests.name} lacks {', '.join(missing)}, or they assert nothing that is computed")


def its_tests_pass(path: Path, name: str) -> None:
    """The tests beside the method pass."""
    tests = found_beside(path, f"test_{name}.py")
    code, said = run_tests(path.parent, [str(tests.relative_to(path.parent))])
    hold(code == 0, f"{tests.name}: {said}")


def its_tests_notice_planted_bugs(path: Path, name: str) -> None:
    """Each of at least three one-line changes of the method makes a named test fail."""
    rows = found_beside(path, f"{name}.toml")
    try:
        bugs = tomllib.loads(rows.read_text(encoding="utf-8")).get("bug", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hold(False, f"{rows.name} is not TOML: {error}")
    bad = [i for i, bug in enumerate(bugs) if not {"name", "file", "old", "new", "tests"} <= set(bug)]
    hold(not bad, f"{rows.name}: rows {bad} have not all of name, file, old, new, tests")
    own = [bug for bug in bugs if bug["file"] == path.name]
    hold(len(own) >= FEWEST, f"{rows.name} has {len(own)} planted bugs of {path.name}; at least {FEWEST} are asked for")
    text = path.read_text(encoding="utf-8")
    for bug in own:
        count = text.count(bug["old"])
        hold(count == 1, f"{bug['name']!r}: {bug['old']!r} stands {count} times in {path.name}; once is needed")
    for bug in own:
        code, said = planted(path, text.replace(bug["old"], bug["new"]), bug["tests"])
        hold(code in (0, 1), f"{bug['name']!r}: its tests do not run: {said}")
        hold(code == 1, f"{bug['name']!r} is not noticed: {', '.join(bug['tests'])} pass with it")


def planted(path: Path, text: str, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's answer in a copy of the method's folder in which the method has another text."""
    try:
        compile(text, path.name, "exec")
    except SyntaxError as error:
        return 2, f"the changed text is not Python: {error}"
    with tempfile.TemporaryDirectory() as folder:
        for place in (path.parent, path.parent / "tests"):
            into = Path(folder) / place.relative_to(path.parent)
            into.mkdir(exist_ok=True)
            for file in place.glob("*.py"):
                shutil.copy2(file, into / file.name)
        (Path(folder) / path.name).write_text(text, encoding="utf-8")
        return run_tests(Path(folder), tests)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code in a folder, and the line that says what failed."""
    hold(
        importlib.util.find_spec("pytest") is not None,
        "pytest is not installed, and runs its tests: pip install pytest",
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(folder)]
    command = [sys.executable, "-B", "-m", "pytest", *options, "-o", "addopts=", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"they take more than {LONGEST} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return done.returncode, " ".join((lines[-1] if lines else (done.stdout + done.stderr)[-300:]).split())
