"""A binding task in the planted words, and a model whose last token holds a key, then a place, then the answer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny.planted_canvas import Canvas
from patchbay.tiny.planted_vocabulary import TOKEN_IDS, ids, tokenizer


def _pointer_model(seed: int = 0) -> pb.Model:
    """Three planted steps at the last token of `key entity key entity ... query :` (each key has a query word of its own).

    Block 0: the query word comes to the last token. Block 1: the place of its key is looked up. Block 2: the entity one
    after that place is copied. So the stream holds nothing, then a key, then a place, then the answer.
    """
    canvas = Canvas("gpt2", seed, n_layers=3, n_positions=32)
    words, asked, pointer = canvas.take(canvas.n_vocab), canvas.take(12), canvas.take(16)
    canvas.embed(words)
    keys, queries, entities = ids("name"), ids("month"), ids("object") + ids("number")
    assert canvas.positions is not None
    q, k = canvas.offset_maps(1, 25.0)
    canvas.set_head(0, canvas.pick_head(0), q=q, k=k, v=words[queries].T, o=asked)
    slots, places = canvas.slots(12), canvas.slots(16)
    q, k = 25.0 * asked.T @ slots, words[keys].T @ slots
    canvas.set_head(1, canvas.pick_head(1), q=q, k=k, v=canvas.positions.T, o=pointer)
    after = torch.cat([places, -places])[1:17]  # the code of the next place
    q, k = 25.0 * pointer.T @ after, canvas.positions.T @ places
    canvas.set_head(2, canvas.pick_head(2), q=q, k=k, v=words[entities].T, o=2.0 * words[entities])
    canvas.unembed(6.0 * words)
    return pb.load(canvas.model, tokenizer())


def _binding(n: int = 40, boxes: int = 5, seed: int = 0) -> pb.Task:
    """Pairs in the planted words: positional, lexical and reflexive run through all triples of places in turn."""
    rng = random.Random(seed)
    names, twins, entities = ids("name"), ids("month"), ids("object") + ids("number")
    rows: dict[str, list[Any]] = {name: [] for name in ("clean", "corrupted", "right", "wrong")}
    labels: dict[str, list[int]] = {name: [] for name in ("asked", "positional", "lexical", "reflexive")}
    triples = list(itertools.permutations(range(boxes), 3))
    rng.shuffle(triples)
    for i in range(n):
        c, k, s = triples[i % len(triples)]
        asked = rng.choice([place for place in range(boxes) if place not in (c, k, s)])
        key, entity = rng.sample(range(12), boxes), rng.sample(entities, boxes)
        key2, entity2 = list(key), list(entity)
        key2[c], key2[k], entity2[c], entity2[s] = key[k], key[c], entity[s], entity[c]

        def write(key: list[int], entity: list[int], at: int) -> list[int]:
            pairs = [token for a, b in zip(key, entity, strict=True) for token in (names[a], b)]
            return [*pairs, twins[key[at]], TOKEN_IDS[":"]]

        rows["clean"].append(write(key, entity, asked))
        rows["corrupted"].append(write(key2, entity2, c))
        rows["right"].append(entity[asked])
        rows["wrong"].append([entity[j] for j in range(boxes) if j != asked])
        for name, place in zip(labels, (asked, c, k, s), strict=True):
            labels[name].append(place)
    return pb.Task("binding", **rows, labels=labels)


@pytest.fixture
def pointer_model() -> Callable[..., pb.Model]:
    return _pointer_model


@pytest.fixture
def binding() -> Callable[..., pb.Task]:
    return _binding
