"""Sparse AdamW: exact counts, the formula by hand, entries that come back, and a run beside its dense twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.train._optimizers import form_of
from patchbay.train._sparse import SparseAdamW, kept, nonzero, only_largest, share
from tests.given import lent
from tests.tolerance import close
from tests.train.test_variant import variant


def test_reference_steps() -> None:
    """Four steps by hand: Adam with decay, then all but the largest entries, of a share that falls."""
    generator = torch.Generator().manual_seed(0)
    matrix, bias = torch.randn(5, 7, generator=generator), torch.randn(7, generator=generator)
    weight, shift = (torch.nn.Parameter(one.clone()) for one in (matrix, bias))
    fit = SparseAdamW([weight, shift], lr=0.05, weight_decay=0.1, keep=0.2, over=3)
    moments = {id(one): [torch.zeros_like(one), torch.zeros_like(one)] for one in (matrix, bias)}
    for t in range(1, 5):
        for one, mine in ((weight, matrix), (shift, bias)):
            one.grad = torch.randn(one.shape, generator=generator)
            first, second = moments[id(mine)]
            first.mul_(0.9).add_(0.1 * one.grad)
            second.mul_(0.999).add_(0.001 * one.grad**2)
            mine.mul_(1 - 0.05 * 0.1)
            mine.sub_(0.05 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8))
        n = max(1, round(35 * 0.2 ** min(1, t / 3)))
        left = sorted(matrix.abs().flatten().tolist(), reverse=True)[n:]
        matrix[matrix.abs() <= max(left)] = 0.0
        fit.step()
        assert int(weight.count_nonzero()) == n
        assert close(weight, matrix)
        assert close(shift, bias)


def test_counts_are_exact_whatever_is_equal() -> None:
    """Of equal entries the first stay; one entry stays of the smallest matrix; the share falls by one factor a step."""
    weight = torch.tensor([[1.0, -1.0, 1.0], [1.0, 2.0, -1.0]])
    only_largest(weight, 3)
    assert weight.tolist() == [[1.0, -1.0, 0.0], [0.0, 2.0, 0.0]]
    assert [kept(10, part) for part in (1.0, 0.25, 0.01)] == [10, 2, 1]
    assert close([share(t, 0.01, 2) for t in (1, 2, 9)], [0.1, 0.01, 0.01])
    assert share(1, 0.3, 0) == 0.3


def test_an_entry_comes_back() -> None:
    """Moments go on behind a zero: a gradient that stays brings its entry over what is kept."""
    weight = torch.nn.Parameter(torch.tensor([[0.5, 0.1]]))
    fit = SparseAdamW([weight], lr=0.2, weight_decay=0.0, keep=0.5, over=0)
    seen = []
    for _ in range(8):
        weight.grad = torch.tensor([[0.1, -1.0]])
        fit.step()
        seen.append(weight[0].tolist())
    assert seen[0][1] == 0.0
    assert close(seen[1], [0.0, 0.2], of=1.0)  # a whole step, as if it had never been cut
    assert seen[-1][0] == 0.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # tables apart, and tied
def test_a_variant_beside_its_dense_twin(name: str, tmp_path: Path) -> None:
    """The count of every matrix is exact in the checkpoint; the twin stays dense; the share is told."""
    plan = {"steps": 4, "batch_size": 4}
    found = variant(model=lent(name), optimizer="sparse:keep=0.05,over=2", folder=str(tmp_path / "runs"), plan=plan)
    hf = pb.load(tmp_path / "runs" / "variant-0").hf
    matrices = [one for one in hf.parameters() if one.ndim >= 2]
    assert all(int(one.count_nonzero()) == kept(one.numel(), 0.05) for one in matrices)
    runs = {row["run"]: row["nonzero"] for row in found.tables["runs"]}
    assert close(runs["variant-0"], nonzero(hf))
    assert runs["twin-0"] > 0.99
    assert any(note.startswith("of the entries of matrices are not 0: variant 0.05") for note in found.notes)


def test_what_is_refused() -> None:
    for text, says in (
        ("sparse:keep=0", "above 0 and up to 1"),
        ("sparse:keep=2", "above 0 and up to 1"),
        ("sparse:over=-1", "0 steps or more"),
        ("sparse:kept=1", "no setting 'kept'; its settings are keep, over"),
        ("sparse:over=x", "over is written as int"),
        ("spars", "did you mean 'sparse'"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            form_of(text)
    with pytest.raises(pb.PatchbayError, match="keeps more than it should for 100 steps, and steps=6"):
        variant(optimizer="sparse")
