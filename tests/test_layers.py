"""Who may import whom is one ordered line; hooks live in two files; importing the package imports nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import patchbay as pb

ROOT = Path(pb.__file__).parent
LINE = [
    "port",
    "channel",
    "saved",
    "kept",
    "maths",
    "families",
    "source",
    "positions",
    "edit",
    "apply",
    "task",
    "weights",
    "attention",
    "jacks",
    "self_check",
    "view",
    "model",
    "rotary",
    "components",
    "wiring",
    "run",
    "printed",
    "result",
    "record",
    "restart",
    "difference",
    "walk",
    "scorer",
    "sweep",
    "method",
    "knob",
    "replay",
    "rows",
    "affine",
    "fold",
    "export",
]
VERBS = ("tasks", "find", "prove", "turn", "decode", "train", "measure")
LATE = {("result", "draw"), ("sweep", "ray_executor")}  # imported when asked to draw, or to run on several machines


def files(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).glob("*.py"))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST, *, at_top: bool) -> Iterator[str]:
    """Dotted names below `patchbay` that are imported; what stands under TYPE_CHECKING is for readers and is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            if node.module == "patchbay":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("patchbay."):
                yield node.module.removeprefix("patchbay.")
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.partition(".")[2] or "patchbay"
                for alias in node.names
                if alias.name.split(".")[0] == "patchbay"
            )
        elif not (at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, at_top=at_top)


def breaches(name: str, tree: ast.Module) -> list[str]:
    """What a file of the line imports that does not stand before it."""
    before = LINE[: LINE.index(name)]
    now = [f"{name} imports {found}" for found in imports(tree, at_top=True) if found not in before]
    later = [
        f"{name} imports {x} later" for x in imports(tree, at_top=False) if x not in LINE and (name, x) not in LATE
    ]
    return now + later


@pytest.mark.parametrize("name", LINE)
def test_a_file_of_the_line_imports_only_what_stands_before_it(name: str) -> None:
    assert breaches(name, parse(ROOT / f"{name}.py")) == []


@pytest.mark.parametrize("path", files(*VERBS), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_method_imports_the_line_and_its_own_room_only(path: Path) -> None:
    room = path.parent.name
    found = [name for name in imports(parse(path), at_top=False) if name.split(".")[0] not in (*LINE, room)]
    assert found == []


@pytest.mark.parametrize("path", files("prove", "measure"), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_methods_share_is_in_a_shared_file(path: Path) -> None:
    """A method takes private names of no other method's file: what two of them need stands in a file that starts with `_`."""
    taken = [
        f"{node.module}: {alias.name}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.split(".")[-1].startswith("_")
        for alias in node.names
        if node.module.startswith("patchbay.") and alias.name.startswith("_") and node.module.count(".") > 1
    ]
    assert taken == []


@pytest.mark.parametrize("path", files("stories"), ids=lambda path: f"stories/{path.stem}")
def test_a_story_imports_methods_and_what_shows_them(path: Path) -> None:
    """Stories stand after the verbs, beside the demo; nothing but the command line knows them."""
    shown = ("patchbay", "draw", "stories", "tiny")
    found = [name for name in imports(parse(path), at_top=False) if name.split(".")[0] not in (*LINE, *VERBS, *shown)]
    assert found == []


def test_the_rule_would_notice_a_breach() -> None:
    source = "from patchbay.signal.port import Port\nfrom patchbay import sweep\ndef f():\n    from patchbay.cli import main\n"
    assert breaches("edit", ast.parse(source)) == ["edit imports sweep", "edit imports cli later"]
    guarded = "if TYPE_CHECKING:\n    from patchbay.model.model import Model\nif x:\n    import patchbay.model.run\n"
    assert list(imports(ast.parse(guarded), at_top=True)) == ["run"]


def hook_names(tree: ast.Module) -> set[str]:
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    marks = ("register_forward", "register_full_backward", "register_module_forward", "register_hook")
    return {name for name in used if name.startswith(marks) or name in ("_forward_hooks", "_forward_pre_hooks")}


def test_only_two_files_touch_hooks() -> None:
    touching = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if hook_names(parse(path))}
    assert touching == {"jacks.py"}  # attention.py replaces functions and registers its own
    code = [
        path.name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Name) and node.id in ("AttentionInterface", "AttentionMaskInterface")
    ]
    assert set(code) == {"attention.py"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "xarray", "matplotlib", "typer", "rich")
    code = f"import sys, patchbay; print([m for m in {heavy} if m in sys.modules], [m for m in sys.modules if m[:9] == 'patchbay.'])"
    assert python(code) == "[] []"


def test_every_public_name_resolves_and_is_listed_once() -> None:
    assert list(pb.__all__) == sorted(set(pb.__all__))
    for name in pb.__all__:
        assert getattr(pb, name) is not None
    assert dir(pb) == list(pb.__all__)
    with pytest.raises(AttributeError, match="patchbay has no 'sweeep'; it has Edit, "):
        pb.sweeep  # noqa: B018
    shown = {
        alias.asname or alias.name
        for node in ast.walk(parse(ROOT / "__init__.py"))
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert shown == set(pb.__all__)  # what a reader's tools see is what there is


def test_a_function_keeps_its_name_when_the_file_of_that_name_is_imported() -> None:
    code = "import patchbay as pb, patchbay.model.run, patchbay.sweeps.sweep; from patchbay import run; print(callable(pb.run), callable(pb.sweep), callable(run))"
    assert python(code) == "True True True"
