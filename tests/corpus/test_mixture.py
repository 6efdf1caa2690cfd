"""Mixture: counts are a plain replay's, a known mixture comes back with no slack, another order of merges leaves slack, and so does a kind left out."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import patchbay as pb
from patchbay.corpus.mixture import Counts, Merges, infer, made_by, merged

KINDS = {"a": "abcdef", "b": "cdefgh", "c": "efghij"}


def sample(kind: str, n: int, seed: int) -> list[str]:
    """Texts of made-up words over the letters of a kind, some words often."""
    words = random.Random(f"words {kind}")
    listed = ["".join(words.choices(KINDS[kind], k=words.randint(2, 7))) for _ in range(60)]
    rng = random.Random(f"{kind} {seed}")
    return [" ".join(rng.choices(listed, [1 / (i + 1) for i in range(60)], k=12)) for _ in range(n)]


def trained(texts: list[str], size: int = 90) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return made


@pytest.fixture(scope="module")
def known() -> tuple[Tokenizer, dict[str, list[str]], dict[str, float]]:
    """A tokenizer of texts a, b and c of which b comes twice and c five times, and the shares of pairs."""
    texts = {kind: sample(kind, 80, 0) for kind in KINDS}
    often = {"a": 1, "b": 2, "c": 5}
    made = trained([text for kind, some in texts.items() for text in some * often[kind]])
    pairs = {k: often[k] * sum(len(w) - 1 for text in some for w in text.split()) for k, some in texts.items()}
    return made, texts, {kind: n / sum(pairs.values()) for kind, n in pairs.items()}


def test_planted(known: Any) -> None:
    """From the very texts: no slack, and the true shares lie between the ends; another order of the merges has slack."""
    made, texts, truth = known
    found = infer(made, texts, merges=60, competitors=8)
    assert found.slack < 1e-9
    for kind, share in truth.items():
        assert found.least[kind] - 1e-6 <= share <= found.most[kind] + 1e-6
        assert abs(found.shares[kind] - share) < 0.02
        assert found.most[kind] - found.least[kind] < 0.04
    assert found.shuffled > 0.1
    assert found.low is None


def test_reference(known: Any) -> None:
    """Counts after ten merges, by replaying them on every word of every text."""
    made, texts, _ = known
    read = Merges(made)
    counts = Counts(
        {w: np.array([float(n)]) for w, n in Counter(w for t in texts["b"] for w in read.words(t)).items()}, read
    )
    runs = [list(word) for text in texts["b"] for word in text.split()]
    assert counts.total[0] == sum(len(run) - 1 for run in runs)
    for pair in read.pairs[:10]:
        counts.merge(pair)
        again = []
        for run in runs:
            new: list[str] = []
            for symbol in run:  # from the left, each symbol once
                if new and (new[-1], symbol) == pair:
                    new[-1] += symbol
                else:
                    new.append(symbol)
            again.append(new)
        runs = again
    plain = Counter(pair for run in runs for pair in pairwise(run))
    assert dict(plain) == {pair: n[0] for pair, n in counts.pairs.items() if n[0]}
    assert counts.commonest(3)[0] == max(plain, key=lambda pair: (plain[pair], pair))
    assert merged(list("aaa"), ("a", "a")) == ["aa", "a"]


def test_null(known: Any) -> None:
    """Samples of one kind under two names: neither share is known, and the ends say so."""
    made, texts, truth = known
    found = infer(
        made, {"a": texts["a"], "b": texts["b"], "c": texts["c"], "c again": texts["c"]}, merges=40, competitors=8
    )
    for kind in ("c", "c again"):
        assert found.least[kind] < 0.01
        assert found.most[kind] > truth["c"] - 0.03


def test_other_samples_of_the_kinds_and_a_kind_left_out(known: Any) -> None:
    """From texts that the tokenizer did not read the shares come near, within the interval; without the commonest kind there is slack."""
    made, _, truth = known
    other = {kind: sample(kind, 80, 1) for kind in KINDS}
    found = infer(made, other, merges=60, competitors=8, draws=6)
    assert found.slack > 0
    assert found.low is not None
    assert found.high is not None
    for kind, share in truth.items():
        assert abs(found.shares[kind] - share) < 0.1
        assert found.low[kind] < found.high[kind]
    without = infer(made, {kind: other[kind] for kind in ("a", "b")}, merges=60, competitors=8)
    assert without.slack > 2 * found.slack
    assert found.shuffled > 5 * found.slack
    twice = infer(made, {kind: texts * 2 for kind, texts in other.items()}, merges=60, competitors=8)
    assert all(abs(twice.shares[kind] - found.shares[kind]) < 1e-6 for kind in KINDS)


def test_tokenizers_of_several_forms(known: Any, tmp_path: Path) -> None:
    made, _, _ = known
    made.save(str(tmp_path / "tokenizer.json"))
    assert Merges(tmp_path / "tokenizer.json").pairs == Merges(made).pairs
    spaced = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    read = Merges(spaced)
    assert list(read.words("▁ab▁aab")) == ["▁ab", "▁aab"]
    assert read.symbols("▁axab") == [["▁", "a"], ["a", "b"]]


def test_refusals(known: Any, tmp_path: Path) -> None:
    made, texts, _ = known
    with pytest.raises(pb.PatchbayError, match="two kinds or more"):
        infer(made, {"a": texts["a"]})
    with pytest.raises(pb.PatchbayError, match="the texts of 'b' hold no pair"):
        infer(made, {"a": texts["a"], "b": []})
    with pytest.raises(pb.PatchbayError, match="are one text"):
        infer(made, {"a": texts["a"], "b": "one text"})
    with pytest.raises(pb.PatchbayError, match="is no file"):
        infer(tmp_path / "none.json", texts)
    with pytest.raises(pb.PatchbayError, match="says no merges"):
        infer(3, texts)
    with pytest.raises(pb.PatchbayError, match="of the kind WordLevel has no order of merges"):
        infer(Tokenizer(models.WordLevel()), texts)
    with pytest.raises(pb.PatchbayError, match="end_of_word_suffix"):
        infer(Tokenizer(models.BPE(end_of_word_suffix="</w>")), texts)


def test_samples_drawn_again_that_hold_nothing_are_refused(known: Any, tmp_path: Path) -> None:
    """One text is drawn no times in a third of the draws, and a share of nothing is no number."""
    made, texts = known[0], known[1]
    with pytest.raises(pb.PatchbayError, match=r"\d+ of 20 samples of 'a' drawn again hold nothing"):
        infer(made, {"a": texts["a"][:1], "b": texts["b"]}, merges=2, draws=20)
    (tmp_path / "tokenizer.json").write_text("no JSON")
    with pytest.raises(pb.PatchbayError, match=r"is no tokenizer.json \("):
        infer(tmp_path / "tokenizer.json", texts)


def test_which_text_made_a_token(known: Any) -> None:
    """Pairs counted in words that are merged again from the start for each token; nothing of it in a kind without its letters."""
    made, samples, _ = known
    read, shares = Merges(made), {"a": 0.5, "b": 0.3, "c": 0.2}
    steps = {read.vocab["".join(pair)]: step for step, pair in reversed(list(enumerate(read.pairs)))}
    tokens = sorted(steps)[::20]
    found = made_by(made, samples, tokens, shares=shares)
    for token in tokens:
        pair, mine = read.pairs[steps[token]], {}
        for kind, texts in samples.items():
            seen = total = 0
            for text in texts:
                for word in text.split():
                    run = list(word)
                    total += len(run) - 1
                    for done in read.pairs[: steps[token]]:
                        run = merged(run, done)
                    seen += sum(one == pair for one in pairwise(run))
            mine[kind] = shares[kind] * seen / total
        assert found[token] == pytest.approx({kind: one / sum(mine.values()) for kind, one in mine.items()})
    alike = made_by(made, samples, tokens)
    letters = {token: next(name for name, i in read.vocab.items() if i == token) for token in tokens}
    for token in tokens:
        assert all(alike[token][kind] == 0.0 for kind in KINDS if not set(letters[token]) <= set(KINDS[kind]))
    with pytest.raises(pb.PatchbayError, match="is made by no merge"):
        made_by(made, samples, [read.vocab["a"]])
    with pytest.raises(pb.PatchbayError, match="one share for each kind"):
        made_by(made, samples, tokens, shares={"a": 1.0})
