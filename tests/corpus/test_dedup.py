"""Dedup: no copy survives, the first stays in its place, the Bloom filter errs as often as it says, MinHash meets as often as Jaccard."""

from __future__ import annotations

import random

import numpy as np
import pytest

import patchbay as pb
from patchbay.corpus import dedup
from patchbay.corpus.dedup import Bloom, MinHash, digests, near_unique, unique


def numbered(n: int, start: int = 0) -> list[str]:
    return [f"text number {i}" for i in range(start, start + n)]


def test_copies_go_and_the_first_stays_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the borders of batches too, against a plain set."""
    monkeypatch.setattr(dedup, "TOGETHER", 7)
    rng = random.Random(0)
    texts = [f"text {rng.randrange(60)}" + " " * rng.randrange(3) for _ in range(200)]
    seen: set[str] = set()
    expected = [text for text in texts if not (text.strip() in seen or seen.add(text.strip()))]  # type: ignore[func-returns-value]
    assert list(unique(texts, capacity=1000)) == expected
    lines = ["a\nb\n\nc", "b\nd", "a\nc", "\n\n", "d\ne\nd"]
    assert list(unique(lines, unit="paragraph", capacity=1000)) == ["a\nb\n\nc", "d", "e"]


def test_a_filter_errs_as_often_as_it_says() -> None:
    """At its capacity, 3 % of texts that it never saw are taken for known, within a tenth; of those it saw none is missed."""
    filled = Bloom(20_000, 0.03)
    filled.add(digests(numbered(20_000)))
    assert filled.holds(digests(numbered(20_000))).all()
    others = digests(numbered(60_000, start=20_000))
    k, n, m = filled.n_hashes, 20_000, filled.n_bits
    formula = (1 - np.exp(-k * n / m)) ** k
    assert formula == pytest.approx(0.03, rel=0.05)
    assert float(filled.holds(others).mean()) == pytest.approx(0.03, rel=0.1)
    assert filled.n_bytes == -(-m // 8)
    with pytest.raises(pb.PatchbayError, match=r"more than 20,000 different texts"):
        filled.add(others[:1])


def test_digests_are_the_same_in_every_process() -> None:
    """Whatever Python's own hashes are: the numbers of another process, written down."""
    assert digests(["a b c"]).tolist() == [[649925216409816346, 1680821759285069737]]
    assert MinHash(2, 2).signature("a b c").tolist() == [1005877836, 1773530834, 3787164674, 3156131293]


def test_minima_agree_as_often_as_shingles_are_shared() -> None:
    """Two texts whose sets of single words have a known Jaccard similarity, and 4,096 minima."""
    shared, own = [f"s{i}" for i in range(60)], [f"a{i}" for i in range(20)]
    one, other = " ".join(shared + own), " ".join(shared + [f"b{i}" for i in range(20)])
    hasher = MinHash(64, 64, width=1)
    a, b = hasher.signature(one), hasher.signature(other)
    s = 60 / 100
    assert abs(float((a == b).mean()) - s) < 4 * (s * (1 - s) / 4096) ** 0.5
    assert (hasher.signature(one) == a).all()


def test_near_copies_go_and_others_stay() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choice("abcdefghijklmnopqrstuvwxyz") * 3 for _ in range(120)) for _ in range(30)]
    changed = [text.rsplit(" ", 2)[0] + " other words" for text in texts]
    assert list(near_unique(texts + changed)) == texts
    halves = [" ".join(text.split()[:60] + [f"w{i}" for i in range(60)]) for text in texts[:5]]
    assert list(near_unique(texts + halves[:1])) == [*texts, halves[0]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Bloom(0), "a text or more"),
        (lambda: Bloom(5, 1.0), "between 0 and 1"),
        (lambda: list(unique(["a"], unit="word")), "text or paragraph"),  # type: ignore[arg-type]
        (lambda: MinHash(0), "one or more of each"),
        (lambda: list(near_unique(["a"], least=0.0)), "a share above 0"),
        (
            lambda: list(near_unique(["a"], least=0.5)),
            "in one of 16 bands of 8 minima with probability 0.061: most would stay",
        ),
    ],
)
def test_refusals(call: object, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        call()  # type: ignore[operator]
    assert list(unique([])) == list(near_unique([])) == []


def test_the_first_record_of_an_address_stays() -> None:
    records = [{"text": f"t{i}", "url": f"u{i % 3}"} for i in range(7)]
    assert list(dedup.unique_by(records, "url")) == records[:3]
    assert list(dedup.unique_by(records, "text")) == records
    with pytest.raises(pb.PatchbayError, match="record 2 has no 'url' that is a text; it has text"):
        list(dedup.unique_by([records[0], {"text": "x"}], "url"))
