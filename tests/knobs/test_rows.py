"""Knobs as rows of one batch: each row is as if it ran alone, and a knob on one row changes no bit of another."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.knobs.rows import _Heard, by_row, generate_rows
from tests.given import lent
from tests.tolerance import close


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(n: int, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 90, (n, length), generator=torch.Generator().manual_seed(n))


def knobs(model: pb.Model) -> list[Knob | None]:
    """Of every kind: the same port with other numbers, other ports, other positions, several edits of one signal in two orders."""
    layers = list(model.layers)
    head, out = layers[1].heads[2].z, layers[0].resid_out
    width = model.W_O(1).shape[1]
    add, scale = pb.add(out, noise(32, seed=7)), pb.scale(out, noise(32, seed=8))
    return [
        Knob("a", [pb.add(out, noise(32))], 2.0),
        None,
        Knob("b", [pb.add(out, noise(32, seed=1))], -1.0),
        Knob("c", [pb.add(out, noise(32, seed=2), positions="last")], 3.0),
        Knob("d", [pb.scale(head, 1.0)], 3.0),
        Knob("e", [pb.scale(head, 1.0)], 0.0),
        Knob("f", [pb.scale(head, noise(width, seed=3))], 2.0),
        Knob("g", [pb.project(head, noise(2, width))], 1.0),
        Knob("h", [pb.block(layers[0].heads[1].pattern, query=-1, key=[1, 2])], 1.0),
        Knob("i", [add, pb.zero(head)], 0.7),
        Knob("j", [scale], 1.5),
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral", "gptj"])
def test_every_row_is_as_if_it_ran_alone(name: str) -> None:
    model = lent(name)
    mixed = knobs(model)
    prompts = ids(len(mixed))
    together = pb.run(model, prompts, edits=by_row(model, mixed)).logits
    plain = pb.run(model, prompts).logits
    for row, knob in enumerate(mixed):
        alone = pb.run(model, prompts[row : row + 1], edits=[] if knob is None else [knob]).logits[0]
        assert close(together[row], alone), knob
        if knob is None:
            assert torch.equal(together[row], plain[row])
        else:
            assert (together[row] - plain[row]).abs().max() > 1e-4, knob


def test_a_knob_on_one_row_changes_no_bit_of_another() -> None:
    for name in ("gpt2", "llama", "mixtral"):
        model = lent(name)
        mixed = knobs(model)
        prompts = ids(len(mixed))
        before = pb.run(model, prompts, edits=by_row(model, mixed)).logits
        for changed in (0, 4, 7, 8):
            other: list[Knob | None] = list(mixed)
            held = other[changed]
            assert held is not None
            other[changed] = held.at(-5.0)
            after = pb.run(model, prompts, edits=by_row(model, other)).logits
            rest = [row for row in range(len(mixed)) if row != changed]
            assert torch.equal(after[rest], before[rest])
            assert changed == 8 or not torch.equal(after[changed], before[changed])  # a cut is a cut at any strength


def test_edits_that_differ_by_their_numbers_become_one() -> None:
    model = lent("llama")
    port = model.layers[0].resid_out
    made = by_row(model, [Knob(str(i), [pb.add(port, noise(32, seed=i))], 1.0) for i in range(16)])
    assert len(made) == 1
    assert made[0].rows == tuple(range(16))
    assert made[0].value.shape == (16, 1, 32)  # type: ignore[union-attr]
    assert len(by_row(model, knobs(model))) == 7
    assert by_row(model, [None, None]) == []


def test_the_order_of_edits_within_a_row_holds() -> None:
    """One row multiplies first, the other adds first."""
    model = lent("gpt2")
    port = model.layers[1].resid_out
    add, scale = pb.add(port, noise(32)), pb.scale(port, -2.0)
    prompts = ids(1).repeat(2, 1)
    together = pb.run(model, prompts, edits=by_row(model, [[add, scale], [scale, add]])).logits
    for row, edits in enumerate(([add, scale], [scale, add])):
        assert close(together[row], pb.run(model, prompts[:1], edits=edits).logits[0])
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba2"])
def test_generation_by_rows_equals_each_alone(name: str) -> None:
    """Prompts of several lengths, knobs of several kinds, with the cache; tokens are heard as they come."""
    model = lent(name)
    prompts = [row[:n].tolist() for row, n in zip(ids(6), (4, 7, 4, 4, 5, 7), strict=True)]
    steer = [Knob(str(i), [pb.add(model.layers[0].resid_out, 4 * noise(32, seed=i))], 1.0) for i in range(5)]
    entries = [steer[0], None, steer[1], None, steer[2], [steer[3], steer[4]]]
    heard: dict[int, list[int]] = {}
    texts = generate_rows(model, prompts, entries, 5, note=lambda row, token: heard.setdefault(row, []).append(token))
    for prompt, entry, text, row in zip(prompts, entries, texts, range(6), strict=True):
        assert text == model.generate(prompt, 5, edits=[] if entry is None else [entry])
        assert prompt + heard[row] == text
    assert generate_rows(model, prompts[0], [steer[0]], 5) == texts[0]


def test_a_row_that_has_ended_is_told_nothing_more() -> None:
    told: list[tuple[int, int]] = []
    heard = _Heard([3, 5], lambda row, token: told.append((row, token)), {2})
    for tokens in ([[7, 7], [8, 8]], [2, 9], [0, 4], [0, 2]):  # the prompts, then a token of each row
        heard.put(torch.tensor(tokens))
    assert told == [(3, 2), (5, 9), (5, 4), (5, 2)]


def test_text_in_text_out() -> None:
    model = pb.load("tiny")
    knob = pb.turn.scale(["L1.H3"], -2.0, model=model)
    prompts = ["The capital of Lolavia is", "Emma asked Kate about"]
    found = generate_rows(model, prompts, [knob, None], 3)
    assert found == [model.generate(prompts[0], 3, edits=[knob]), model.generate(prompts[1], 3)]
    assert generate_rows(model, prompts[0], [knob], 3) == found[0]


def test_what_is_refused() -> None:
    model = lent("gpt2")
    with pytest.raises(pb.PatchbayError, match="2 prompts and 1 knobs"):
        generate_rows(model, ids(2), [None], 2)
    with pytest.raises(pb.PatchbayError, match="names rows by itself"):
        by_row(model, [pb.zero(model.layers[0].attn.out, rows=1)])
    with pytest.raises(pb.PatchbayError, match="layers 0..1"):
        by_row(model, [pb.zero(pb.Port("resid_out", 7))])
    with pytest.raises(pb.PatchbayError, match="expected edits or knobs"):
        by_row(model, ["L0.H1"])
