"""Edits of rows made at once give what one after another gives, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.edits.apply import apply, row_mask
from patchbay.edits.edit import Edit
from patchbay.edits.together import in_rows, made, plan
from patchbay.tiny.twins import twin

PROMPTS, POSITIONS, HEADS, WIDTH = 5, 3, 4, 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(edits: list[Edit], signal: Tensor) -> Tensor:
    """The plain loop: every place of every edit named."""
    y = signal.clone()
    everywhere = torch.arange(POSITIONS).expand(PROMPTS, -1)
    for edit in edits:
        index = edit.port.index
        part = y if index is None else y[:, :, index].clone()
        new = apply(edit, part, everywhere, row_mask(edit, PROMPTS))
        if index is None:
            y = new
        else:
            y[:, :, index] = new
    return y


HEADED = {
    "numbers": [pb.scale("L0.H1.z", 0.1, rows=2), pb.scale("L0.H3.z", 2.3, rows=[0, 4]), pb.scale("L0.H1.z", 3.0, rows=0)],
    "every operation": [
        pb.add("L0.H0.z", noise(WIDTH), rows=1), pb.scale("L0.H0.z", noise(WIDTH, seed=1), rows=[3, 2]), pb.zero("L0.H1.z", rows=1),
        pb.replace("L0.H2.z", noise(WIDTH, seed=2), rows=4), pb.mean("L0.H3.z", noise(WIDTH, seed=3), rows=[0, 1, 2]), pb.add("L0.H3.z", 0.5, rows=3),
    ],
    "a value for each row": [pb.add("L0.H0.z", noise(2, 1, WIDTH), rows=[4, 1]), pb.add("L0.H2.z", noise(1, 1, WIDTH, seed=4), rows=[0, 3])],
}  # fmt: skip
WHOLE = {
    "rows of the stream": [pb.add("L0.resid_out", noise(WIDTH), rows=3), pb.scale("L0.resid_out", 0.3, rows=[0, 1])],
    "and set": [
        pb.replace("L0.resid_out", noise(WIDTH), rows=2),
        pb.zero("L0.resid_out", rows=0),
        pb.add("L0.resid_out", noise(2, 1, WIDTH), rows=[4, 1]),
    ],
}


@pytest.mark.parametrize("name", [*HEADED, *WHOLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_together_is_one_by_one_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    edits = (HEADED | WHOLE)[name]
    signal = (
        noise(PROMPTS, POSITIONS, HEADS, WIDTH, seed=9) if name in HEADED else noise(PROMPTS, POSITIONS, WIDTH, seed=9)
    )
    signal = signal.to(dtype)
    before, together = signal.clone(), plan(edits)
    assert together is not None
    assert sum(len(one.edits) for one in together) == len(edits)
    found = made(together, signal)
    assert torch.equal(found, one_by_one(edits, signal))
    assert not torch.equal(found, signal)
    assert torch.equal(signal, before)
    for edit in edits:
        if edit.port.index is None:
            rows = torch.tensor(edit.rows)
            assert torch.equal(in_rows(edit, signal, row_mask(edit, PROMPTS), rows), one_by_one([edit], signal))


def test_what_meets_or_counts_positions_is_made_in_its_order() -> None:
    head = pb.scale("L0.H1.z", 0.1, rows=2)
    assert plan([head]) is None  # nothing to put together
    assert plan([head, pb.add("L0.H1.z", 1.0, rows=[2, 3])]) is None  # both in row 2
    assert plan([head, pb.add("L0.H1.z", 1.0)]) is None  # in every row
    assert plan([head, pb.project("L0.H2.z", noise(1, WIDTH), rows=1)]) is None
    assert plan([head, pb.add("L0.attn.z", 1.0, rows=1)]) is None  # a head beside all heads
    assert plan([head, pb.add("L0.H2.z", noise(3, WIDTH), rows=1)]) is None  # another value at each position
    probe = pb.Probe("L0.resid_in", noise(WIDTH), 0.0)
    assert plan([head, pb.add("L0.H2.z", 1.0, rows=1).when(probe)]) is None


def test_a_value_that_its_owner_writes_into_is_read_again() -> None:
    value, signal = noise(WIDTH), noise(PROMPTS, POSITIONS, HEADS, WIDTH, seed=9)
    edits = [pb.add("L0.H0.z", value, rows=1), pb.scale("L0.H1.z", 2.0, rows=0)]
    together = plan(edits)
    assert together is not None
    first = made(together, signal)
    assert torch.equal(made(together, signal), first)
    value.mul_(2)
    assert torch.equal(made(together, signal), one_by_one(edits, signal))
    half = signal.bfloat16()
    assert torch.equal(made(together, half), one_by_one(edits, half))


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, "generated", "last"])
def test_a_generation_under_edits_of_rows_is_that_of_each_row_alone(positions: str | None) -> None:
    """Heads, neurons and vectors, whichever way they are made; and what was touched is told."""
    model = pb.load(twin("llama"))
    ids = torch.tensor([[5, 9, 40, 2], [7, 7, 9, 8], [6, 30, 12, 11]])
    edits = [
        pb.scale("L0.H1.z", -3.0, rows=0, positions=positions),
        pb.scale("L0.H2.z", 4.0, rows=2, positions=positions),
        pb.scale("L1.N3.act", 9.0, rows=1, positions=positions),
        pb.add("L1.N5.act", 5.0, rows=2, positions=positions),
        pb.add("L0.resid_out", noise(model.d_model), rows=[1, 2], positions=positions),
        pb.add("L0.resid_out", noise(model.d_model, seed=1), rows=0, positions=positions),
    ]
    with model.edited(*edits):
        together = model.hf.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        touched = model.touched
    for row in range(3):
        mine = [pb.Edit(e.op, e.port, e.value, e.positions) for e in edits if row in (e.rows or ())]
        with model.edited(*mine):
            alone = model.hf.generate(ids[row : row + 1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert together[row].tolist() == alone[0].tolist()
    where = {None: tuple(range(7)), "generated": (4, 5, 6), "last": (3,)}[positions]
    for edit, told in zip(edits, touched, strict=True):
        assert told == [where if row in (edit.rows or ()) else () for row in range(3)]
