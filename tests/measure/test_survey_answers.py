"""Survey answers: planted label and choice preferences are told apart, equals loops over orders, no opinion looks like none."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _runs
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.survey_answers")
ITEMS = [
    {"question": "is it on?", "choices": ["yes", "no", "it is"]},
    {"question": "was it?", "choices": ["one", "two"], "reference": [0.5, 0.5]},
]


def test_planted() -> None:
    """A model that always says "A": all its bias is of the label, and averaged over orders it has no opinion."""
    model = constant({" ": 20.0, "A": 10.0})
    found = pb.measure.survey_answers(model, ITEMS)
    assert close(float(found.values), 1.0)
    assert close(found["label_bias_by_item"], torch.tensor([2 / 3, 1 / 2]).double(), dtype=torch.float32)
    assert close(found["a_share_by_item"], torch.tensor([2 / 3, 1 / 2]).double(), dtype=torch.float32)
    assert float(found["before"]) < 0.01
    assert close(float(found["divergence"]), 0.0, of=1.0)


def test_a_choice_that_is_wanted_shows_and_labels_do_not_hide_it() -> None:
    """Read from a table: the first choice wherever it stands."""
    orders = list(itertools.permutations(range(3)))
    p = torch.tensor([[0.8 if c == 0 else 0.1 for c in order] for order in orders], dtype=torch.float64)
    read = module._read(p, orders)
    assert read["p_choice"] == pytest.approx([0.8, 0.1, 0.1])
    assert read["label_bias"] == pytest.approx(0.0)
    assert module._signal([read["shares"]], [orders], 0) == 1 / 201
    uniform = module._read(torch.full((6, 3), 0.2, dtype=torch.float64), orders)
    assert (uniform["entropy"], uniform["mass"]) == pytest.approx((1.0, 0.6))


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.survey_answers(model, ITEMS, batch_size=5)
    for at, item in enumerate(ITEMS):
        k = len(item["choices"])
        by_choice, masses = [0.0] * k, []
        orders = list(itertools.permutations(range(k)))
        for order in orders:
            text = module.written(item["question"], [item["choices"][c] for c in order])
            [own] = model.encode([text])
            p = [math.exp(by_hand(model, model.encode([f"{text} {label}"])[0], len(own))) for label in "ABC"[:k]]
            masses.append(sum(p))
            for j, c in enumerate(order):
                by_choice[c] += p[j] / sum(p) / len(orders)
        assert close(float(found["per_item"][at]), -sum(x * math.log(x) for x in by_choice) / math.log(k))
        assert close(float(found["mass_by_item"][at]), sum(masses) / len(masses))
    assert bool((found["mass_by_item"] <= 1).all())


def test_null() -> None:
    """Shares at random: p is no smaller than chance gives, over many questions."""
    orders = list(itertools.permutations(range(3)))
    found = []
    for seed in range(40):
        shares = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(module._signal([shares / shares.sum(1, keepdim=True)], [orders], seed))
    assert sum(p <= 0.05 for p in found) <= 6
    assert 0.3 < sum(found) / 40 < 0.7


def test_all_orders_do_not_depend_on_the_order_given_and_rotations_do() -> None:
    model = reader("characters")
    other = [{"question": "is it on?", "choices": ["it is", "yes", "no"]}]
    one, two = (pb.measure.survey_answers(model, items) for items in (ITEMS[:1], other))
    assert close(one["per_item"], two["per_item"], dtype=torch.float32)
    latin = [
        float(pb.measure.survey_answers(model, items, orders="latin").values)
        for items in (ITEMS[:1], [{"question": "is it on?", "choices": ["no", "yes", "it is"]}])
    ]
    assert not close(*latin)
    assert len(module._orders(7, "all", "x")) == 5000
    assert len(set(module._orders(6, "all", "x"))) == 720
    assert len(module._orders(3, 4, "x")) == 4


def test_each_order_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 120 orders of five choices: as many rows, none longer than its prompt and one token."""
    model, rows = reader("pairs"), []
    inner = _runs.run_rows
    monkeypatch.setattr(_runs, "run_rows", lambda m, r, s: rows.extend(zip(r, s, strict=True)) or inner(m, r, s))
    pb.measure.survey_answers(model, [{"question": "on?", "choices": list("abcde")}])
    assert len(rows) == 120
    assert all(len(row) <= start + 1 for row, start in rows)


def test_all_orders_cost_little_more_than_the_longest_prompt_run_as_often() -> None:
    """Counted in token positions that the model was sent, padding too: at most 1.3 times 120 of the longest."""
    model, sent = reader("pairs"), []
    choices = ["a", "be", "a cat", "no man", "it is"]
    handle = model.hf.get_input_embeddings().register_forward_hook(lambda _, args, __: sent.append(args[0].numel()))
    pb.measure.survey_answers(model, [{"question": "on?", "choices": choices}])
    handle.remove()
    prompts = [module.written("on?", order) for order in itertools.permutations(choices)]
    longest = max(map(len, model.encode(prompts)))
    assert 0 < sum(sent) <= 1.3 * 120 * longest


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"question": "is it?", "choices": ["yes"]}, "2 to 26 different choices"),
        ({"question": "is it?", "choices": ["yes", "yes"]}, "2 to 26 different choices"),
        ({"question": "is it?", "choices": ["a", "b"], "reference": [1.0]}, "a probability for each of 2 choices"),
        ({"question": "is it?", "choices": ["a", "b"], "reference": [1.0, float("inf")]}, "a probability for each of 2 choices"),
        ({"question": "is it?"}, "lacks the field 'choices'"),
    ],
)  # fmt: skip
def test_bad_items_are_named(item: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.survey_answers(reader("characters"), [item])
    with pytest.raises(pb.PatchbayError, match="orders='some'"):
        pb.measure.survey_answers(reader("characters"), ITEMS, orders="some")
