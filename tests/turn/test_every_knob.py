"""Every knob: at neutral it is not there, cached generation is what one run gives, a row's knob stays in its row; together.

The knobs are those of this folder, each on two or three families; what each one does is tested in its own file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.knobs.conflicts import KnobConflict, conflicts
from tests.given import generated, lent
from tests.tolerance import NOISE, close

LENGTH, NEW = 8, 4
Make = Callable[[pb.Model], pb.Knob]


def prompts(n: int) -> Tensor:
    return torch.randint(8, 90, (n, LENGTH), generator=torch.Generator().manual_seed(1))


def vector(model: pb.Model, seed: int = 0) -> Tensor:
    return torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))


def steered(model: pb.Model) -> pb.Knob:
    rows = prompts(16).tolist()
    task = pb.Task("own", rows[:8], [3] * 8, [[4]] * 8, rows[8:])
    return pb.turn.steer(model, task, positions="all")


KNOBS: dict[str, tuple[Make, float]] = {  # and a strength that is not neutral
    "scale": (lambda m: pb.turn.scale("L0.H1,L1.H2", 2.0, model=m), -1.5),  # type: ignore[arg-type]
    "scale values": (lambda m: pb.turn.scale("L1.KV1", 2.0, of="values", positions="2:", model=m), -1.5),  # type: ignore[arg-type]
    "scale experts": (lambda m: pb.turn.scale("L1.E1", 0.0, model=m), 3.0),  # type: ignore[arg-type]
    "clamp neuron": (lambda m: pb.turn.clamp(m, "L1.N3", 4.0), 1.0),  # type: ignore[arg-type]
    "clamp direction": (lambda m: pb.turn.clamp(m, "L0", 4.0, direction=vector(m)), 0.7),  # type: ignore[arg-type]
    "clamp coordinate": (lambda m: pb.turn.clamp(m, "L0", 4.0, coordinate=2, positions="generated"), 1.0),  # type: ignore[arg-type]
    "steer": (steered, 3.0),
    "project": (lambda m: pb.turn.project("L0.resid_out", vector(m), model=m), 1.0),  # type: ignore[arg-type]
    "remove direction": (lambda m: pb.turn.remove_direction(m, vector(m)), 0.5),
    "keep": (lambda m: pb.turn.project("L1.attn.out", vector(m), keep=True, model=m), 0.5),  # type: ignore[arg-type]
    "block": (lambda m: pb.turn.block(m, "1:3"), 1.0),
    "block generated": (lambda m: pb.turn.block(m, [2], queries="generated", parts=["L1"]), 1.0),  # type: ignore[list-item]
    "forbid": (lambda m: pb.turn.route(m, "L1.E0"), 1.0),  # type: ignore[arg-type]
    "boost": (lambda m: pb.turn.route(m, "L0.E1,L1.E0", to="boost"), 2.0),  # type: ignore[arg-type]
    "force": (lambda m: pb.turn.route(m, "L1.E2", to="force"), 0.6),  # type: ignore[arg-type]
}
LACKS = {
    "gemma2": ("experts", "forbid", "boost", "force"),
    "mixtral": ("neuron",),
    "gpt_neo": ("experts", "forbid", "boost", "force"),
}
CASES = [(kind, name) for name, lacks in LACKS.items() for kind in KNOBS if not kind.endswith(lacks)]


@functools.cache
def made(kind: str, name: str) -> pb.Knob:
    make, strength = KNOBS[kind]
    return make(lent(name)).at(strength)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_at_neutral_it_is_not_there_bit_for_bit(kind: str, name: str) -> None:
    model, knob = lent(name), made(kind, name)
    plain = pb.run(model, prompts(3)).logits
    assert torch.equal(pb.run(model, prompts(3), edits=[knob.at(knob.neutral)]).logits, plain)
    with model.edited(knob, strength=knob.neutral):
        assert torch.equal(pb.run(model, prompts(3)).logits, plain)
    for strength in (float("nan"), float("inf"), "2"):
        with pytest.raises(pb.PatchbayError, match="finite number"):
            knob.at(strength)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_generation_with_the_cache_is_one_run_over_the_finished_text(kind: str, name: str) -> None:
    """Positions count in the prompt; the reference runs the whole text, told where the prompt ended, without a cache."""
    model, knob, ids = lent(name), made(kind, name), prompts(3)
    whole_text, cached = generated(model, ids, [knob], NEW)  # [prompt, position], [prompt, new token, vocab]
    text = whole_text[:, :-1]
    with model.session(edits=knob.edits_at(), prompt_length=LENGTH), torch.no_grad():
        whole = model.hf(input_ids=text, use_cache=False).logits[:, LENGTH - 1 :]
    assert close(whole, cached, noise=4 * NOISE)  # one token at a time: other kernels in every layer
    assert torch.equal(whole.argmax(-1), whole_text[:, LENGTH:])
    plain = pb.run(model, text).logits[:, LENGTH - 1 :]
    assert (whole - plain).abs().max() > 1e-4, "without effect"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_knob_on_one_row_changes_no_bit_of_another(kind: str, name: str) -> None:
    """And in its own row it does what it does to that prompt alone."""
    model, knob, ids = lent(name), made(kind, name), prompts(3)
    if any(edit.positions == "generated" for edit in knob.edits):  # there is none in the prompt
        with model.edited(knob.on_rows(1)):
            turned = model.generate(ids.tolist(), NEW)
        plain = model.generate(ids.tolist(), NEW)
        assert [turned[i] for i in (0, 2)] == [plain[i] for i in (0, 2)]
        return
    before = pb.run(model, ids).logits
    after = pb.run(model, ids, edits=[knob.on_rows(1)]).logits
    for row in (0, 2):
        assert torch.equal(after[row], before[row]), f"row {row}: {(after[row] - before[row]).abs().max():.1e}"
    alone = pb.run(model, ids[1:2], edits=[knob]).logits[0]
    assert close(after[1], alone)
    assert not torch.equal(after[1], before[1])


# --- together -----------------------------------------------------------------------------------------


def test_knobs_add_up_in_the_order_given_each_at_its_strength() -> None:
    model, ids = lent("gemma2"), prompts(2)
    port = model.layers[0].resid_out
    one = pb.Knob("one", [pb.add(port, vector(model, 1))], 1.0)
    two = pb.Knob("two", [pb.add(port, vector(model, 2))], 1.0)
    with model.edited(one, two, strength=[2.0, -0.5]):
        found = pb.run(model, ids).logits
    together = pb.add(port, 2.0 * vector(model, 1) - 0.5 * vector(model, 2))
    assert close(found, pb.run(model, ids, edits=[together]).logits)
    with model.edited(two, one, strength=[-0.5, 2.0]):
        assert close(pb.run(model, ids).logits, found)
    with model.edited(one, two, strength=0.0):
        assert torch.equal(pb.run(model, ids).logits, pb.run(model, ids).logits)
    with (
        pytest.raises(pb.PatchbayError, match="3 strengths were given for 2 knobs"),
        model.edited(one, two, strength=[1, 2, 3]),
    ):
        pass


def test_where_the_order_matters_it_is_said() -> None:
    model, ids = lent("gemma2"), prompts(2)
    port = model.layers[0].resid_out
    add = pb.Knob("add", [pb.add(port, vector(model))], 1.0)
    away = pb.Knob("away", [pb.project(port, vector(model, 3))], 1.0)
    with pytest.warns(KnobConflict, match=r"'add' and 'away' do not commute: add\(L0\.resid_out.* acts first"):
        first = pb.run(model, ids, edits=[add, away]).logits
    with pytest.warns(KnobConflict), model.edited(away, add):
        second = pb.run(model, ids).logits
    assert not torch.allclose(first, second, atol=1e-4)
    assert conflicts(add, away, strengths=[1.0, 0.0]) == []  # one of them is not there


def one(op: str, port: pb.Port, value: Any = None, **where: Any) -> pb.Knob:
    given = () if value is None else (value,)
    return pb.Knob(op, [getattr(pb, op)(port, *given, **where)], 0.5 if op == "scale" else 1.0)


def test_what_commutes_is_proved_on_random_signals() -> None:
    """The verdict on every pair of operations is that of doing both, in either order, to a random signal."""
    from patchbay.edits.apply import apply

    port, w = pb.Port("resid_out", 0), torch.randn(6, generator=torch.Generator().manual_seed(0))
    other = torch.randn(6, generator=torch.Generator().manual_seed(1))
    inside = other - (other @ w) / (w @ w) * w  # stays where w is projected away
    knobs = [
        one("add", port, w),
        one("add", port, inside),
        one("scale", port, 1.0),
        one("scale", port, torch.linspace(0.5, 2, 6)),
        one("zero", port),
        one("replace", port, w),
        one("mean", port, other),
        one("project", port, w),
        one("project", port, other),
        one("project", port, inside),
    ]
    signal = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    verdicts = set()
    for a in knobs:
        for b in knobs:
            ways = []
            for pair in ((a, b), (b, a)):
                x = signal
                for made_ in (edit for knob in pair for edit in knob.edits_at()):
                    x = apply(made_, x, None, None)
                ways.append(x)
            same = bool(close(*ways))
            assert bool(conflicts(a, b)) == (not same), f"{a} and {b}: {same}"
            verdicts.add(same)
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("left", "right", "meet"),
    [
        ({"positions": 2}, {"positions": [1, 3]}, False),
        ({"positions": 2}, {"positions": [1, 2]}, True),
        ({"positions": 2}, {"positions": -1}, True),  # in a prompt of three tokens they are one
        ({"positions": "generated"}, {"positions": "last"}, False),
        ({"positions": "generated"}, {"positions": slice(0, 4)}, False),
        ({"positions": "generated"}, {}, True),
        ({"positions": "generated"}, {"positions": pb.Token(5)}, True),
        ({"rows": [0]}, {"rows": [1, 2]}, False),
        ({"rows": [0]}, {}, True),
        ({}, {}, True),
    ],
)
def test_only_edits_that_may_meet_are_reported(left: dict[str, Any], right: dict[str, Any], meet: bool) -> None:
    port = pb.Port("attn.z", 0, 1)
    a, b = one("add", port, torch.ones(4), **left), one("scale", port, 1.0, **right)
    assert bool(conflicts(a, b)) == meet
    assert bool(conflicts(a, one("scale", pb.Port("attn.z", 0), 1.0, **right))) == meet  # all heads, this one too
    assert not conflicts(a, one("scale", pb.Port("attn.z", 0, 2), 1.0))
    assert not conflicts(a, one("scale", pb.Port("attn.z", 1, 1), 1.0))
    assert not conflicts(a, one("scale", pb.Port("attn.out", 0), 1.0))  # another signal: the forward pass orders them
