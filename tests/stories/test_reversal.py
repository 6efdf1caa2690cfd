"""The story of reversal: the machinery on few steps, the claim in the slow tier, and a model with too few tokens refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.draw.report import Section
from patchbay.stories import _lab, reversal
from patchbay.tiny import lab
from tests.given import lent
from tests.tolerance import close


def test_facts_have_names_of_their_own() -> None:
    known = lab.facts(40, 0)
    names = [tuple(unit) for fact in known for unit in (fact[0], fact[2])]
    assert len(set(names)) == 80
    assert known == lab.facts(40, 0) != lab.facts(40, 1)
    assert len(lab.facts(512, 0)) == 512
    with pytest.raises(pb.PatchbayError, match="n=513: facts have names of their own.*1 to 512 facts"):
        lab.facts(513, 0)
    texts = lab.read_one_way(known)
    assert texts[:40] == known
    assert texts[40:] == [[b, r, a] for a, r, b in known[:20]]


def test_what_is_asked_is_both_tokens_after_the_other_name() -> None:
    """Greedy tokens and log-probabilities by single runs."""
    model, known = lent("llama"), lab.facts(6, 0)
    right, logp = reversal.asked(model, known)
    for i, (a, r, b) in enumerate(known):
        said = pb.run(model, [b + r]).last_logits[0].double()
        then = pb.run(model, [b + r + a[:1]]).last_logits[0]
        assert float(right[i]) == float(int(said.argmax()) == a[0] and int(then.argmax()) == a[1])
        assert close(float(logp[i]), float(torch.log_softmax(said, -1)[a[0]]), of=10.0, dtype=torch.float32)


def test_the_machinery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed and few steps: nothing is learned, the verdict says so, and the page is whole."""
    monkeypatch.setattr(reversal, "STEPS", 2)
    monkeypatch.setattr(_lab, "SEEDS", 1)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["run", "reversal", "--n", "8", "--report", str(page), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["verdict"] is False
    assert set(told["reversed"]) == set(reversal.ARMS)
    assert "difference" not in told["reversed"]["next token"]
    assert set(told["where"]) == {"L0.attn", "L0.mlp", "L1.attn", "L1.mlp"}
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "patchbay run reversal" in text
    for other in (["--seed", "1"], ["--report", str(page.with_suffix(".knob"))]):
        done = CliRunner().invoke(cli, ["run", "reversal", "--n", "8", "--report", str(page), *other])
        assert done.exit_code == 2
        assert ("--overwrite replaces it" if "--seed" in other else "the suffix is .html") in done.output
    assert page.read_text() == text
    page.write_text("mine")
    assert CliRunner().invoke(cli, ["run", "reversal", "--report", str(page)]).exit_code == 2
    monkeypatch.setattr(_lab, "_told", lambda *_: {"told": 1})
    assert CliRunner().invoke(cli, ["run", "reversal", "--report", str(page), "--overwrite"]).exit_code == 0
    done = CliRunner().invoke(cli, ["run", "reversal", "--n", "10000", "--report", str(tmp_path / "none.html")])
    assert done.exit_code == 2
    assert "1 to 512 facts" in " ".join(done.output.split())
    done = CliRunner().invoke(cli, ["run", "reversal", "--device", "cpu"])
    assert "device goes with --model" in done.output


@pytest.mark.slow
def test_the_claim(tmp_path: Path) -> None:
    """Two seeds: facts read one way are known the other way after permutation alone."""
    _lab_seeds, _lab.SEEDS = _lab.SEEDS, 2
    try:
        told = reversal.tell(reversal.form(), report=tmp_path / "page.html", quiet=True)
    finally:
        _lab.SEEDS = _lab_seeds
    assert told["verdict"] is True
    assert min(told["reversed"]["units permuted"]["by_seed"]) > 0.9
    assert max(told["reversed"]["next token"]["by_seed"]) < 0.1
    assert max(told["reversed"]["tokens reversed"]["by_seed"]) < 0.1
    assert min(told["read_both_ways"].values()) > 0.9


def test_a_model_of_few_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pb.PatchbayError, match="the story reversal is told in 34 tokens; this llama model has 20"):
        reversal.tell(lab.small(20), report=tmp_path / "page.html", quiet=True)


def test_arms_are_compared_seed_by_seed() -> None:
    values = {
        "a": [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])],
        "b": [torch.zeros(3), torch.zeros(3)],
    }
    found = _lab.arms_section("t", [], values, "share", "b", "key").data["key"]
    assert found["a"]["by_seed"] == pytest.approx([2 / 3, 1 / 3])
    assert found["a"]["difference"][0] == pytest.approx(0.5)
    assert (found["a"]["above"], found["a"]["below"], found["a"]["p"]) == (2, 0, 0.5)
    assert found["b"] == {"by_seed": [0.0, 0.0]}


@pytest.mark.parametrize(("held", "words"), [(True, "holds"), (False, "does not hold")])
def test_what_decides_is_said_in_words_on_the_screen_and_on_the_page(held: bool, words: str) -> None:
    """Colours alone say it to nobody who prints, pipes or does not tell them apart."""
    told = Section("t", ["first"], data={"key": 1})
    _lab.judged(told, held, "one is above the other")
    assert told.text == ["first", f"**It {words}** that one is above the other."]
    assert told.verdict is held
    assert told.data == {"key": 1, "verdict": held}


def test_every_story_of_training_names_a_paper_whose_claim_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbay.papers.claims import CLAIMS
    from patchbay.stories import corpus_transfer, impossible_languages, low_rank, one_layer_induction, sinks

    told: list[_lab.Story] = []
    monkeypatch.setattr(_lab, "tell", lambda story, *_, **__: told.append(story))
    for one in (reversal, corpus_transfer, impossible_languages, low_rank, one_layer_induction, sinks):
        one.tell(lent("llama"), report=tmp_path / "page.html")
    assert len(told) == 6
    assert all(story.paper in CLAIMS for story in told)
    closer = _lab._next(told[0], "units-permuted", 3, None)
    assert closer.startswith(
        "patchbay run reversal --folder runs keeps the networks, and patchbay show runs/units-permuted-3 opens"
    )
    assert _lab._next(told[0], "plain", 0, "my runs").startswith("patchbay show 'my runs/plain-0' opens one of them")
