"""Binding heads: the planted one on pairs of words, the definition as loops, nothing where nothing is bound."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find.binding_heads import DRAWS, _dealt
from patchbay.tiny import planted
from tests.given import llama
from tests.tolerance import close


def pairs(n: int, n_pairs: int = 4, seed: int = 0, vocab: int = 60) -> pb.Task:
    """k1 v1 k2 v2 ... and then one of the keys: the answer is its value."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        words = rng.sample(range(3, vocab), 2 * n_pairs + 1)
        asked = rng.randrange(n_pairs)
        rows.append((words[:-1], asked, words[-1]))
    places = [1 + 2 * j for j in range(n_pairs)]
    clean = [[filler, *words, words[2 * asked]] for words, asked, filler in rows]
    return pb.Task(
        "pairs",
        clean,
        [words[2 * asked + 1] for words, asked, _ in rows],
        [[words[2 * j + 1] for j in range(n_pairs) if j != asked] for words, asked, _ in rows],
        marks={
            "boxes": [places] * n,
            "objects": [[p + 1 for p in places]] * n,
            "answer": [[places[asked] + 1] for _, asked, _ in rows],
        },
    )


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """An induction head binds keys to what follows them; the previous-token head of its circuit does the pairing."""
    built = planted.induction(form=form, seed=0)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.binding_heads(model, pairs(16))
    best, second = result.table(2)
    assert str(best["part"]) == built.truth["induction"]
    assert best["value"] > 0.9
    assert best["answer"] > 0.9
    assert best["p_adjusted"] <= 0.05
    assert best["null_high"] < 0.5
    assert best["without_first"] == pytest.approx(best["value"], abs=0.02)
    assert second["value"] < 0.15
    assert float(result["held_out"]) > 0.9
    pairing = next(row for row in result.table() if str(row["part"]) == built.truth["previous_token"])
    assert pairing["pairing"] > 0.9
    assert pairing["pairing_null"] < 0.1


def test_a_head_that_looks_at_one_place_is_no_binding_head() -> None:
    """All attention on the second candidate: its score is as high as that pair is asked often, and so is that of the deals."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pairs(12)
    n = len(task.clean[0])
    fixed = torch.zeros(n, n)
    fixed[:, 0] = 1.0
    fixed[-1] = torch.nn.functional.one_hot(torch.tensor(task.marks["objects"][0][1]), n).float()
    with model.edited(pb.replace(model.layers[0].attn.pattern, fixed.expand(4, n, n).movedim(1, 0)[None])):
        result = pb.find.binding_heads(model, task)
    assert (result["p"][0] == 1.0).all()
    often = sum(places[0] == task.marks["objects"][0][1] for places in task.marks["answer"]) / 12
    assert close(result.values[0], torch.full((4,), often - (1 - often) / 3), of=1.0)


def test_reference() -> None:
    """The formulas as loops over Hugging Face's own attentions; the mean over all deals of the asked places is the exact null."""
    hf = llama(2, sharpness=60)
    task = pairs(6, n_pairs=3, seed=1, vocab=90)
    result = pb.find.binding_heads(pb.load(hf), task, batch_size=4)
    hf.set_attn_implementation("eager")
    score, partner, bare, pairing, back = (torch.zeros(2, 4) for _ in range(5))
    for n, ids in enumerate(task.clean):
        with torch.no_grad():
            attentions = hf(torch.tensor([ids]), output_attentions=True).attentions
        objects, boxes, (answer,) = (task.marks[m][n] for m in ("objects", "boxes", "answer"))
        asked = objects.index(answer)
        for i in range(2):
            for h in range(4):
                a = attentions[i][0, h]
                others = [float(a[-1, objects[j]]) for j in range(3) if j != asked]
                gap = float(a[-1, answer]) - sum(others) / 2
                score[i, h] += gap / 6
                bare[i, h] += gap / (1 - float(a[-1, 0])) / 6
                others = [float(a[-1, boxes[j]]) for j in range(3) if j != asked]
                partner[i, h] += (float(a[-1, boxes[asked]]) - sum(others) / 2) / 6
                pairing[i, h] += sum(float(a[objects[j], boxes[j]]) for j in range(3)) / 3 / 6
                back[i, h] += sum(float(a[objects[j], boxes[j - 1]]) for j in (1, 2)) / 2 / 6
    assert close(result.values, score)
    assert close(result["partner"], partner)
    assert close(result["without_first"], bare)
    assert close(result["pairing"], pairing)
    assert (result["pairing_null"] >= back - 1e-6).all()


def test_null() -> None:
    built = planted.null(seed=1)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.binding_heads(model, pairs(24))
    assert (result["p_adjusted"] > 0.05).all()
    assert result.values.abs().max() < 0.1


@pytest.mark.parametrize("query", ["box", "object"])
def test_on_the_task(query: str) -> None:
    """The built-in task has what it takes, asked either way; the candidates are the things or the boxes."""
    model = pb.load("tiny-llama")
    result = pb.find.binding_heads(model, pb.tasks.entity_binding(model, 6, query=query))
    assert result.values.isfinite().all()


def test_errors() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="lacks objects, boxes, answer.*entity_binding"):
        pb.find.binding_heads(model, pb.tasks.repeated_tokens(model, 3))
    task = pairs(3)
    lost = pb.Task("lost", task.clean, task.right, task.wrong, marks={**task.marks, "answer": [[0]] * 3})
    with pytest.raises(pb.PatchbayError, match="prompt 0: the answer at"):
        pb.find.binding_heads(model, lost)
    two, three = pairs(2, 2), pairs(2, 3)
    with pytest.raises(pb.PatchbayError, match=r"prompts have \[2, 3\] pairs"):
        pb.find.binding_heads(model, pb.Task.joined([two, three]))


def test_from_another_token_and_to_what_stands_behind_the_pair() -> None:
    """A head that looks, from the question's key, at the token behind the asked pair: seen by `span` from there, else by nothing."""
    built = planted.null(seed=0)
    model, task = pb.load(built.model, built.tokenizer), pairs(24, n_pairs=3)
    spaced = []
    for ids, boxes in zip(task.clean, task.marks["boxes"], strict=True):
        body = [token for at in boxes for token in (ids[at], ids[at + 1], 2)]  # a full stop behind every pair
        spaced.append([ids[0], *body, ids[-1], 1])
    objects = [[2, 5, 8]] * 24
    asked = [places[0] // 2 - 1 for places in task.marks["answer"]]
    marks = {
        "boxes": [[1, 4, 7]] * 24,
        "objects": objects,
        "answer": [[2 + 3 * j] for j in asked],
        "query": [[10]] * 24,
    }
    task = pb.Task("spaced", spaced, task.right, task.wrong, marks=marks)
    n = 12
    looks = torch.zeros(24, 4, n, n)
    looks[:, :, :, 0] = 1.0
    for i, j in enumerate(asked):
        looks[i, 0, 10] = torch.nn.functional.one_hot(torch.tensor(3 + 3 * j), n).float()
    with model.edited(pb.replace(model.layers[0].attn.pattern, looks.movedim(2, 1))):
        here = pb.find.binding_heads(model, task, query="query", batch_size=24)
        last = pb.find.binding_heads(model, task, batch_size=24)
    assert here["span"][0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert float(here["span_p_adjusted"][0, 0]) <= 0.05
    assert float(here["span_null_high"][0, 0]) < 0.6
    assert here.values[0].abs().max() == 0.0
    assert last["span"][0].abs().max() == 0.0
    with pytest.raises(pb.PatchbayError, match=r"query='boxes'.*one token behind all pairs"):
        pb.find.binding_heads(model, task, query="boxes")


def test_p_of_deals_counts_the_true_pairing() -> None:
    """Eight prompts whose asked pair alone is paid: as good are the deals that ask the same pairs, one in 70."""
    asked = torch.arange(8) % 2
    beyond = torch.nn.functional.one_hot(asked, 2).float()[:, None, None, :]  # [prompt, layer, head, pair]
    _, p = _dealt(beyond, asked, 0)
    rank = float(p) * (1 + DRAWS)
    assert close(rank, float(round(rank)), of=1.0 + DRAWS)
    assert 1 / 200 < float(p) < 1 / 30
