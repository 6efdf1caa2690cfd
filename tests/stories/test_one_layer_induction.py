"""The story of one layer: strings, shares and cuts by hand, the machinery on few steps, the claim in the slow tier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.blocks import convolved
from patchbay.stories import _lab, one_layer_induction
from patchbay.tiny import lab
from tests.given import lent


def test_strings_repeat_and_those_of_the_null_do_not() -> None:
    for text in lab.repeats(20, 0, vocab=30, length=32, most=8):
        assert any(text[:-p] == text[p:] for p in range(4, 9))
    assert lab.repeats(3, 0, vocab=30) == lab.repeats(3, 0, vocab=30) != lab.repeats(3, 1, vocab=30)
    null = lab.repeats(20, 0, vocab=30, length=32, least=32, most=32)
    assert not any(text[:-p] == text[p:] for text in null for p in range(4, 13))


def test_the_share_is_that_of_tokens_read_before() -> None:
    model, texts = lent("llama"), lab.repeats(5, 0, vocab=30, length=20, most=8)
    found = one_layer_induction.repeated(model, texts, most=8)
    for i, text in enumerate(texts):
        said = [int(pb.run(model, [text[:t]]).last_logits.argmax()) for t in range(17, 20)]
        assert float(found[i]) == pytest.approx(sum(a == b for a, b in zip(said, text[17:], strict=True)) / 3)


def test_the_machinery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed and one step: nothing is learned, the verdict says so, and what was cut was another model's taps."""
    for name, value in {"STEPS": 1, "STRINGS": 8, "BATCH": 2}.items():
        monkeypatch.setattr(one_layer_induction, name, value)
    monkeypatch.setattr(_lab, "SEEDS", 1)
    cut: list[tuple[int, ...]] = []
    own = convolved.cut
    monkeypatch.setattr(convolved, "cut", lambda model, taps: (cut.append(taps), own(model, taps)))
    told = one_layer_induction.tell(one_layer_induction.form(), report=tmp_path / "page.html", quiet=True, n=8)
    assert told["verdict"] is False
    assert set(told["repeated"]) == set(one_layer_induction.ARMS)
    assert set(told["looking"]["plain"]) == {
        "induction",
        "induction_uniform",
        "previous_token",
        "previous_token_uniform",
    }
    assert cut == [(1,), (1, 2)]
    assert (tmp_path / "page.html").read_text().count("<svg") == 2


@pytest.mark.slow
def test_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds: the convolved layer repeats, the plain one does not, and one cut tap ends it."""
    monkeypatch.setattr(_lab, "SEEDS", 2)
    told = one_layer_induction.tell(one_layer_induction.form(), report=tmp_path / "page.html", quiet=True)
    assert told["verdict"] is True
    assert min(told["repeated"]["convolved"]["by_seed"]) > 0.8
    assert max(told["repeated"]["plain"]["by_seed"]) < 0.5
    assert max(told["repeated"]["nothing to repeat"]["by_seed"]) < 0.1
    looks = told["looking"]["convolved"]
    assert looks["induction"] > 0.2
    assert looks["previous_token"] < 0.2
    assert max(told["cut"]["tap 1 cut"]["by_seed"]) < 0.4


def test_a_model_of_few_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        pb.PatchbayError, match="the story one-layer-induction is told in 32 tokens; this llama model has 20"
    ):
        one_layer_induction.tell(lab.small(20), report=tmp_path / "page.html", quiet=True)
    assert torch.is_grad_enabled()
