"""Rows as trees: the same log-probabilities as whole rows, each beginning run once, where that pays and is proved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _packed, _runs
from patchbay.measure._packed import ways
from tests import given
from tests.measure.test_branches import fed
from tests.tolerance import close

ROWS = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2, 3, 4], [5, 6, 1], [9, 9, 1], [9, 9, 1, 2], [5, 6, 7, 8, 9, 1]]
NODES = 10  # last tokens out: 5 6 7 8 9, then 2 3 after 8, nothing more of 5 6; 9 9 1


def reads(rows: Any) -> list[list[tuple[int, int]]]:
    return [[(at, row[at + 1]) for at in range(len(row) - 1)] for row in rows]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but tokens costs, so that the smallest saving pays."""
    monkeypatch.setattr(_packed, "_pays", lambda model, rows, found: _packed.packs(model, 16))


def test_rows_are_run_once_where_they_are_alike(free: None) -> None:
    """Each token of each row as by the model's own run of that row alone, plain and under edits; fed are the nodes alone."""
    model = given.lent("gpt2")
    assert _packed.packs(model, 16), "a proof is a run of its own"
    for edits in ([], [pb.scale("L1.attn.out", -2.0)], [pb.scale("logits", 0.5), pb.scale("final_norm", 2.0)]):
        with model.edited(*edits), fed(model) as sizes:
            found = _runs.token_logprobs(model, ROWS)
            both = _runs.token_logprobs(model, ROWS, best=True)
        assert sizes == [NODES, NODES]
        for row, values, pairs in zip(ROWS, found, both, strict=True):
            logp = pb.run(model, [row], edits=edits).logits[0].double().log_softmax(-1)
            assert close(values, logp[range(len(row) - 1), row[1:]], of=10.0, dtype=torch.float32)
            assert close(pairs[:, 1], logp[:-1].amax(-1), of=10.0, dtype=torch.float32)
            assert torch.equal(pairs[:, 0] == pairs[:, 1], logp[:-1].argmax(-1) == torch.tensor(row[1:]))


def test_many_rows_fill_several_trees(free: None) -> None:
    """More nodes than a tree holds: each row is whole in one of them, and each tree within its width."""
    draw = torch.Generator().manual_seed(0)
    rows = [[7, *torch.randint(50, (40,), generator=draw).tolist()] for _ in range(12)]
    rows += [[*row[:20], 3, 3] for row in rows] + [[4] * 200]
    model = given.lent("gpt2")
    trees, alike, others = ways(model, rows[:-1], reads(rows[:-1]), 8)
    assert (alike, others) == ([], [])
    assert len(trees) == 2
    assert all(len(one.tree.ids) <= _packed.WIDTH for one in trees)
    assert sorted(i for one in trees for i in one.nodes) == list(range(24))
    assert ways(model, rows, reads(rows), 8)[2] == [24], "a row of more than half a tree runs whole"
    found = _runs.token_logprobs(model, rows[:-1], batch_size=3)
    for row, values in zip(rows[:-1:5], found[::5], strict=True):
        logp = pb.run(model, [row]).logits[0].double().log_softmax(-1)
        assert close(values, logp[range(len(row) - 1), row[1:]], of=10.0, dtype=torch.float32)


def test_rows_run_otherwise_where_trees_would_be_wrong_or_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model; edits that count positions or of attention; a model that does not pass; a proof that costs more than it saves."""
    model = given.lent("gpt2")
    rows, far = [[5, 6, 7, 8, 9, i] for i in range(10, 30)], [[5, i, i, i, i, 1] for i in range(6, 66)]
    monkeypatch.setattr(_packed, "proved", lambda model, length: True)
    assert not ways(model, rows, reads(rows), 8)[0], "of 12,000 weights a call costs more than a hundred tokens"
    monkeypatch.setattr(_packed, "CALL", 0.0)
    assert not ways(model, far, reads(far), 8)[0], "attention over a whole tree costs more than a token in five"
    assert ways(model, rows, reads(rows), 8)[0]
    monkeypatch.setattr(_packed, "proved", lambda model, length: False)
    assert not ways(model, rows, reads(rows), 8)[0], "the proof costs more than what is saved"
    monkeypatch.setattr(_packed, "proved", lambda model, length: True)
    for edit in (pb.scale("L0.attn.out", 0.0, positions=-1), pb.scale("L0.attn.pattern", 0.5)):
        with model.edited(edit):
            assert not ways(model, rows, reads(rows), 8)[0]
            _runs.token_logprobs(model, rows[:2])
    monkeypatch.setattr(_packed, "packs", lambda model, length: False)
    assert not ways(model, rows, reads(rows), 8)[0]


def test_logits_that_are_no_numbers_name_their_row() -> None:
    """By the row that a token was read for, where two rows stand in one tree."""
    logits = torch.zeros(1, 3, 5)
    logits[0, 2, 4] = math.nan
    with pytest.raises(pb.PatchbayError, match="row 7: the model"):
        _runs._read(logits, [(0, 1, 3), (0, 2, 1)], [4, 7])
