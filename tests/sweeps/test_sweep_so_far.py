"""What a sweep tells of itself while it runs: effects that are final where they are told, more of them after every batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.sweeps.settings import using
from patchbay.sweeps.sweep import Sweep
from tests.given import lent
from tests.tolerance import close


@pytest.fixture(scope="module")
def asked() -> tuple[pb.Model, pb.Task, list[pb.Edit]]:
    """Prompts of two lengths, and twelve edits, of which two do nothing to the shorter one."""
    model = lent("llama")
    ids = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0)).tolist()
    task = pb.Task("t", (tuple(ids[0]), tuple(ids[1][:5]), tuple(ids[2])), right=(3, 4, 5), wrong=((8,), (9,), (10,)))
    edits = [pb.scale(f"L{i % model.n_layers}.resid_out", 0.5, positions=i // 2) for i in range(10)]
    edits += [replace(pb.scale(f"L{i}.attn.out", 0.5, positions=0), rows=(0, 2)) for i in (0, 1)]
    return model, task, edits


def heard(asked: Any, **settings: Any) -> tuple[pb.Result, list[torch.Tensor], list[Sequence[Any]]]:
    told: list[torch.Tensor] = []
    entries: list[Sequence[Any]] = []

    def hear(given: Sequence[Any], effects: torch.Tensor, unit: str) -> None:
        assert unit == "logits"
        told.append(effects.clone())
        entries.append(given)

    with using(partial=hear, **settings):
        return pb.sweep(*asked), told, entries


def test_effects_so_far_end_as_the_results_and_are_never_taken_back(asked: Any) -> None:
    result, told, entries = heard(asked, pieces=4)
    assert len(told) >= 4
    assert [str(edit) for (edit,) in entries[0]] == [str(edit) for edit in asked[2]]
    assert close(told[-1], result["effect"])
    known = [effects.isfinite().sum().item() for effects in told]
    assert known == sorted(known)
    assert known[0] < known[-1] == 12
    # the group of the shorter prompt comes first: what acts there is its own effect, what does nothing there is 0
    short = Sweep(asked[0], asked[1][[1]], asked[2][:10]).run()["effect"]
    first = torch.stack(told)[:, :10]
    seen = first.isfinite().long().argmax(0)
    assert close(first[seen, torch.arange(10)], short)
    assert told[0][10:].tolist() == [0.0, 0.0]


def test_pieces_change_how_a_sweep_is_split_and_nothing_else(asked: Any, tmp_path: Path) -> None:
    whole, once, _ = heard(asked)
    split, often, _ = heard(asked, pieces=5, folder=tmp_path)
    assert len(once) == 2, "one batch for each length"
    assert len(often) >= 8
    assert close(split["value"], whole["value"])
    again, _, _ = heard(asked, pieces=5, folder=tmp_path)
    assert torch.equal(again["value"], split["value"]), "read back from the same batches"
    other, _, _ = heard(asked, pieces=2, folder=tmp_path)  # split otherwise: those batches are not taken for these
    assert close(other["value"], whole["value"])
