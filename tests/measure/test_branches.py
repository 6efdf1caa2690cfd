"""Rows that begin alike: the same log-probabilities as whole rows, in fewer tokens, where that pays and is proved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _branches, _packed, _runs
from patchbay.measure._answers import scores
from patchbay.measure._branches import Branch, shared_beginnings
from patchbay.model import caches
from tests import given
from tests.tolerance import close

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23, 24]]
ANSWERS = [[[30 + i, 31 + j, 40 + j, 9][: 3 + j % 2] for j in range(3)] for i in range(3)]
FAMILIES = [
    "gpt2",
    "gemma2",
    "falcon alibi",
    "lfm2",
    "qwen3_5_text",
]  # learned, turned, distances, convolutions, states


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call costs nothing, so that the smallest saving pays; and no row is run as a tree."""
    monkeypatch.setattr(_packed, "_pays", lambda model, rows, found: False)
    monkeypatch.setattr(_branches, "CALL", 0.0)
    monkeypatch.setattr(_branches, "WEIGHTS", 0)


@contextmanager
def fed(model: pb.Model) -> Iterator[list[int]]:
    """How many tokens each call of the model was sent."""
    sizes: list[int] = []
    handle = model.hf.get_input_embeddings().register_forward_hook(lambda _, args, __: sizes.append(args[0].numel()))
    yield sizes
    handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_begin_alike_read_as_whole_rows(name: str, free: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and under an edit everywhere, of the logits and inside layers."""
    model = given.lent(name)
    assert caches.branches(model), "this twin's cache passes the run that is asked of it"
    edits = [pb.scale("L1.attn.out", -2.0), pb.scale("logits", 0.5)]
    found = {}
    for way in ("branches", "whole"):
        with fed(model) as sizes:
            plain = scores(model, PROMPTS, ANSWERS)
        with model.edited(*edits):
            edited = scores(model, PROMPTS, ANSWERS)
        found[way] = (plain, edited, sum(sizes))
        monkeypatch.setattr(_runs, "ways", lambda m, rows, reads, size: ([], [], range(len(rows))))
    for one, other in zip(*(found[way][:2] for way in ("branches", "whole")), strict=True):
        assert close(one.logp, other.logp, of=10.0, dtype=torch.float32)
        assert torch.equal(one.greedy, other.greedy)
    assert not close(found["whole"][0].logp, found["whole"][1].logp, of=10.0, dtype=torch.float32), (
        "the edits do nothing"
    )
    assert (
        found["branches"][2] == (8 + 7 + 8) + 9 * 2
    )  # prompts and first tokens once, then what is left but for last tokens, padded
    assert found["whole"][2] == 9 * (7 + 3)


def test_what_is_read_inside_the_beginning_is_read_once(free: None) -> None:
    """Whole rows of pairs: each token of the shared beginning too."""
    model = given.lent("gpt2")
    rows = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2, 3, 4], [9, 9, 1]]
    with torch.no_grad():
        for row, values in zip(rows, _runs.token_logprobs(model, rows), strict=True):
            logp = model.hf(torch.tensor([row])).logits[0].double().log_softmax(-1)
            expected = logp[range(len(row) - 1), row[1:]]
            assert close(values, expected, of=10.0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [[1, 2, 3, 4], [1, 2, 3, 5], [1, 9, 8, 7], [1, 9, 8, 6]],
            [(3, [0, 1]), (3, [3, 2])],
        ),  # two pairs save 6, all four 3
        ([[1, 2, 3], [1, 4, 5], [1, 6, 7]], [(1, [0, 1, 2])]),
        ([[1, 2], [1, 2], [1, 2, 3]], [(1, [0, 1, 2])]),  # a row keeps one token of its own
        ([[1, 2], [3, 4]], []),
        ([[1], [1]], []),
    ],
)
def test_the_branches_that_save_most(rows: Any, expected: Any, free: None) -> None:
    found, others = shared_beginnings(given.lent("gpt2"), rows, 8)
    assert [(one.n, one.rows) for one in found] == expected
    assert others == [i for i in range(len(rows)) if not any(i in places for _, places in expected)]


def test_many_rows_of_one_beginning_run_in_pieces(free: None) -> None:
    rows = [[5, 6, 7, 8, 10 + i] for i in range(5)]
    assert shared_beginnings(given.lent("gpt2"), rows, 2)[0] == [Branch(4, [0, 1]), Branch(4, [2, 3])]
    assert [*map(len, _runs.token_logprobs(given.lent("gpt2"), rows, batch_size=2))] == [4] * 5


def test_rows_run_whole_where_branches_would_be_wrong_or_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model; edits at positions, which would count in other texts; a cache that does not repeat whole runs."""
    model, rows = given.lent("gpt2"), [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]]
    assert shared_beginnings(model, rows, 8) == ([], [0, 1]), "of 12,000 weights two calls cost more than four tokens"
    monkeypatch.setattr(_branches, "CALL", 0.0)
    monkeypatch.setattr(_branches, "WEIGHTS", 0)
    assert shared_beginnings(model, rows, 8)[0]
    with model.edited(pb.scale("L0.attn.out", 0.0, positions=-1)):
        assert shared_beginnings(model, rows, 8) == ([], [0, 1])
        _runs.token_logprobs(model, rows)
    monkeypatch.setattr(_branches, "branches", lambda _: False)
    assert shared_beginnings(model, rows, 8) == ([], [0, 1])
    monkeypatch.undo()
    assert not caches.branches(given.lent("bamba")), "its cache does not repeat whole runs"
