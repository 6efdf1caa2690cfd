"""The story of corpus transfer: texts and costs by hand, the machinery on few steps, the claim in the slow tier."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.edits import edit
from patchbay.signal.port import Port
from patchbay.stories import _lab, corpus_transfer
from patchbay.tiny import lab
from tests.given import lent
from tests.tolerance import close
from tests.train.given import untrained


def test_names_return_where_it_is_said() -> None:
    """Every place is the second token of a pair that stood in the text before; words and names do not share tokens."""
    texts = lab.mentions(30, 0)
    assert texts == lab.mentions(30, 0) != lab.mentions(30, 1)
    assert sum(len(places) for _, places in texts) > 60
    for ids, places in texts:
        assert len(ids) == 32
        for at in places:
            pair = ids[at - 1 : at + 1]
            assert min(pair) >= 32
            assert any(ids[i : i + 2] == pair for i in range(at - 2))
    first = [next((tuple(ids[i : i + 2]) for i in range(31) if ids[i] >= 32), None) for ids, _ in texts]
    assert len(set(first)) > 20  # drawn anew for each text


def test_costs_are_those_of_single_tokens() -> None:
    model = lent("llama")
    held = [([5, 40, 41, 6, 40, 41], [5]), ([40, 41, 7, 40, 41, 8, 40, 41], [4, 7])]
    edits = [edit.zero(Port("attn.z", 0, 1))]
    for given in ([], edits):
        found, rest = corpus_transfer.returning(model, held, given), corpus_transfer.others(model, held, given)
        for i, (ids, places) in enumerate(held):
            said = torch.log_softmax(pb.run(model, [ids], edits=given).logits[0].double(), -1)
            cost = [-float(said[at - 1, ids[at]]) for at in range(1, len(ids))]
            mine = [cost[at - 1] for at in places]
            left = [one for at, one in enumerate(cost, 1) if at not in places]
            assert close(float(found[i]), sum(mine) / len(mine), of=10.0, dtype=torch.float32)
            assert close(float(rest[i]), sum(left) / len(left), of=10.0, dtype=torch.float32)


def test_the_machinery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed and no training: nothing serves, the verdict says so; every arm begins with the same rows of tokens."""
    for name, value in {"BEFORE": 1, "STEPS": 1, "TEXTS": 8, "BATCH": 2, "EVERY": 1}.items():
        monkeypatch.setattr(corpus_transfer, name, value)
    monkeypatch.setattr(_lab, "SEEDS", 1)
    monkeypatch.setattr("patchbay.train._runs.trained", untrained)
    page = tmp_path / "page.html"
    told = corpus_transfer.tell(corpus_transfer.form(), report=page, quiet=True, n=8)
    assert told["verdict"] is False
    assert set(told["returning"]) == set(corpus_transfer.ARMS)
    assert told["by_step"]["step"] == [0, 1]
    held = [
        one for one in lab.mentions(4 * 8, 1000, vocab=corpus_transfer.VOCAB, length=corpus_transfer.LENGTH) if one[1]
    ][:8]
    monkeypatch.setattr(corpus_transfer, "WATCHED", 3)
    kept = tmp_path / "runs"
    again = corpus_transfer.tell(corpus_transfer.form(), report=page, quiet=True, n=8, folder=str(kept))
    for arm, place in (("repeats", "repeats-0"), ("nothing before", "nothing-before-0")):
        end = float(corpus_transfer.returning(pb.load(kept / place), held[:3]).mean())
        assert again["by_step"][arm][1] == pytest.approx(end)  # the network as it ended, on what was watched
        rest = float(corpus_transfer.others(pb.load(kept / place), held).mean())
        assert again["others"][arm] == pytest.approx([rest])
    assert set(told["cut"]) == {"head of induction", "another head", "tap cut"}
    shown = html.unescape(page.read_text())
    assert "patchbay run corpus-transfer" in shown
    assert "It does not hold</b> that a returning name costs less after strings that repeat than after nothing" in shown
    assert f"patchbay show {kept}/repeats-0 opens one of them as any model; patchbay papers run yao2022 checks" in shown


def test_what_the_rest_of_the_text_costs_is_told() -> None:
    told = corpus_transfer._elsewhere([4.0, 4.5, 3.0], [3.5, 4.0, 4.0])
    assert "**3.83** nats a token after strings that repeat and 3.83 after nothing: more in 2 of 3 seeds" in told


@pytest.mark.slow
def test_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds: what read repeats knows names that return, what read nothing or noise does not; without the tap to the token before neither does it."""
    monkeypatch.setattr(_lab, "SEEDS", 2)
    told = corpus_transfer.tell(corpus_transfer.form(), report=tmp_path / "page.html", quiet=True)
    assert told["verdict"] is True
    means = {arm: sum(row["by_seed"]) / 2 for arm, row in told["returning"].items()}
    assert means["repeats"] + 1.0 < min(means["nothing follows"], means["nothing before"])
    assert min(told["cut"]["tap cut"]["by_seed"]) > 1.0


def test_a_model_of_few_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        pb.PatchbayError, match="the story corpus-transfer is told in 64 tokens; this llama model has 20"
    ):
        corpus_transfer.tell(lab.small(20), report=tmp_path / "page.html", quiet=True)
