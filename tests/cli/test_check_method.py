"""`patchbay check-method`: a method outside the package that keeps the contract passes; what breaks it is named, with exit code 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from patchbay.cli import cli
from patchbay.contract import beside, every
from patchbay.contract.held import ContractError

LEVELS = '''"""Levels: the mean size of the stream in each layer.

    level(l) = mean over prompts of |resid_out(l)| at the last position

Nobody 2024. It does not show what the stream holds.
"""

import torch

import patchbay as pb


@pb.method(paper="nobody2024", verb="find")
def levels(model: pb.Model, task: pb.Task, *, factor: float = 1.0, batch_size: int = 16) -> pb.Result:
    """Mean size of the stream.

    `factor`: what sizes are multiplied with.
    """
    taps = [layer.resid_out for layer in model.layers]
    rows = []
    for start in range(0, len(task.clean), batch_size):
        ids = task.clean[start : start + batch_size]
        trace = pb.run(model, ids, taps=taps)
        rows += [[float(trace[tap][i, len(one) - 1].norm()) for tap in taps] for i, one in enumerate(ids)]
    sizes = torch.tensor(rows).double().mean(0) * factor
    return pb.Result(sizes, axes=("layer",), unit="resid norm")
'''
TESTS = """import pytest
import torch

import patchbay as pb
from patchbay.tiny import twins

from levels import levels


def made():
    model = pb.load(twins.twin("gpt2"))
    return model, pb.tasks.repeated_tokens(model, 3, max_period=6, max_offset=4)


def by_hand(model, task):
    outs = [model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1].norm() for ids in task.clean]
    return float(sum(outs) / len(outs))


def test_planted():
    model, task = made()
    with model.edited(pb.scale(model.layers[0].resid_out, 3.0)):
        assert float(levels(model, task).values[0]) == pytest.approx(3 * by_hand(*made()), rel=1e-4)


def test_reference():
    model, task = made()
    assert float(levels(model, task, factor=2.0).values[0]) == pytest.approx(2 * by_hand(model, task), rel=1e-4)


def test_null():
    model, task = made()
    assert float(levels(model, task, factor=0.0).values.abs().max()) == 0.0
"""
ROWS = [
    ("the position before the last", "len(one) - 1", "len(one) - 2"),
    ("no factor", ".mean(0) * factor", ".mean(0)"),
    ("a sum", ".double().mean(0)", ".double().sum(0)"),
]


def rows(found: list[tuple[str, str, str]], tests: str = "test_levels.py") -> str:
    return "\n".join(
        f'[[bug]]\nname = "{name}"\nfile = "levels.py"\nold = "{old}"\nnew = "{new}"\ntests = ["{tests}"]\n'
        for name, old, new in found
    )


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(every, "TWINS", ("gpt2", "mamba2"))
    (tmp_path / "levels.py").write_text(LEVELS)
    (tmp_path / "test_levels.py").write_text(TESTS)
    (tmp_path / "levels.toml").write_text(rows(ROWS))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # of the tests that it starts
    return tmp_path / "levels.py"


def check(*args: str) -> Result:
    return CliRunner().invoke(cli, ["check-method", *args], prog_name="patchbay")


@pytest.mark.slow
def test_a_method_that_keeps_the_contract_passes(file: Path) -> None:
    done = check(str(file), "--json")
    told = json.loads(done.stdout)
    assert told["failed"] == 0, [row for row in told["checks"] if row["failed"]]
    assert done.exit_code == 0
    assert told["method"] == "find.levels"
    said = [row["check"] for row in told["checks"]]
    assert "Each of at least three one-line changes of the method makes a named test fail" in said
    assert "mamba2: What was saved loads as it was, replays to the same numbers, and prints" in said
    assert any(row.startswith("gpt2: Two coroutines in two threads at once") for row in said)
    assert "gpt2: Prompts of different lengths together, in small batches and alone: the same numbers" in said


BROKEN = {
    "seeds": ("    taps =", "    torch.manual_seed(0)\n    taps =", None),
    "random": (".double().mean(0)", ".double().mean(0) + torch.rand(1)", "the same call gives other numbers"),
    "batch": ("len(one) - 1", "min(map(len, ids)) - 1", "with batch_size=2 it gives other numbers"),
    "padding": ("len(one) - 1", "-1", "variables without any value"),
    "weights": ("    rows = []", "    next(model.hf.parameters()).data.add_(1e-3)\n    rows = []", "it left changed: weights"),
    "hook": ("    rows = []", "    model.modules[0].layer.register_forward_hook(lambda *_: None)\n    rows = []", "it left changed: hooks"),
    "task": ("    rows = []", "    task.labels['mine'] = [1] * len(task)\n    rows = []", "it changed the task"),
    "swallowed": ("        trace = pb.run(model, ids, taps=taps)\n", "        try:\n            trace = pb.run(model, ids, taps=taps)\n        except RuntimeError:\n            return pb.Result(torch.ones(len(taps)), axes=('layer',), unit='resid norm')\n",
                  "a hook that could not be put on was no error"),
    "threads": ("    rows = []", "    rows = model.__dict__.setdefault('rows', [])\n    rows.clear()\n    __import__('time').sleep(0.2)", "beside another task and thread it gives other numbers"),
    "no type": ("factor: float", "factor", "factor has no type"),
    "one family": ("    rows = []", "    assert model.family.name == 'gpt2'\n    rows = []", "AssertionError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_breaks_the_contract_is_named(file: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, says = BROKEN[kind]
    assert LEVELS.count(old) == 1
    file.write_text(LEVELS.replace(old, new))
    monkeypatch.setattr(every, "of_files", lambda found: iter(()))
    done = check(str(file))
    if says is None:  # the decorator puts random states back
        assert done.exit_code == 0, done.stdout
        return
    assert done.exit_code == 1, done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("       ")]
    assert any(says in line for line in failed), done.stdout


def test_the_three_tests_and_three_planted_bugs_are_asked_for(file: Path) -> None:
    beside.has_its_three_tests(file, "levels")
    tests = file.parent / "test_levels.py"
    tests.write_text(TESTS.replace("def test_null", "def test_nothing"))
    with pytest.raises(ContractError, match="lacks test_null"):
        beside.has_its_three_tests(file, "levels")
    (file.parent / "levels.toml").write_text(rows(ROWS[:2]))
    with pytest.raises(ContractError, match=r"has 2 planted bugs of levels.py; at least 3"):
        beside.its_tests_notice_planted_bugs(file, "levels")
    (file.parent / "levels.toml").write_text(rows([*ROWS[:2], ("gone", "not there", "x")]))
    with pytest.raises(ContractError, match=r"'gone': 'not there' stands 0 times in levels.py; once is needed"):
        beside.its_tests_notice_planted_bugs(file, "levels")
    (file.parent / "levels.toml").unlink()
    with pytest.raises(ContractError, match=r"there is no levels.toml beside levels.py, nor in tests/"):
        beside.its_tests_notice_planted_bugs(file, "levels")
    tests.unlink()
    with pytest.raises(ContractError, match=r"there is no test_levels.py"):
        beside.has_its_three_tests(file, "levels")


def test_a_bug_that_no_test_notices_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which takes longer to load than these tests to run
    (tmp_path / "levels.py").write_text("def size(x):\n    return abs(x) + 0 + 0.0\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_levels.py").write_text(
        "from levels import size\n\ndef test_size():\n    assert size(-2) == 2\n"
    )
    found = [("no abs", "abs(x)", "x"), ("minus", "+ 0 ", "- 0 "), ("one more", "+ 0.0", "+ 1.0")]
    (tmp_path / "levels.toml").write_text(rows(found, "tests/test_levels.py::test_size"))
    with pytest.raises(ContractError, match="'minus' is not noticed"):
        beside.its_tests_notice_planted_bugs(tmp_path / "levels.py", "levels")
    (tmp_path / "tests" / "levels.toml").write_text("")
    beside.its_tests_pass(tmp_path / "levels.py", "levels")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nothing.py",), "there is no file nothing.py"),
        (("find.nothing",), "is neither FILE.py nor a method VERB.NAME"),
        (("{}", "--give", "wrong=3"), "KEY one of model, task, factor, batch_size"),
        (("{}:other",), "has no method 'other'"),
    ],
)
def test_what_cannot_be_checked_is_refused(file: Path, args: tuple[str, ...], says: str) -> None:
    done = check(*(arg.format(file) for arg in args))
    assert done.exit_code == 2
    assert says in done.stderr


def test_an_argument_that_the_contract_cannot_know_is_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every, "of_files", lambda found: iter(()))
    text = LEVELS.replace("task: pb.Task, *, factor: float = 1.0", "task: pb.Task, factor: float, *")
    file.write_text(text.replace("*, batch_size", "*, batch_size"))
    assert "cannot know what 'factor' is: --give factor=JSON" in check(str(file)).stderr
    assert check(str(file), "--give", "factor=2.0").exit_code == 0
