"""Word classes: clusters appear at the planted layer, the value as loops, its invariances, nothing for classes that nothing tells."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find._states import permutations
from patchbay.tiny import planted, planted_depth, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.word_classes")
word_classes: Any = module.word_classes
FIRST, SECOND = list(range(3, 23)), list(range(23, 43))


def loops(x: torch.Tensor, labels: list[int]) -> float:
    """The generalised discrimination value, one pair at a time."""
    n, d = x.shape
    columns = []
    for j in range(d):
        column = x[:, j].tolist()
        mean = sum(column) / n
        spread = (sum((v - mean) ** 2 for v in column) / n) ** 0.5
        columns.append([(v - mean) / spread / 2 for v in column])
    rows = list(zip(*columns, strict=True))
    distances: dict[tuple[int, int], list[float]] = {}
    for i in range(n):
        for j in range(i):
            gap = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) ** 0.5
            distances.setdefault((min(labels[i], labels[j]), max(labels[i], labels[j])), []).append(gap)
    classes = sorted(set(labels))
    within = [sum(distances[c, c]) / len(distances[c, c]) for c in classes]
    pairs = [(a, b) for a in classes for b in classes if a < b]
    between = [sum(distances[pair]) / len(distances[pair]) for pair in pairs]
    return (sum(within) / len(within) - sum(between) / len(between)) / d**0.5


def value(x: torch.Tensor, labels: torch.Tensor) -> float:
    return float(module._gdv(module._distances(x), labels[None])[0])


@pytest.mark.parametrize(("layer", "form"), [(1, "gpt2"), (2, "llama")])
def test_planted(layer: int, form: Any) -> None:
    """A cue says which class follows the word after it: at that word the layer that moves the cue there makes the clusters."""
    values = [1.0 if i % 2 else -1.0 for i in range(64)]
    built = planted_depth.carried(values, layer=layer, form=form, strength=8.0)
    model = pb.load(built.model, built.tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for n in range(60):
        cue = 2 * int(torch.randint(2, 30, (1,), generator=generator)) + n % 2
        target = (SECOND if n % 2 else FIRST)[int(torch.randint(20, (1,), generator=generator))]
        prompts.append([cue, 52, target])
    result = word_classes(model, prompts, {"first": FIRST, "second": SECOND}, draws=100)
    after, before = result.values[layer + 1 :], result.values[: layer + 1]
    assert after.max() < -0.6
    assert before.min() > -0.1
    assert result["p"][layer + 1 :].max() < 0.05
    assert result["p"].min() > 1 / 102, "a hundred deals and the true one"
    assert (after < result["null_low"][layer + 1 :]).all()
    assert result.tables["samples"][0]["samples"] == 30


def test_reference() -> None:
    """Three classes on a twin: samples found by hand, states from Hugging Face, distances by loops."""
    hf = twins.twin("llama")
    model = pb.load(hf)
    prompts = [[5, 40, 6, 70, 41, 7, 71, 8], [9, 72, 42, 10, 43, 73], [44, 11, 74]]
    classes = {"low": range(5, 15), "middle": range(40, 50), "high": range(70, 80)}
    result = word_classes(model, prompts, classes, draws=5, batch_size=2)
    for layer in (0, 1):
        states, labels = [], []
        for ids in prompts:
            with torch.no_grad():
                hidden = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].double()
            for place in range(len(ids) - 1):
                states.append(hidden[place])
                labels.append(next(n for n, members in enumerate(classes.values()) if ids[place + 1] in members))
        assert close(float(result.values[layer]), loops(torch.stack(states), labels), of=result.values)
        by_class = sorted(range(len(labels)), key=lambda i: labels[i])  # as the method draws its samples
        x, own = torch.stack(states)[by_class], torch.tensor(labels)[by_class]
        dealt = [loops(x, own[order].tolist()) for order in permutations(len(labels), 5, 0)]
        assert close(float(result["null_mean"][layer]), sum(dealt) / 5, of=result.values)


def test_closed_forms_and_invariances() -> None:
    """Two tight balanced clusters: -1. The same when dimensions are moved, scaled, reordered or taken twice."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    points = torch.where(labels[:, None] == 0, torch.randn(7).double(), torch.randn(7).double())
    assert close(value(points, labels), -1.0, dtype=torch.float64, of=1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    classes = torch.arange(40) % 3
    plain = value(x, classes)
    assert close(plain, loops(x, classes.tolist()), dtype=torch.float64, of=1.0)
    assert close(value(x + 7.0, classes), plain, dtype=torch.float64, of=1.0)
    assert close(value(x * torch.arange(1, 10), classes), plain, dtype=torch.float64, of=1.0)
    assert close(value(x[:, torch.randperm(9, generator=generator)], classes), plain, dtype=torch.float64, of=1.0)
    assert close(value(torch.cat([x, x], 1), classes), plain, dtype=torch.float64, of=1.0)
    assert close(value(torch.cat([x, torch.ones(40, 3)], 1), classes), plain, dtype=torch.float64, of=1.0)


def test_null() -> None:
    """Classes of random words of a random model are no clusters; nor, by the shuffle over tokens, are a few tokens' own ones."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    prompts = torch.randint(3, 43, (12, 40), generator=torch.Generator().manual_seed(1)).tolist()
    result = word_classes(model, prompts, {"a": FIRST, "b": SECOND}, draws=100)
    assert result.values.abs().max() < 0.01
    assert result["p"].min() > 0.02
    twice = [
        [a, a] for ids in prompts for a in ids[:20]
    ]  # the next token is the current one: perfect clusters of tokens
    same = word_classes(model, twice, {"a": FIRST[:4], "b": SECOND[:4]}, draws=100, per_class=60)
    assert same.values[0] < same["null_low"][0] - 0.01
    assert same["p"][0] > 0.02
    assert any("fewer than 5 different tokens" in note for note in same.notes)


def test_current_class_and_state_space_models() -> None:
    model = pb.load(twins.twin("mamba2"))
    prompts = [[5, 40, 6, 41, 7, 42, 8], [43, 9, 44, 10]]
    result = word_classes(model, prompts, {"low": range(5, 15), "high": range(40, 50)}, draws=5)
    assert result["current"].isfinite().all()
    assert result.labels_of("layer") == ["embed", *(f"L{i}" for i in range(model.n_layers))]
    only = word_classes(
        model, [[90, 5], [91, 6], [92, 40], [93, 41]], {"low": range(5, 15), "high": range(40, 50)}, draws=5
    )
    assert "current" in only  # the last tokens are in the classes
    few = word_classes(model, prompts, {"low": range(5, 15), "high": range(40, 50)}, draws=5, per_class=2)
    assert [row["samples"] for row in few.tables["samples"]] == [2, 2]


def test_bad_input() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="two names or more"):
        word_classes(model, [[5, 6]], {"a": [5]})
    with pytest.raises(pb.PatchbayError, match="token 6 is in class 'b' and in 'a'"):
        word_classes(model, [[5, 6]], {"a": [5, 6], "b": [6]})
    with pytest.raises(pb.PatchbayError, match="found a 1, b 0"):
        word_classes(model, [[5, 6]], {"a": [6], "b": [7]})
    with pytest.raises(pb.PatchbayError, match=r"class 'b': token ids \[99\] are outside 0..63"):
        word_classes(model, [[5, 6]], {"a": [6], "b": [99]})
    with pytest.raises(pb.PatchbayError, match="does not know ' dragon'"):
        word_classes(model, [[5, 6]], {"a": [6], "b": [" dragon fly"]})
