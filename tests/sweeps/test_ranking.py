"""A sweep ranks its edits by what they do: the mean score less that of the unedited model, either sign, by the edit's name."""

import functools

import pytest
import torch

import patchbay as pb
from patchbay.draw import plot
from patchbay.sweeps import settings
from patchbay.sweeps.ranking import ranking
from tests.given import lent


@functools.cache
def swept() -> pb.Result:
    model = pb.load("tiny")
    task = pb.tasks.repeated_tokens(model, 3)
    return pb.sweep(model, task, [pb.zero(f"L{i}.H{h}.z") for i in range(2) for h in range(3)])


def test_edits_stand_by_the_size_of_value_minus_base() -> None:
    rows = ranking(
        torch.tensor([[1.0, 1.0], [5.0, 3.0], [-4.0, 0.0], [torch.nan, 2.5]]), torch.tensor([1.0, 2.0]), list("abcd")
    )
    assert [(row["edit"], row["effect"]) for row in rows] == [("c", -3.5), ("b", 2.5), ("a", -0.5), ("d", 0.5)]
    assert rows[0] | {"value": -2.0, "base": 1.5} == rows[0]


def test_the_result_prints_draws_and_holds_the_same_order() -> None:
    result = swept()
    effect = (result["value"].double() - result["base"].double()).mean(1)
    assert torch.equal(result["effect"], effect)
    order = effect.abs().argsort(descending=True).tolist()
    names = result.labels_of("edit")
    assert [row["edit"] for row in result.tables["effects"]] == [names[i] for i in order]
    first = str(result).splitlines()[2].split()
    assert first[0] == names[order[0]]
    assert float(first[1]) == pytest.approx(float(effect[order[0]]), rel=1e-3)
    axis = plot.figure(result).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [names[i] for i in order]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([float(effect[i]) for i in order])
    assert "effect" in axis.get_xlabel()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A notebook, whose clock stands until it is told."""

    class Shell:
        kernel = object()

    class IPython:
        get_ipython = staticmethod(Shell)

    monkeypatch.setitem(settings.sys.modules, "IPython", IPython)  # type: ignore[arg-type]
    now = [0.0]
    monkeypatch.setattr(settings.time, "perf_counter", lambda: now[0])
    return now


def test_outside_of_a_notebook_nothing_is_told() -> None:
    assert settings.in_notebook() is None
    assert list(settings.in_turn("ab")) == ["a", "b"]
    assert settings.SETTINGS.get().progress is None


def test_a_notebook_hears_of_a_sweep_after_two_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    tell = settings.in_notebook()
    assert tell is not None
    clock[0] = 1.9
    tell(1, 10)
    assert capsys.readouterr().err == ""
    clock[0] = 3.0
    tell(5, 10)
    assert "5 of 10 cells, 3 s, about 3 s left" in capsys.readouterr().err
    tell(10, 10)
    assert capsys.readouterr().err.endswith("\n")


def test_a_notebook_hears_of_all_sweeps_of_a_method_in_one_line(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Four sweeps of one prompt each: the seconds go on, the cells are of all, the line ends once; a method that is left early leaves nothing behind."""
    model = lent("llama")
    edits = [pb.zero(head.z) for layer in model.layers for head in layer.heads]
    n = len(edits)
    told: list[str] = []
    for i in settings.in_turn(range(4)):
        clock[0] = 3.0 * (i + 1)
        pb.sweep(model, [[5, 6, 7, 8 + i]], edits, lambda logits, rows: logits[:, 0])
        told.append(capsys.readouterr().err)
    lines = [one.split("\r")[-1] for one in told]
    for i, line in enumerate(lines):
        assert line.startswith(f"sweep: {n * (i + 1)} of {4 * n} cells, {3 * (i + 1)} s")
        assert line.endswith("\n") == (i == 3)
    assert "about 9 s left" in lines[0]
    for _ in settings.in_turn(range(3)):
        break
    assert settings.SETTINGS.get().progress is None
    heard: list[int] = []
    with settings.using(progress=lambda done, total: heard.append(total)):
        for _ in settings.in_turn(range(2)):
            pb.sweep(model, [[5, 6, 7, 8]], edits, lambda logits, rows: logits[:, 0])
    assert set(heard) == {2 * n}
    assert capsys.readouterr().err == ""
