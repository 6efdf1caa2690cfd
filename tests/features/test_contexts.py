"""Contexts: the highest tokens, fair samples and histograms of one pass are those of plain loops over all texts at once."""

from __future__ import annotations

import random

import pytest
import torch

from patchbay.features.contexts import AFTER, BEFORE, BINS, Seen, merged


def batches(
    n_texts: int, columns: int, size: int, seed: int = 0
) -> tuple[list[list[int]], list[torch.Tensor], list[tuple[list[list[int]], torch.Tensor, list[tuple[int, int]]]]]:
    """Random texts, their numbers [position, column], and the same as padded batches."""
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    texts = [[rng.randrange(50) for _ in range(rng.randint(1, 20))] for _ in range(n_texts)]
    numbers = [torch.randn(len(ids), columns, generator=draw) * 10.0 ** rng.uniform(-2, 2) for ids in texts]
    for one in numbers:
        one[torch.rand(one.shape, generator=draw) < 0.5] = 0.0
    made = []
    for start in range(0, n_texts, size):
        some = range(start, min(start + size, n_texts))
        padded = torch.full((len(some), max(len(texts[i]) for i in some), columns), torch.nan)
        for row, i in enumerate(some):
            padded[row, : len(texts[i])] = numbers[i]
        made.append(([texts[i] for i in some], padded, [(i, 0) for i in some]))
    return texts, numbers, made


def seen(
    made: list[tuple[list[list[int]], torch.Tensor, list[tuple[int, int]]]], columns: int, n: int = 4, sampled: int = 12
) -> Seen:
    found = Seen(columns, n, sampled)
    for ids, padded, where in made:
        found.add(ids, padded, where)
    return found


def test_the_highest_are_those_of_a_plain_loop_with_the_values_around_them() -> None:
    texts, numbers, made = batches(30, 3, 7)
    found = seen(made, 3)
    for column in range(3):
        every = sorted(
            ((float(one[at, column]), i, at) for i, one in enumerate(numbers) for at in range(len(one))),
            key=lambda row: -row[0],
        )[:4]
        assert [(held["value"], held["text"], held["position"]) for held in found.kept[column].highest] == every
        for held in found.kept[column].highest:
            ids, at = texts[held["text"]], held["position"]
            assert list(held["span"]) == ids[max(0, at - BEFORE) : at + AFTER + 1]
            assert held["span"][held["at"]] == ids[at]
            assert held["values"] == numbers[held["text"]][max(0, at - BEFORE) : at + AFTER + 1, column].tolist()
    whole = torch.cat(numbers)
    assert found.n_tokens == len(whole)
    assert [found.density(column) for column in range(3)] == (whole != 0).double().mean(0).tolist()


def test_a_context_is_told_once_with_its_highest_value() -> None:
    same = [[1, 2, 3]] * 5 + [[4, 5]]
    numbers = torch.zeros(6, 3, 1)
    numbers[5, 2] = torch.nan
    numbers[:5, 1, 0] = torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0])
    numbers[5, 0, 0] = 0.5
    found = Seen(1, 3)
    for i in range(6):
        found.add([same[i]], numbers[i : i + 1, : len(same[i])], [(i, 0)])
    assert [(held["value"], held["text"]) for held in found.kept[0].highest[:2]] == [(3.0, 1), (0.5, 5)]


def test_a_histogram_of_one_pass_is_that_of_two() -> None:
    """Each column's reach is the power of two above its largest number, and its bins are those that numpy would fill."""
    _, numbers, made = batches(40, 4, 3, seed=1)
    found, whole = seen(made, 4), torch.cat(numbers).double()
    for column in range(4):
        values = whole[:, column][whole[:, column] != 0]
        reach = float(found.reach[column])
        assert reach / 2 < float(values.abs().max()) <= reach
        counts = torch.zeros(2 * BINS, dtype=torch.long)
        for value in values.tolist():
            counts[min(int((value / reach + 1) * BINS // 1), 2 * BINS - 1)] += 1
        assert torch.equal(found.counts[column], counts)
        told = found.histogram(column)
        assert sum(told["count"]) == len(values)
        assert min(told["low"]) <= float(values.min()) < min(told["low"]) + told["width"][0]
    assert merged(torch.arange(2 * BINS)[None]).sum() == torch.arange(2 * BINS).sum()


def test_a_sample_is_fair_and_the_same_however_texts_come() -> None:
    """Every token that is not 0 is as likely: over many columns of one pattern each place is drawn about as often; batches do not matter."""
    texts = [[7] * 10 for _ in range(20)]
    columns = 400
    numbers = torch.ones(20, 10, columns)
    numbers[:, ::2] = 0.0
    found = Seen(columns, 1, 10)
    found.add(texts, numbers, [(i, 0) for i in range(20)])
    times = torch.zeros(20, 10)
    for kept in found.kept:
        assert len(kept.sampled) == 10
        for held in kept.sampled:
            times[held["text"], held["position"]] += 1
    assert times[:, ::2].sum() == 0
    drawn = times[:, 1::2].flatten()  # 4,000 draws of 100 places: 40 each, spread sqrt(40 * .9)
    assert float(drawn.min()) > 25
    assert float(drawn.max()) < 60
    assert 3.5 < float(drawn.std()) < 8.5
    apart = [seen(batches(25, 2, size, seed=3)[2], 2) for size in (1, 25)]
    for a, b in zip(apart[0].kept, apart[1].kept, strict=True):
        assert [(x["text"], x["position"], x["value"]) for x in a.sampled] == [
            (x["text"], x["position"], x["value"]) for x in b.sampled
        ]
    assert max(len(kept.sampled) for one in apart for kept in one.kept) <= 12


def test_quantiles_are_of_the_ranked_sample() -> None:
    found = Seen(1, 2, 100)
    values = torch.arange(1.0, 41.0)
    found.add([list(range(40))], values[None, :, None], [(0, 0)])
    parts = found.quantiles(0, 4, 2)
    assert [(part["high"], part["low"], part["share"]) for part in parts] == [
        (40.0, 31.0, 0.25),
        (30.0, 21.0, 0.25),
        (20.0, 11.0, 0.25),
        (10.0, 1.0, 0.25),
    ]
    for part in parts:
        assert len(part["contexts"]) == 2
        assert all(part["low"] <= held["value"] <= part["high"] for held in part["contexts"])
    assert Seen(1, 2).quantiles(0, 4, 2) == []


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_memory_does_not_grow_with_the_texts(factor: float) -> None:
    _, _, made = batches(60, 2, 5, seed=4)
    found = Seen(2, 3, 8)
    for ids, padded, where in made:
        found.add(ids, padded * factor, where)
        assert all(len(kept.highest) <= 3 and len(kept.sampled) <= 8 for kept in found.kept)
        assert all(
            len(held["span"]) <= BEFORE + AFTER + 1 for kept in found.kept for held in kept.highest + kept.sampled
        )
