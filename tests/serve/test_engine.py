"""The engine without a wire, turn by turn: who joins when, what a prompt in pieces costs others, and that nothing grows."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.serve.asking import Sampling
from patchbay.serve.engine import Engine, Room
from patchbay.serve.guard import Refusal
from patchbay.serve.work import End, Event, Piece, Work
from patchbay.tiny.twins import twin

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load("tiny")


class Heard:
    """A work, and what was told of it."""

    def __init__(self, ids: list[int], n_new: int, **options: Any) -> None:
        self.events: list[Event] = []
        self.work = Work(
            ids,
            options.pop("edits", ()),
            options.pop("n", 1),
            n_new,
            options.pop("sampling", GREEDY),
            0,
            tell=self.events.append,
            **options,
        )

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece) and event.choice == 0)

    @property
    def over(self) -> bool:
        return any(isinstance(event, End | Refusal) for event in self.events)


def test_a_request_joins_at_the_next_token_and_leaves_at_its_last(model: pb.Model) -> None:
    engine = Engine(model, Room(chunk=64))
    long, short = (
        Heard(model.encode("The")[0], 9, sampling=Sampling(temperature=0, bias=((0, -100.0),))),
        Heard(model.encode("Kate")[0], 2),
    )
    engine.submit([long.work])
    for _ in range(3):
        engine.turn()
    assert [len(engine.lines), long.over] == [1, False]
    engine.submit([short.work])
    engine.turn()
    assert len(engine.lines) == 1  # its first token came with its prompt, its second and last with the batch's next
    assert short.over
    while not long.over:
        engine.turn()
    assert engine.idle
    assert isinstance(long.events[-1], End)
    assert long.events[-1].n == 9


@pytest.mark.parametrize(
    "options", [{}, {"logprobs": 2}, {"stops": ("e",)}, {"n": 2, "sampling": Sampling(temperature=1)}]
)
def test_a_text_that_nobody_hears_before_its_end_is_told_once(model: pb.Model, options: dict[str, Any]) -> None:
    engine = Engine(model, Room())
    ids = model.encode("The capital of Lolavia is")[0]
    heard, whole = Heard(ids, 12, **options), Heard(ids, 12, whole=True, **options)
    engine.submit([heard.work, whole.work])
    while not (heard.over and whole.over and engine.idle):
        engine.turn()
    n = heard.work.n
    assert len(whole.events) == 2 * n  # a piece and an end of each choice
    assert whole.text == heard.text != ""

    def tokens(one: Heard) -> list[Any]:
        return [
            token for event in one.events if isinstance(event, Piece) and not event.choice for token in event.tokens
        ]

    assert tokens(whole) == tokens(heard)
    assert bool(tokens(whole)) == (heard.work.logprobs is not None)
    assert {event for event in whole.events if isinstance(event, End)} == {
        event for event in heard.events if isinstance(event, End)
    }
    assert whole.work.begun < whole.work.first


def test_a_long_prompt_does_not_hold_up_the_others(model: pb.Model) -> None:
    engine = Engine(model, Room(chunk=8))
    first = Heard(model.encode("The")[0], 12, sampling=Sampling(temperature=0, bias=((0, -100.0),)))
    long = Heard([5] * 60, 2)
    engine.submit([first.work])
    engine.turn()
    engine.submit([long.work])
    tokens = []
    while not long.events:
        before = len(first.events)
        engine.turn()
        tokens.append(len(first.events) - before)
    assert len(tokens) == 8  # 60 tokens, 8 at a time
    assert tokens == [1] * 8


def test_room_is_counted_in_rows_times_the_longest(model: pb.Model) -> None:
    engine = Engine(model, Room(batch_tokens=100, rows=8))
    some = [Heard([5] * 20, 10) for _ in range(4)]
    engine.submit([one.work for one in some])
    engine.turn()
    assert len(engine.lines) == 3  # of 30 columns each
    with pytest.raises(Refusal, match=r"4 x \(20 prompt and 10 new tokens\) = 120; this server holds 100"):
        engine.submit([Heard([5] * 20, 10, n=4).work])
    while not all(one.over for one in some):
        engine.turn()
    assert len({one.text for one in some}) == 1


def test_all_works_of_a_request_wait_or_none(model: pb.Model) -> None:
    engine = Engine(model, Room(queue=2))
    with pytest.raises(Refusal) as full:
        engine.submit([Heard([5], 1).work for _ in range(3)])
    assert (full.value.status, len(engine.waiting)) == (429, 0)
    engine.drain()
    with pytest.raises(Refusal) as ending:
        engine.submit([Heard([5], 1).work])
    assert ending.value.status == 503


def test_an_edit_that_does_not_fit_a_prompt_ends_its_request_alone(model: pb.Model) -> None:
    engine = Engine(model, Room())
    far = (pb.zero(model.port("L0.mlp.out"), positions=30),)
    wrong, right = Heard([5, 6, 7], 3, edits=far), Heard([5, 6, 7], 3)
    engine.submit([wrong.work, right.work])
    while not right.over:
        engine.turn()
    assert isinstance(wrong.events[0], Refusal)
    assert wrong.events[0].status == 400
    assert "position 30 is outside prompt" in wrong.events[0].message
    assert isinstance(right.events[-1], End)


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_models_that_do_not_join_are_served_all_the_same(name: str) -> None:
    """Texts one by one, or prompts whole: the tokens are those of generate."""
    model = pb.load(twin(name), pb.load("tiny").tokenizer)
    engine = Engine(model, Room())
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    edits = (pb.add(model.port("L1.resid_out"), vector, positions="generated"),)
    some = [Heard([5, 9, 7, 11], 4, edits=edits), Heard([8, 6, 7], 4, n=2, logprobs=1, echo=True)]
    engine.submit([one.work for one in some])
    while not all(one.over for one in some) or not engine.idle:
        engine.turn()
    for one in some:
        row = model.generate([one.work.ids], 4, edits=list(one.work.edits))[0][len(one.work.ids) :]
        told = [
            event.tokens[0].token
            for event in one.events
            if isinstance(event, Piece) and event.choice == 0 and event.tokens
        ]
        assert told == row or one.text == model.decode(row)


def test_nothing_grows(model: pb.Model) -> None:
    """As many tensors after ninety requests, some of which were left, as after sixty."""
    engine, counts = Engine(model, Room(rows=4)), []
    edits = (pb.scale(model.port("L1.H1.z"), 0.0),)
    for round in range(3):
        for at in range(30):
            one = Heard([5 + at % 20] * (2 + at % 5), 3, edits=edits if at % 2 else ())
            engine.submit([one.work])
            engine.turn()
            if at % 7 == 0:
                engine.cancel([one.work])
        while not engine.idle:
            engine.turn()
        if round:
            gc.collect()
            counts.append(sum(isinstance(found, torch.Tensor) for found in gc.get_objects()))
    assert counts[0] == counts[1]
    assert engine.joined.cache is None


def test_prompts_of_one_length_run_once_and_one_that_fails_does_not_take_the_others_along(
    model: pb.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runs = Engine(model, Room()), []
    plain = type(model.hf).forward
    monkeypatch.setattr(
        type(model.hf), "forward", lambda self, ids, **more: (runs.append(len(ids)), plain(self, ids, **more))[1]
    )
    some = [Heard([5 + i, 6, 7], 1, n=1 + i % 2) for i in range(4)]
    engine.submit([one.work for one in some])
    engine.turn()
    assert runs == [4]
    assert all(one.over for one in some)
    monkeypatch.undo()
    wrong = Heard([5, 6, 7], 3, edits=(pb.zero(model.port("L0.mlp.out"), positions=30),))
    right = [Heard([5, 6, 7], 3, n=2), Heard([8, 6, 7], 3)]
    engine.submit([right[0].work, wrong.work, right[1].work])
    while not all(one.over for one in [wrong, *right]):
        engine.turn()
    assert isinstance(wrong.events[0], Refusal)
    for one in right:
        ids = model.generate([one.work.ids], 3)[0][3:]
        assert one.text == model.tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[union-attr]
