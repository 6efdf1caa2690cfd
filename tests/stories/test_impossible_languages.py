"""The story of impossible languages: stretches and counts by hand, the machinery on few steps, the claim in the slow tier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.corpus.languages import ngram_loss
from patchbay.stories import _lab, impossible_languages
from patchbay.stories._lab import Telling
from patchbay.tiny import lab
from patchbay.train import _panels
from patchbay.train._runs import Run
from tests.given import lent


def test_stretches_are_of_the_lengths_that_were_asked() -> None:
    model = pb.load("tiny")
    found = lab.pieces(model, 60, 0, (5, 9))
    assert {len(one) for one in found} == {5, 9}
    assert len({tuple(one) for one in found}) == 60
    assert found == lab.pieces(model, 60, 0, (5, 9)) != lab.pieces(model, 60, 1, (5, 9))


def test_what_is_gained_beyond_pairs() -> None:
    """Pairs are counted in the language that the network reads: here each token is followed by one other, and backwards one of them by two."""
    telling = Telling(lent("llama"), 0, 1)
    train, held = [[[3, 4, 5, 6]], [[7, 4, 5, 6]]] * 10, [[[3, 4, 5, 6]]]
    shared = _lab.Lab(telling.model, train, held, None)  # type: ignore[arg-type]
    score = Run(torch.tensor([0.25], dtype=torch.float64), [], "", "", None)
    telling.found = {"labs": {"reversed": shared, "control": shared}, "runs": {"reversed": [score], "control": [score]}}
    rows, beyond = impossible_languages._beyond_pairs(telling, ("reversed",))
    counted = ngram_loss([[6, 5, 4, 3], [6, 5, 4, 7]] * 10, [[6, 5, 4, 3]], telling.model.vocab_size, 2)[0]
    assert beyond["reversed"] == pytest.approx(counted - 0.25)
    assert rows[0][1:3] == pytest.approx([0.25, counted])


def test_the_machinery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed and no training: nothing is learned, the verdict says so, and every arm has its row."""
    for name, value in {"STEPS": 1, "PIECES": 40, "BATCH": 2, "PANEL": 4}.items():
        monkeypatch.setattr(impossible_languages, name, value)
    monkeypatch.setattr(_lab, "SEEDS", 1)
    monkeypatch.setattr(_panels, "CHUNKS", 1)
    page = tmp_path / "page.html"
    told = impossible_languages.tell(impossible_languages.form(), report=page, quiet=True, n=8)
    assert told["verdict"] is False
    assert set(told["learned"]) == set(impossible_languages.ARMS)
    assert set(told["beyond_pairs"]) == {*impossible_languages.ARMS, *impossible_languages.FEWER}
    assert set(told["panel"]["previous_token_highest"]) == set(impossible_languages.ARMS) - {"control"}
    assert set(told["few_lengths"]) == set(impossible_languages.FEWER)
    assert "patchbay run impossible-languages" in page.read_text()
    assert all(words in page.read_text() for words in impossible_languages.READ.values())


@pytest.mark.slow
def test_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds: backwards is no harder, windows are, whole shuffles are harder still; windows send a head to the token before."""
    monkeypatch.setattr(_lab, "SEEDS", 2)
    told = impossible_languages.tell(impossible_languages.form(), report=tmp_path / "page.html", quiet=True)
    assert told["verdict"] is True
    means = {arm: sum(row["by_seed"]) / 2 for arm, row in told["learned"].items()}
    assert means["control"] + 0.5 < means["local"] < means["shuffled"] - 0.5
    assert (
        told["few_lengths"]["shuffled, three lengths"]["difference"][1] > 1.0
    )  # as hard with three orders as with many
    assert told["panel"]["previous_token_highest"]["local"]["effect"] > 0.05


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pb.PatchbayError, match="tokenizer"):
        impossible_languages.tell(lent("llama"), report=tmp_path / "page.html", quiet=True)
