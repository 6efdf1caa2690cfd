"""The wheel holds the whole package: code, weights, tokenizers, the catalogue, the mark of typing; and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import patchbay as pb

PACKAGE = Path(pb.__file__).parent
CHECKOUT = PACKAGE.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy in a path with spaces, by the backend alone, so that nothing is fetched."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than the build asks for (77)")
    root = tmp_path_factory.mktemp("a clone") / "with spaces"
    shutil.copytree(PACKAGE, root / "patchbay", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, root)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (root / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_file_of_the_package_is_in_the_wheel_byte_for_byte(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {path.relative_to(CHECKOUT).as_posix(): path for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if "__pycache__" not in name and not name.endswith(".partial")}
    assert inside == files.keys()
    assert {
        "patchbay/papers/papers.toml",
        "patchbay/tiny/weights/tiny/model.safetensors",
        "patchbay/py.typed",
    } <= inside
    assert all(wheel.read(name) == path.read_bytes() for name, path in files.items())


def test_it_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (about,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"\nName: patchbay-lm\nVersion: {pb.__version__}\n" in about
    assert "\nRequires-Python: >=3.11\n" in about
    (entries,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "patchbay = patchbay.__main__:main" in entries
