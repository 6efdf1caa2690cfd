"""Feedback: streams of states and marks, what is trained, ridge regression; a network that learned to learn from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patchbay.tiny import feedback
from tests.tolerance import close

GENERATOR = torch.Generator().manual_seed(0)


def test_reference_marks_say_the_side_of_the_axis() -> None:
    known = feedback.states(1)
    assert known.std(0)[0] > 1.6 * known.std(0)[-1]
    along = feedback.axes(20, 3, GENERATOR)
    assert not bool(along[:, 3:].any())
    for unread in (False, True):
        ids = feedback.streams(known, along, GENERATOR, unread=unread)
        assert ids.shape == (20, 32)
        for row, axis in zip(ids.tolist(), along, strict=True):
            for word, mark in zip(row[::2], row[1::2], strict=True):
                assert mark == int(float(axis @ known[word - feedback.FIRST]) > 0)
                assert (word - feedback.FIRST >= feedback.WORDS - feedback.UNREAD) == unread
    words, marks = ids[:, ::2] - feedback.FIRST, ids[:, 1::2] * 2.0 - 1.0
    for i in range(5):
        x, y = known[words[i, :6]].double(), marks[i, :6].double()
        weights = torch.linalg.inv(x.T @ x + 0.25 * feedback.PENALTY * torch.eye(16, dtype=torch.float64)) @ x.T @ y
        said = float(weights @ known[words[i, 6]].double()) > 0
        assert float(feedback.ridge(known, ids, 6)[i]) == float(said == (marks[i, 6] > 0))


def test_planted_a_report_is_read_before_its_mark() -> None:
    """A network that says mark 1 everywhere is right where the mark is 1; one that copies the mark before is right where it repeats."""
    ids = feedback.streams(feedback.states(0), feedback.axes(30, 4, GENERATOR), GENERATOR)
    marks = ids[:, 1::2]

    def always(ids: Any, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.tensor([0.0, 1.0, 9.0]).expand(*ids.shape, 3))

    def copies(ids: Any, **_: Any) -> Any:
        before = torch.nn.functional.pad(ids, (1, 0))[:, :-1].clamp(max=1)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(before, 2).float())

    assert torch.equal(feedback.reports(SimpleNamespace(hf=always), ids), (marks == 1).double())  # type: ignore[arg-type]
    found = feedback.reports(SimpleNamespace(hf=copies), ids)  # type: ignore[arg-type]
    assert torch.equal(found[:, 1:], (marks[:, 1:] == marks[:, :-1]).double())


def test_null_words_stay_what_they_are_and_an_untrained_network_reports_nothing() -> None:
    before, made = feedback.network(2), feedback.train(steps=3, seed=2)
    old, new = (one.hf.get_input_embeddings().weight for one in (before, made))
    assert torch.equal(old[feedback.FIRST :], new[feedback.FIRST :])
    assert not torch.equal(old[: feedback.FIRST], new[: feedback.FIRST])
    gram = old[feedback.FIRST :] @ old[feedback.FIRST :].T
    known = feedback.states(2)
    assert close(gram, known @ known.T), "the states, turned"
    ids = feedback.streams(known, feedback.axes(200, 4, GENERATOR), GENERATOR, unread=True)
    assert abs(float(feedback.reports(before, ids).mean()) - 0.5) < 0.1


@pytest.mark.slow  # a minute of training, twice
def test_the_reportable_space_is_the_one_that_was_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single axes within the span are reported on words that were never read, others are not; where marks were dealt at random none is."""
    known = feedback.states(0)

    def told(model: Any, component: int) -> float:
        along = torch.eye(feedback.STATE)[[component] * 200]
        ids = feedback.streams(known, along, torch.Generator().manual_seed(1), unread=True)
        return float(feedback.reports(model, ids)[:, -1].mean())

    taught = feedback.train()
    inside, outside = (sum(told(taught, at) for at in axes) / 4 for axes in (range(feedback.TOP), (5, 8, 11, 15)))
    assert inside - outside > 0.1
    plain = feedback.streams

    def dealt(known: Any, along: Any, generator: torch.Generator, **more: Any) -> Any:
        ids = plain(known, along, generator, **more)
        ids[:, 1::2] = torch.randint(2, ids[:, 1::2].shape, generator=generator)
        return ids

    monkeypatch.setattr(feedback, "streams", dealt)
    other = feedback.train()
    monkeypatch.undo()
    assert sum(told(other, at) for at in range(feedback.TOP)) / 4 < 0.57
