"""Rounding is judged in one place: no test picks a number for it (see tests/tolerance.py)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tolerance import close, table

TESTS = Path(__file__).parent
FINE = 1e-3  # what is coarser is a bound on an effect or an estimate
BOUNDS = {  # file: what a fine number in it says that is no rounding of a model's numbers
    "find/test_attention_sinks.py": "a value that is written with five digits",
    "find/test_concept_depth.py": "a fit's last step, and quantised numbers",
    "find/test_concept_neurons.py": "tails of a distribution far below 1, where only a ratio says anything",
    "find/test_relation_neurons.py": "the same",
}


def picked(tree: ast.AST) -> Iterator[ast.expr]:
    """Comparisons that allow less than FINE in a number of their own."""
    denied = {id(node.operand) for node in ast.walk(tree) if isinstance(node, ast.UnaryOp)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in denied:
            name = ast.unparse(node.func).rpartition(".")[2]
            allowed = [word.value for word in node.keywords if word.arg in ("abs", "rel", "atol", "rtol")]
            if (
                name in ("allclose", "assert_allclose", "assert_close", "isclose")
                and not any(_fine(x) is False for x in allowed)
            ) or (name == "approx" and allowed and all(_fine(x) for x in allowed)):
                yield node
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.LtE):
            left = ast.unparse(node.left)
            if _fine(node.comparators[0]) and ".abs()" in left and " - " in left:
                yield node


def _fine(node: ast.expr) -> bool | None:
    """Whether a number is below FINE; None for what is no number."""
    return (
        0 < float(node.value) < FINE if isinstance(node, ast.Constant) and isinstance(node.value, int | float) else None
    )


def test_no_test_picks_a_tolerance_for_rounding() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(TESTS.rglob("*.py"))
        if str(path.relative_to(TESTS)) not in BOUNDS
        for node in picked(ast.parse(path.read_text()))
    ]
    assert not found, "use tests.tolerance.close, or torch.equal:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "is_picked"),
    [
        ("assert torch.allclose(a, b)", True),
        ("assert torch.allclose(a, b, atol=1e-5)", True),
        ("assert not torch.allclose(a, b, atol=1e-4)", False),
        ("assert torch.allclose(a, b, atol=0.02)", False),
        ("assert a == pytest.approx(b, abs=1e-5)", True),
        ("assert a == pytest.approx(b, abs=0.05)", False),
        ("assert a == pytest.approx(1 / 3)", False),
        ("assert (a - b).abs().max() < 1e-5", True),
        ("assert (a - b).abs().max() > 1e-5", False),
    ],
)
def test_what_counts_as_picked(line: str, is_picked: bool) -> None:
    assert bool(list(picked(ast.parse(line)))) == is_picked


def test_near_follows_size_and_dtype() -> None:
    one = torch.tensor([1.0, 1000.0])
    assert close(one, one + 5e-3)  # 64 * 1.2e-7 * 1000 = 7.6e-3
    assert not close(one, one + 1e-2)
    assert not close(one[:1], one[:1] + 5e-3)
    assert close(one[:1], one[:1] + 5e-3, of=1000.0)
    assert close(one.bfloat16(), one + 100.0)
    assert not close(one.double(), one.double() + 5e-3, dtype=torch.float64)
    assert not close(one, one[:1, None])
    assert not close(one, torch.tensor([1.0, torch.nan]))
    assert close([torch.nan], [torch.nan], equal_nan=True)
    assert close([torch.inf, 1.0], [torch.inf, 1.0])
    assert not close([torch.inf], [-torch.inf])


def test_the_table_is_of_what_was_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    monkeypatch.setenv("PATCHBAY_TOLERANCES", str(told))
    assert close(1.0, 1.0 + 2**-20, noise=32.0)  # 32 * 2^-23 allowed: four times the error
    assert close(1.0, 1.0, noise=32.0)
    head, row = table(str(told)).splitlines()
    assert head.split()[-2:] == ["tolerance", "file"]
    assert row.split()[0] == "4.0"
    assert row.split()[2:] == ["2", "1", "32", "eps(float32)", "size", "test_tolerances.py"]
