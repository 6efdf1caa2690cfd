"""Windows of equal information: by a plain loop over fractions of cells, back again alone and in any order, full but for what the next token would have taken."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.corpus.compression import PRECISION, WIDEST, decode_windows, encode_windows, whole_numbers
from tests.given import lent


class Chain:
    """A model of which only the last token decides what is next: rows of logits, [token, next token]."""

    device = "cpu"

    def __init__(self, logits: torch.Tensor, limit: int | None = None) -> None:
        self.rows, self.vocab_size, self.max_positions, self.asked = logits, len(logits), limit, 0

    def hf(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert input_ids.shape[0] == 1  # of one text alone
        self.asked += 1
        return SimpleNamespace(logits=self.rows[input_ids])


def chain(vocab: int, seed: int, *, sharp: float = 2.0, limit: int | None = None) -> Any:
    return Chain(sharp * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)), limit)


def said(vocab: int, n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(n)]


def by_loops(model: Any, ids: list[int], bits: int) -> list[tuple[int, list[int]]]:
    """Each window and the tokens that it holds, the cells dealt out one token after another."""
    found, at = [], 1
    while at < len(ids):
        last, low, n, held = ids[0], 0, 2**bits, list[int]()
        while at < len(ids) and n > 1:
            edges = whole_numbers(model.rows[last]).tolist()
            vocab, total = len(edges) - 1, edges[-1]
            least, free = (0, n - 1) if held else (1, n)
            begin = low + (1 if held else 0)
            cells = []
            for token in range(vocab):
                shared = free - least * vocab
                cells.append(least + edges[token + 1] * shared // total - edges[token] * shared // total)
            own = cells[ids[at]]
            if own == 0:
                break
            low, n, last = begin + sum(cells[: ids[at]]), own, ids[at]
            held.append(ids[at])
            at += 1
        found.append((low, held))
    return found


@pytest.mark.parametrize("vocab", [2, 5, 29])
def test_windows_are_those_of_a_loop_and_come_back(vocab: int) -> None:
    """All lengths of a text, ragged ends too, windows of as few bits as there can be and of as many."""
    least = max(1, (vocab - 1).bit_length())
    for seed, bits in enumerate((least, least + 1, 8, 16, WIDEST)):
        for sharp in (0.0, 1.0, 6.0):
            model, ids = chain(vocab, seed, sharp=sharp), said(vocab, 60 + seed, seed)
            for n in (2, 3, 17, len(ids)):
                found = encode_windows(model, [ids[:n]], bits)[0]
                assert found == [window for window, _ in by_loops(model, ids[:n], bits)]
                assert all(0 <= window < 1 << bits for window in found)
                assert decode_windows(model, found, bits, ids[0]) == ids[:n]


def test_each_window_decodes_alone_and_in_any_order() -> None:
    model, ids = chain(29, 0), said(29, 200, 1)
    pairs = by_loops(model, ids, 12)
    assert len(pairs) > 10
    for window, held in pairs:
        assert decode_windows(model, [window], 12, ids[0])[1:] == held
    turned = decode_windows(model, [window for window, _ in pairs[::-1]], 12, ids[0])
    assert turned == [ids[0], *(token for _, held in pairs[::-1] for token in held)]
    assert encode_windows(model, [turned[:1] + pairs[3][1]], 12) == [[pairs[3][0]]]


def test_every_number_is_a_window() -> None:
    """Of one token or more, which are coded as that number again: no two windows hold the same."""
    model = chain(5, 3, sharp=1.0)
    held = [tuple(decode_windows(model, [window], 8, 0)) for window in range(256)]
    assert min(map(len, held)) >= 2
    assert len(set(held)) == 256
    for window in range(256):
        assert encode_windows(model, [list(held[window])], 8) == [[window]]


def test_a_full_window_holds_its_bits() -> None:
    """It ends where the next token would take more: what it holds and that token are worth the window's bits, less two at most."""
    for seed in range(4):
        model, ids = chain(40, seed, sharp=1.0), said(40, 300, seed)
        pairs, at = by_loops(model, ids, 16), 1
        assert [window for window, _ in pairs] == encode_windows(model, [ids], 16)[0]
        for _, held in pairs[:-1]:
            last, worth = ids[0], 0.0
            for token in [*held, ids[at + len(held)]]:
                edges = whole_numbers(model.rows[last])
                worth += PRECISION - math.log2(int(edges[token + 1] - edges[token]))
                last = token
            assert worth > 16 - 2
            at += len(held)
        assert len(pairs) < 300 * math.log2(40) / (16 - math.log2(40))


def test_a_surer_model_holds_more_in_a_window() -> None:
    """Where every next token is nearly certain the text takes few windows, where none is it takes as many bits as tokens are worth, and the end of each."""
    ids = [i % 16 for i in range(400)]
    sure = Chain(30.0 * torch.roll(torch.eye(16), 1, 1))
    even = Chain(torch.zeros(16, 16))
    assert len(encode_windows(sure, [ids], 16)[0]) <= 3  # type: ignore[list-item]
    assert len(encode_windows(even, [ids], 17)[0]) == 100  # type: ignore[list-item]


def test_no_window_is_longer_than_the_model_reads() -> None:
    ids = [3] * 100
    sure = Chain(30.0 * torch.eye(16), limit=12)
    found = encode_windows(sure, [ids], 20)[0]  # type: ignore[list-item]
    assert len(found) == 9  # eleven tokens behind the first in each
    assert decode_windows(sure, found, 20, 3) == ids  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="more than the 12 tokens"):
        decode_windows(sure, [encode_windows(Chain(sure.rows), [ids], 20)[0][0]], 20, 3)  # type: ignore[arg-type, list-item]


def test_a_tree_is_asked_of_the_model_once() -> None:
    model = chain(5, 0)
    texts = [said(5, 80, seed) for seed in range(20)]
    texts = [[0, *ids] for ids in texts]
    found = encode_windows(model, texts, 6)
    assert model.asked <= 64
    assert [decode_windows(model, some, 6, 0) for some in found] == texts


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_of_models_and_of_edited_ones(name: str) -> None:
    model, ids = lent(name), [5, 40, 41, 40, 7, 80, 5, 5, 60, 61] * 9  # longer than it reads
    found = encode_windows(model, [ids, ids[:2]], 16)
    assert decode_windows(model, found[0], 16, 5) == ids
    assert decode_windows(model, found[1], 16, 5) == ids[:2]
    with model.edited(pb.scale(model.layers[1].mlp.out, 3.0)):
        turned = encode_windows(model, [ids], 16)[0]
        assert decode_windows(model, turned, 16, 5) == ids
    assert turned != found[0] == encode_windows(model, [ids], 16)[0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: encode_windows(model, [[0, 1]], 4), "windows of 5 to 38 bits"),
        (lambda model: encode_windows(model, [[0, 1]], 39), "no whole numbers of 64 bits"),
        (lambda model: encode_windows(model, [[0, 1]], 8.0), "bits=8.0"),
        (lambda model: encode_windows(model, [[0, 1]], True), "bits=True"),
        (lambda model: encode_windows(model, [0, 1, 2], 8), "got 0 for a text"),
        (lambda model: encode_windows(model, [[0, 1], [0]], 8), "two or more"),
        (lambda model: encode_windows(model, [[0, 29]], 8), "29 is no token"),
        (lambda model: encode_windows(model, [[0, 1.0]], 8), "token ids are coded"),
        (lambda model: decode_windows(model, [3, 256], 8, 0), "window 1 is 256: a whole number from 0 to 255"),
        (lambda model: decode_windows(model, [-1], 8, 0), "window 0 is -1"),
        (lambda model: decode_windows(model, [1.5], 8, 0), "window 0 is 1.5"),
        (lambda model: decode_windows(model, [3], 8, 30), "30 is no token"),
        (lambda model: encode_windows(Chain(torch.full((4, 4), math.nan)), [[0, 1]], 8), "are no numbers"),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        call(chain(29, 0))
    assert encode_windows(chain(29, 0), [], 8) == []
    assert decode_windows(chain(29, 0), [], 8, 3) == [3]
