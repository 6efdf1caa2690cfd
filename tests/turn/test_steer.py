"""turn.steer: finds the planted direction and moves the planted word by the closed form; swapped pairs find nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from patchbay.turn._contrast import apart, direction
from patchbay.turn._pairs import groups_of
from tests.tolerance import close


def pairs(truth: Any, n: int = 24) -> pb.Task:
    """One-word prompts that carry the direction, twins that carry its opposite; right is the word that reads it."""
    plus, minus, word = truth["positive_ids"][:n], truth["negative_ids"][:n], truth["token_id"]
    spare = next(i for i in range(3, 60) if i not in plus + minus and i != word)
    return pb.Task("sides", [[a] for a in plus], [word] * n, [[spare]] * n, [[b] for b in minus])


@pytest.mark.parametrize("way", ["mean", "pca", "probe"])
def test_planted(way: Any) -> None:
    built = planted.steering(form="llama", seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    knob = pb.turn.steer(model, pairs(truth), way=way)
    vector, steering = knob.edits[0].value, knob.evidence["steering"]
    assert torch.cosine_similarity(vector, truth["direction"], dim=0) > (0.5 if way == "probe" else 0.8)
    layer = knob.edits[0].port.layer
    assert steering["auc"][layer] > 0.95
    assert steering["auc_low"][layer] > steering["null_mean"][layer]
    assert 0 < steering["p"][layer] < 0.05
    assert steering["low"][layer] > steering["random"][layer]
    assert steering.highlights[0].layer == layer
    # strength 1 takes the twins' word, at -strength without, about to +strength, by the closed form of the planted model
    along = float(vector @ truth["direction"])
    rest = float(vector.norm()) ** 2 - along**2
    square = truth["square_norm"] + rest - 2 * along + along**2
    expected = truth["strength"] * (along - 1) * math.sqrt(model.d_model / square)
    twins = list((pairs(truth).corrupted or ())[12:])
    found = pb.run(model, twins, edits=[knob]).last_logits[:, truth["token_id"]]
    assert found.mean() == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("way", ["mean", "pca", "probe"])
def test_reference(way: str) -> None:
    """The three directions by other means: loops, an eigenvector of the moment matrix, gradient descent."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(20, 6, generator=generator).double() for _ in range(2))
    positive[:, 2] += 1.5
    found = direction(positive, negative, way)
    means = torch.tensor([[float(sum(row[i] for row in x)) / 20 for i in range(6)] for x in (positive, negative)])
    gap = (means[0] - means[1]).double()
    if way == "mean":
        assert close(found, gap)
        return
    if way == "pca":
        unit = torch.ones(6).double()
        moment = sum(torch.outer(d, d) for d in positive - negative)
        for _ in range(3000):
            unit = moment @ unit
            unit = unit / unit.norm()
    else:
        x = torch.cat([positive, negative])
        x = (x - x.mean(0)) / (x - x.mean(0)).pow(2).mean().sqrt()
        y = torch.tensor([1.0] * 20 + [0.0] * 20).double()
        unit, bias = torch.zeros(6).double(), torch.zeros(()).double()
        for _ in range(4000):
            wrong = (x @ unit + bias).sigmoid() - y
            unit, bias = unit - 0.5 * ((wrong @ x) / 40 + unit / 40), bias - 0.5 * wrong.mean()
        unit = unit / unit.norm()
    assert torch.allclose(found, unit * (gap @ unit), atol=2e-3)
    assert found @ gap > 0


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 2.0])
    by_hand = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a.tolist() for y in b.tolist()]
    assert float(apart(a, b)) == pytest.approx(sum(by_hand) / 6)


def test_null() -> None:
    """Pairs drawn from one and the same group: not told apart, and the knob says so; at 0 it is not there."""
    built = planted.steering(form="llama", seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    one = truth["positive_ids"]
    word = truth["token_id"]
    task = pb.Task("same", [[a] for a in one[:14]], [word] * 14, [[one[-1]]] * 14, [[b] for b in one[14:28]])
    knob = pb.turn.steer(model, task)
    steering = knob.evidence["steering"]
    layer = knob.edits[0].port.layer
    assert steering["p"][layer] > 0.05
    assert any("does NOT tell" in note for note in steering.notes)
    plain = pb.run(model, task).logits
    assert torch.equal(pb.run(model, task, edits=[knob.at(0.0)]).logits, plain)


def test_layers_choice_and_positions_are_as_asked() -> None:
    built = planted.steering(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    knob = pb.turn.steer(model, pairs(truth), layers=[1], choose="separation", positions="last")
    assert str(knob.edits[0]) == "add(L1.resid_out, tensor[256], positions='last')"
    assert knob.evidence["steering"]["effect"].isnan().tolist() == [True, False]
    assert knob.provenance["options"]["choose"] == "separation"
    again = pb.turn.steer(model, pairs(truth), layers=[1], choose="separation", positions="last", batch_size=5)
    assert close(again.edits[0].value, knob.edits[0].value)


@pytest.mark.parametrize("way", ["mean", "pca", "probe"])
def test_two_lists_are_enough(way: Any) -> None:
    """No answers and, but for pca, groups of two sizes: the planted direction again; dealt out anew, nothing."""
    built = planted.steering(form="llama", seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    plus, minus = (
        [[a] for a in truth["positive_ids"][:24]],
        [[b] for b in truth["negative_ids"][: 24 if way == "pca" else 17]],
    )
    knob = pb.turn.steer(model, positive=plus, negative=minus, way=way)
    steering = knob.evidence["steering"]
    layer = knob.edits[0].port.layer
    assert torch.cosine_similarity(knob.edits[0].value, truth["direction"], dim=0) > (0.5 if way == "probe" else 0.8)
    assert steering["auc"][layer] > 0.95
    assert steering["p"][layer] < 0.05
    assert "effect" not in steering.data
    assert any("have no answers" in note for note in steering.notes)
    assert knob.provenance["options"]["positive"] == plus
    one = [[a] for a in truth["positive_ids"][:30]]
    cut = 15 if way == "pca" else 16
    same = pb.turn.steer(model, positive=one[:cut], negative=one[cut:], way=way).evidence["steering"]
    assert same["p"][int(same["auc_dev"].argmax())] > 0.05


def test_a_direction_of_two_sizes_is_the_difference_of_means() -> None:
    """By hand, on the half that the split names: the mean of the streams of one group less that of the other."""
    built = planted.steering(form="llama", seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    plus, minus = [[a] for a in truth["positive_ids"][:9]], [[b] for b in truth["negative_ids"][:5]]
    knob, stream = pb.turn.steer(model, positive=plus, negative=minus, layers=[0]), model.layers[0].resid_out
    half = groups_of(model, None, plus, minus, "mean").split(0)[0]
    assert (len(half.positive), len(half.negative)) == (4, 2)
    sides = [torch.stack([pb.run(model, [ids], taps=[stream])[stream][0, -1] for ids in side]) for side in (half.positive, half.negative)]  # fmt: skip
    assert close(knob.edits[0].value, sides[0].mean(0) - sides[1].mean(0), of=sides[0])


def test_copies_of_a_prompt_are_in_one_half() -> None:
    built = planted.steering(form="llama", seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    plus, minus = [[a] for a in truth["positive_ids"][:6]] * 2, [[b] for b in truth["negative_ids"][:6]] * 2
    for way in ("mean", "pca"):
        one, other = groups_of(model, None, plus, minus, way).split(3)
        assert len(one.positive) == len(other.positive) == 6
        for side in ("positive", "negative"):
            a, b = ({tuple(ids) for ids in getattr(half, side)} for half in (one, other))
            assert not a & b


def test_twins_without_answers_are_pairs() -> None:
    built = planted.steering(form="llama", seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    whole = pairs(truth)
    bare = pb.Task("sides", whole.clean, corrupted=whole.corrupted, metric="kl")
    knob = pb.turn.steer(model, bare)
    same = pb.turn.steer(model, whole, choose="separation")
    assert "effect" not in knob.evidence["steering"].data
    assert torch.equal(knob.evidence["steering"]["null_high"], same.evidence["steering"]["null_high"])


def test_what_two_lists_cannot_give_is_refused() -> None:
    built = planted.steering(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    plus, minus = [[a] for a in truth["positive_ids"][:8]], [[b] for b in truth["negative_ids"][:6]]
    for given, message in (
        ({"positive": plus, "negative": minus, "way": "pca"}, "within pairs, and there are 8 positive and 6 negative"),
        ({"positive": plus, "negative": minus, "choose": "effect"}, "needs answers .* possible: 'separation'"),
        ({"positive": plus}, "give a task with twins, or both positive"),
        ({}, "give a task with twins, or both positive"),
        ({"task": pairs(truth), "positive": plus, "negative": minus}, "give a task with twins, or both"),
        ({"positive": "text", "negative": minus}, "positive: a list of texts is needed, got str 'text'"),
        ({"positive": plus, "negative": minus[:3]}, "8 positive and 3 negative: 2 different ones to fit on"),
        ({"positive": plus, "negative": minus[:3] * 3}, "8 positive and 9 negative: 2 different ones"),
        ({"positive": plus, "negative": [*minus, plus[2]]}, "stands in both groups"),
        ({"task": "text"}, "task takes a Task, got str 'text'"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.turn.steer(model, **given)


def test_errors() -> None:
    built = planted.steering(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pairs(truth)
    for given, options, message in (
        (task, {"way": "svm"}, "ways are mean, pca, probe"),
        (task, {"choose": "best"}, "by effect or separation"),
        (task, {"layers": [7]}, "possible are 0 to 1"),
        (task[:3], {}, "2 different ones to fit on and 2 to hold out"),
        (pb.Task("x", task.clean, task.right, task.wrong), {}, "no corrupted twins"),
        (task, {"positions": "first"}, "written"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.turn.steer(model, given, **options)
