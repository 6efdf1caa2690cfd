"""`patchbay new`, in a copy of the checkout: what it writes is whole, refuses until written, and is refused where it cannot be."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import patchbay as pb
from tests.forked import python

CHECKOUT = Path(pb.__file__).parent.parent
DOES = "heads that see stripes"


def copied(to: Path) -> Path:
    """The package, its tests and documents, without what is large."""
    for name in ("patchbay", "tests", "docs"):
        shutil.copytree(CHECKOUT / name, to / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", to)
    return to


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copied(tmp_path)


@pytest.fixture(scope="module")
def one_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For calls that write nothing."""
    return copied(tmp_path_factory.mktemp("checkout"))


def new(copy: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The command, with the copy as its package."""
    return python("-m", "patchbay", "new", *args, cwd=copy)


def texts(root: Path) -> dict[str, bytes]:
    rooms = [*root.glob("patchbay/*/*.[pt]*"), *root.glob("tests/*/*.py"), *root.glob("docs/*.md")]
    written = (path for path in rooms if path.suffix != ".pyc")  # that Python keeps beside what it imports
    return {str(path.relative_to(root)): path.read_bytes() for path in written}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {path for path in after if before.get(path) != after[path]}


def test_new_writes_all_but_the_case_and_the_catalogue_holds(copy: Path) -> None:
    before = texts(copy)
    done = new(copy, "find", "aa-stripes", "--paper", "olsson2022", "--does", DOES)
    assert done.returncode == 0, done.stderr
    files = {"patchbay/find/aa_stripes.py", "patchbay/find/__init__.py", "tests/find/test_aa_stripes.py"}
    assert changed(before, texts(copy)) == files | {"patchbay/papers/papers.toml", "docs/papers.md"}
    assert 'by hand: Case("find.aa_stripes", pb.find.aa_stripes) in tests/test_contract.py' in done.stdout
    assert "claim" not in done.stdout
    assert f"\naa_stripes                 {DOES}\n" in (copy / "patchbay/find/__init__.py").read_text()
    files = ("tests/test_catalogue.py", "tests/find/test_aa_stripes.py")
    quiet = ("-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
    told = python("-m", "pytest", *quiet, *files, cwd=copy)
    failed = [line for line in told.stdout.splitlines() if line.startswith("FAILED")]
    assert [line.partition("::")[2].partition(" ")[0] for line in failed] == [
        "test_a_method_says_what_it_is_and_what_it_does_not_show[find-aa_stripes]",
        "test_a_method_has_the_three_tests[find/test_aa_stripes]",
        "test_planted",
        "test_reference",
        "test_null",
    ], told.stdout[-2000:] + told.stderr[-2000:]
    held, added = (tomllib.loads((at / "tests/planted/find.toml").read_text())["bug"] for at in (CHECKOUT, copy))
    assert added[: len(held)] == held
    rows = added[len(held) :]
    assert [row["file"] for row in rows] == ["patchbay/find/aa_stripes.py"] * 3
    kinds = ("test_planted", "test_reference", "test_null")
    assert [row["tests"] for row in rows] == [[f"tests/find/test_aa_stripes.py::{kind}"] for kind in kinds]
    text = (copy / "patchbay/find/aa_stripes.py").read_text()
    assert len({row["name"] for row in rows}) == 3
    assert not any(row["old"] in text for row in rows), "a row that is not written fits nothing"


def test_a_skeleton_refuses_until_it_is_written(copy: Path) -> None:
    assert new(copy, "turn", "stripes", "--paper", "zzz2031", "--title", "A study").returncode == 0
    called = python("-c", "import inspect, patchbay as pb; inspect.unwrap(pb.turn.stripes)(None)", cwd=copy)
    assert "PatchbayError: turn.stripes is not written yet: write it in patchbay/turn/stripes.py" in called.stderr
    page = (copy / "docs" / "papers.md").read_text(encoding="utf-8")
    assert "**A study** (2031, `zzz2031`)" in page
    assert "`turn.stripes`" in page
    again = new(copy, "prove", "stripes", "--paper", "zzz2031")
    assert "a claim for zzz2031" in again.stdout
    assert 'methods = ["turn.stripes", "prove.stripes"]' in (copy / "patchbay/papers/papers.toml").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("fnd stripes --paper olsson2022", "'fnd' is no room of methods; those are find, prove"),
        ("sweeps stripes --paper olsson2022", "'sweeps' is no room of methods"),
        ("find logit-lens --paper olsson2022", "patchbay/find/logit_lens.py is already there"),
        ("find attention --paper olsson2022", "tests/find/test_attention.py is already there"),
        ("find all --paper olsson2022", "'all' cannot name a method"),
        ("find class --paper olsson2022", "'class' cannot name a method"),
        ("find ../x --paper olsson2022", "'../x' cannot name a method"),
        ("find _shared --paper olsson2022", "'_shared' cannot name a method"),
        ("find stripes --paper nope", "'nope' is no key"),
        ("find stripes --paper olson2022", "the catalogue has no paper 'olson2022'; did you mean 'olsson2022'"),
        ('find stripes --paper olsson2022 --does a"b', "--does is one line of text"),
    ],
)
def test_refused_and_nothing_written(one_copy: Path, args: str, said: str) -> None:
    before = texts(one_copy)
    done = new(one_copy, *args.split(" "))
    assert done.returncode == 2
    assert said in done.stderr
    assert texts(one_copy) == before


def test_an_installed_package_is_no_checkout(copy: Path) -> None:
    shutil.rmtree(copy / "tests")
    before = texts(copy)
    done = new(copy, "find", "stripes", "--paper", "olsson2022")
    assert done.returncode == 2
    assert "is an installed package, without tests: `patchbay new` runs from a checkout" in done.stderr
    assert texts(copy) == before
