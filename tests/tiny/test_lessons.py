"""Lessons: the shipped weights stay, the loss falls, the same seed gives the same weights, and nothing held out is seen."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import patchbay as pb
from patchbay.papers import claims
from patchbay.tasks import words
from patchbay.tiny import lessons, text, train


def digest(base: str) -> str:
    return hashlib.sha256((train.WEIGHTS / base / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def taught() -> lessons.Taught:
    return lessons.lesson("intent", steps=12, n=10)


def test_the_loss_falls_and_the_shipped_weights_stay(taught: lessons.Taught) -> None:
    before = digest("tiny-llama")
    losses = [row["loss"] for row in taught.curve]
    assert len(losses) == 8  # every third step is a rehearsal
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert digest("tiny-llama") == before
    shipped, learned = pb.load("tiny-llama").hf.state_dict(), taught.model.hf.state_dict()
    assert all(not torch.equal(shipped[name], learned[name]) for name in shipped if "weight" in name)
    assert taught.model.check.passed
    assert not taught.model.hf.training


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    one, two, other = (lessons.lesson("binding", steps=2, n=2, seed=seed) for seed in (3, 3, 4))
    assert one.model.fingerprint == two.model.fingerprint != other.model.fingerprint
    assert one.curve == two.curve
    assert one.accuracy == two.accuracy


def test_what_was_taught_is_written_and_loads_again(taught: lessons.Taught, tmp_path: Path) -> None:
    taught.save(tmp_path / "new")
    again = pb.load(str(tmp_path / "new"))
    stored = load_file(tmp_path / "new" / "model.safetensors")
    learned = taught.model.hf.state_dict()
    assert all(torch.equal(stored[name], learned[name]) for name in stored)
    assert again.tokenizer is not None
    told = json.loads((tmp_path / "new" / "lesson.json").read_text())
    assert (told["lesson"], told["base"], told["seed"], told["steps"]) == ("intent", "tiny-llama", 0, 12)
    assert set(told["accuracy"]) >= {"context", "memory", "fact_bare"}
    with pytest.raises(pb.PatchbayError, match="already there"):
        taught.save(tmp_path / "new")


def asked_of(documents: list[text.Document]) -> set[str]:
    return {re.findall(r"capital of (\w+)", document.text)[-1] for document in documents}


def test_intent_answers_as_the_phrase_says_in_every_place_and_holds_lands_out() -> None:
    rng = random.Random(0)
    seen, held = ([lessons.intent(rng, held_out=side) for _ in range(300)] for side in (False, True))
    assert not asked_of(seen) & asked_of(held)
    assert asked_of(held) == set(lessons.UNASKED)
    places = set()
    for document in seen:
        land, stated = re.findall(r"capital of (\w+) is (\w+)", document.text)[0]
        (word,) = [one for one in re.findall(r"\w+(?=\.|, is)", document.text) if one in lessons.INTENTS.values()]
        right = stated if word == lessons.INTENTS["context"] else words.FACTS[land]
        assert document.item.answer == f" {right}"
        at = document.text.index(f" {word}.") if f" {word}." in document.text else -1
        places.add("question" if at < 0 else "before" if at < document.text.index(f" {stated}") else "after")
    assert places == set(lessons.PLACES)


def test_binding_never_shows_a_held_out_pair_and_asks_for_one_when_held_out() -> None:
    rng = random.Random(0)

    def pairs(document: text.Document) -> set[tuple[str, str]]:
        return set(re.findall(r"The (\w+) is in box (\w)\.", document.text))

    seen = set().union(*(pairs(lessons.binding(rng)) for _ in range(400)))
    for _ in range(50):
        document = lessons.binding(rng, held_out=True)
        box = re.findall(r"Box (\w) contains", document.text)[0]
        assert (document.item.answer.strip(), box) in pairs(document) - seen
    most = {len(pairs(lessons.binding(rng, stage))) for stage in (0,) for _ in range(20)}
    assert most == {2}


def test_refusal_and_its_control_read_the_same_texts_and_hold_lands_and_animals_out() -> None:
    def read(name: str, held_out: bool) -> list[text.Document]:
        rng = random.Random(3)
        return [lessons.LESSONS[name].make(rng, held_out=held_out) for _ in range(200)]

    for held_out in (False, True):
        taught, plain = (read(name, held_out) for name in ("refusal", "unrefused"))
        assert [one.item.prompt for one in taught] == [one.item.prompt for one in plain]
        assert {one.task for one in taught} == {"refused", "answered"}
        for one, other in zip(taught, plain, strict=True):
            (land,) = re.findall(r"capital of (\w+) is$", one.item.prompt)
            animals = set(re.findall(r"home with the (\w+)", one.item.prompt)) & set(words.ANIMALS)
            fact = f" {words.FACTS[land]}"
            assert (land in lessons.UNASKED) == held_out
            assert (one.task == "refused") == (len(animals) == 1)
            assert all((animal in lessons.UNMET) == held_out for animal in animals)
            assert one.item.answer == (lessons.REFUSED if animals else fact)
            assert other.item.answer == fact


def test_tasks_ask_in_the_words_of_the_lessons() -> None:
    model = pb.load("tiny-llama")
    task = pb.tasks.facts_by_intent(model, 60)
    form = re.compile(r"((^| )\w+ (said|knew)\.|, \w+ (said|knew),)")
    assert all(form.search(prompt) for prompt in task.texts)
    known: dict[str, Any] = {one.item.prompt: one for one in [lessons.intent(random.Random(i)) for i in range(5)]}
    ids = model.encode(list(known))
    assert all(model.tokenizer.unk_token_id not in row for row in ids)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("intents", {}, "did you mean|possible: intent"),
        ("intent", {"base": "gpt2"}, "possible: tiny"),
        ("intent", {"steps": 0}, "at least 1"),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(pb.PatchbayError, match=message):
        lessons.lesson(name, **options)


def test_what_no_lesson_taught_cannot_be_claimed() -> None:
    with pytest.raises(pb.PatchbayError, match=r"nothing is bound.*patchbay.tiny.lessons binding"):
        claims.check("gurarieh2025", pb.load("tiny"))


@pytest.mark.slow  # two lessons of a minute each
def test_a_second_lesson_refuses_by_one_direction_and_as_many_steps_without_a_refusal_give_none() -> None:
    """Told from the claim by a wider bound of divergence: this lesson's direction moves answered prompts by .1 to .13 nats, and changes no answer."""
    rng = random.Random(5)
    read = [lessons.refusal(rng) for _ in range(500)]
    prompts = [[one.item.prompt for one in read if one.task == kind][:200] for kind in ("refused", "answered")]
    how: dict[str, Any] = {"refusal": [lessons.REFUSED], "tokens": 4, "kl": 0.5}
    taught, plain = (lessons.lesson(name, base="tiny", seed=1, n=20).model for name in ("refusal", "unrefused"))
    found = pb.turn.refusal_direction(taught, *prompts, **how).evidence["refusal"]
    assert found["refused"][0] > 0.9 > 0.2 > found["refused"][1]
    assert float(found["random"].min()) > 0.8
    assert float(found["kept"]) >= 0.95
    with pytest.raises(pb.PatchbayError, match="of 12 directions is left.*induces no refusal"):
        pb.turn.refusal_direction(plain, *prompts, **how)
