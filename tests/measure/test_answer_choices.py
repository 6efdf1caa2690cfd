"""Answer choices: planted probabilities are read back, equals loops over Hugging Face's logits, prompts that say nothing show nothing."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure._asked import hit
from patchbay.tiny import planted
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.answer_choices")
ITEMS = [
    {"prompt": "the cat", "choices": [" sat", " ran", " is"], "answer": " ran", "premise": "a thing"},
    {"prompt": "a dog on", "choices": [" it", " the mat"], "answer": 0, "premise": "a thing"},
    {"prompt": "On", "choices": [" an", " the"], "answer": "1", "premise": "On"},
]


def test_planted() -> None:
    """A model that knows its relations answers all; silenced, it has no answer, and its items become affected."""
    built = planted.relation_neuron(seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    items = [
        {"prompt": p, "choices": [r, w], "answer": r}
        for p, r, w in zip(truth["prompts"], truth["answers"], truth["wrong"], strict=True)
    ]
    found = pb.measure.answer_choices(model, items)
    assert float(found.values) == 1.0
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    assert torch.equal(pb.measure.answer_choices(model, task)["per_item"], found["per_item"])
    with model.edited(*(pb.scale(pb.Part(*_place(text)).port(), -1.0) for text in truth["neurons"].values())):
        turned = pb.measure.answer_choices(model, items)
    assert float(turned.values) == 0.0
    assert float(turned["attentiveness"]) <= 1.0


def _place(text: str) -> tuple[int, str, int]:
    part = (
        pb.Part.parse(text)
        if hasattr(pb.Part, "parse")
        else importlib.import_module("patchbay.signal.port").parse_part(text)
    )
    return part.layer, part.kind, part.index


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.answer_choices(model, ITEMS, batch_size=2)
    mass, right, unaffected = [], [], []
    for item in ITEMS:
        [own] = model.encode([item["prompt"]])
        p = [math.exp(by_hand(model, model.encode([item["prompt"] + c])[0], len(own))) for c in item["choices"]]
        place = item["choices"].index(item["answer"]) if item["answer"] in item["choices"] else int(item["answer"])
        right.append(float(p.index(max(p)) == place))
        mass.append(sum(p))
        top = sorted(p, reverse=True)
        unaffected.append(float(1 - sum(p) < top[0] - top[1]))
    assert close(found["mass"], torch.tensor(mass).double(), dtype=torch.float32)
    assert found["per_item"].tolist() == right
    assert close(float(found["attentiveness"]), sum(mass) / 3)
    assert float(found["unaffected"]) == sum(unaffected) / 3
    assert close(float(found["chance"]), (1 / 3 + 1 / 2 + 1 / 2) / 3)
    by_pmi = pb.measure.answer_choices(model, ITEMS, norm="pmi")
    assert {row["norm"] for row in by_pmi.tables["norms"]} == {"sum", "token", "char", "byte", "pmi"}


def test_null() -> None:
    """Items whose answers are dealt at random: as many right as with the prompts of others, and p is not small."""
    model = reader("characters")
    items = [
        {"prompt": f"item {i}", "choices": [f" {i % 7}a", f" {i % 5}b"], "answer": (i * 7919 >> 3) % 2}
        for i in range(60)
    ]
    found = pb.measure.answer_choices(model, items)
    assert float(found["low"]) <= 0.5 <= float(found["high"])
    assert float(found["p"]) > 0.05


def test_pmi_of_a_premise_that_is_the_prompt_is_zero_for_all() -> None:
    model = reader("pairs")
    items = [{**item, "premise": item["prompt"]} for item in ITEMS]
    found = pb.measure.answer_choices(model, items, norm="pmi")
    assert close(float(found.values), float(found["chance"]))  # all equal: the answer is shared


def test_no_unaffected_item_flips_when_the_lost_mass_goes_to_the_second() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, 4, generator=generator, dtype=torch.float64)
    p = p / p.sum(1, keepdim=True) * torch.rand(20_000, 1, generator=generator, dtype=torch.float64)
    mass = p.sum(1)
    safe = module._unaffected(p.log(), mass).bool()
    top = p.topk(2, 1).values
    gone = top[:, 1] + 1 - mass >= top[:, 0]
    assert not bool((safe & gone).any())
    assert bool((safe | gone).all())  # and each other one can flip
    assert 0.05 < float(safe.double().mean()) < 0.95


def test_equal_scores_share_the_answer() -> None:
    values = torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, float("nan")]])
    assert hit(values, torch.tensor([1, 0])).tolist() == [0.5, 1.0]


def test_a_choice_that_all_prefer_gains_nothing_over_other_prompts() -> None:
    """The null keeps each item's choices and takes another item's prompt."""
    model = reader("characters")
    items = [{"prompt": f"item {i}", "choices": [" a", " the long way round"], "answer": 0} for i in range(12)]
    found = pb.measure.answer_choices(model, items)
    assert float(found.values) == float(found["null"]) == 1.0
    assert float(found["p"]) == 1.0


def test_the_null_takes_another_items_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt once, none its own, the choices as they were."""
    seen: list[Any] = []
    inner = module.score
    monkeypatch.setattr(
        module, "score", lambda model, spelled, **how: seen.append(spelled) or inner(model, spelled, **how)
    )
    items = [{"prompt": f"item {i}", "choices": [" a", " b"], "answer": 0} for i in range(9)]
    pb.measure.answer_choices(reader("characters"), items)
    own, other = seen
    assert sorted(own.prompts) == sorted(other.prompts)
    assert all(a != b for a, b in zip(own.prompts, other.prompts, strict=True))
    assert own.answers == other.answers


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"prompt": "the", "choices": [" a", " b"], "answer": " c"}, "the answer ' c' is none of the choices ' a', ' b'"),
        ({"prompt": "the", "choices": [" a", " b"], "answer": 2}, "no place from 0 to 1"),
        ({"prompt": "the", "choices": [" a"], "answer": 0}, "one choice"),
        ({"prompt": "the", "choices": [" a", " a"], "answer": 0}, "twice"),
        ({"prompt": "the", "choices": [" a", " an"], "answer": 0}, "begins the choice ' an'"),
        ({"prompt": "the", "choices": 7, "answer": 0}, "choices is a list, got int"),
        ({"prompt": "the", "answer": 0}, "items, row 1 lacks the field 'choices'"),
        ({"prompt": 5, "choices": [" a", " b"], "answer": 0}, "prompt is a text, or a list of token ids, got int"),
    ],
)  # fmt: skip
def test_bad_items_are_named(item: dict[str, Any], said: str) -> None:
    good = {"prompt": "a", "choices": [" x", " y"], "answer": 0}
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.answer_choices(reader("characters"), [good, item])


def test_some_premises_are_refused_and_pmi_needs_them() -> None:
    model = reader("characters")
    with pytest.raises(pb.PatchbayError, match="1 of 2 items have a premise"):
        pb.measure.answer_choices(model, [ITEMS[0], {k: v for k, v in ITEMS[1].items() if k != "premise"}])
    with pytest.raises(pb.PatchbayError, match="pmi needs premises"):
        pb.measure.answer_choices(
            model, [{k: v for k, v in item.items() if k != "premise"} for item in ITEMS], norm="pmi"
        )


def test_label_tokens_are_a_verbaliser() -> None:
    """The full softmax, renormalised over labels of one token, is the softmax of their logits alone; in another order the labels are the same."""
    model = reader(NAMES[0])
    items = [
        {"prompt": "the cat", "choices": ["s", "r", "i"], "answer": 1},
        {"prompt": "On", "choices": ["a", "t", "."], "answer": 2},
    ]
    found = pb.measure.answer_choices(model, items)
    for item, mass in zip(items, found["mass"].tolist(), strict=True):
        [own] = model.encode([item["prompt"]])
        labels = [model.encode([item["prompt"] + label])[0][-1] for label in item["choices"]]
        logits = pb.run(model, [own], logits="last").last_logits[0].double()
        restricted = torch.softmax(logits[labels], 0)
        assert close(torch.softmax(logits, 0)[labels] / mass, restricted, of=1.0, dtype=torch.float32)
        right = int(restricted.argmax()) == item["answer"]
        assert float(found["per_item"][items.index(item)]) == right
    turned = [{**one, "choices": one["choices"][::-1], "answer": 2 - one["answer"]} for one in items]  # type: ignore[index, operator]
    other = pb.measure.answer_choices(model, turned)
    assert torch.equal(other["per_item"], found["per_item"])
    assert close(other["mass"], found["mass"])
