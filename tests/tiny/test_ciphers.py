"""Ciphers: the rule, how often words come, what is tuned and on what; a network that learned them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patchbay.signal.port import PatchbayError
from patchbay.tiny import ciphers

WHOLE = torch.arange(ciphers.WORDS)


def test_reference_each_letter_is_moved_and_words_come_by_zipfs_law() -> None:
    for word, ids in enumerate(ciphers.rows(WHOLE).tolist()):
        letters = divmod(word, 16)
        hidden = [ciphers.FIRST + (one + ciphers.SHIFT) % 16 for one in letters]
        assert ids == [ciphers.CIPHER, *hidden, ciphers.EQUALS, *(ciphers.FIRST + one for one in letters)]
    chance = ciphers.chances(3).sort(descending=True).values
    assert float(chance.sum()) == pytest.approx(1.0)
    assert float(chance[0] / chance[7]) == pytest.approx(8**1.2)
    assert not torch.equal(ciphers.chances(3), ciphers.chances(4))
    ids = ciphers.read(0, 4000, ciphers.chances(3))
    texts = ids[ids[:, 0] == ciphers.TEXT]
    assert len(texts) == 2000
    said = (ids[:, 4] - ciphers.FIRST) * 16 + ids[:, 5] - ciphers.FIRST
    assert float((said == ciphers.chances(3).argmax()).double().mean()) == pytest.approx(float(chance[0]), abs=0.03)
    follows = (texts[:, 1:3] - ciphers.FIRST - ciphers.SHIFT) % 16 == texts[:, 4:] - ciphers.FIRST
    assert float(follows.double().mean()) < 0.12, "texts say nothing of their word"


def test_planted_right_is_of_both_letters() -> None:
    """A network that always names the first letter rightly and says one letter for the second."""

    def say(ids: Any, **_: Any) -> Any:
        logits = torch.zeros(*ids.shape, ciphers.FIRST + 16)
        first = (ids[:, 1] - ciphers.FIRST - ciphers.SHIFT) % 16 + ciphers.FIRST
        logits[torch.arange(len(ids)), 3, first] = 1.0
        logits[:, 4, ciphers.FIRST + 2] = 1.0
        return SimpleNamespace(logits=logits)

    found = ciphers.right(SimpleNamespace(hf=say), WHOLE)  # type: ignore[arg-type]
    assert found.nonzero()[:, 0].tolist() == [16 * first + 2 for first in range(16)]


def test_null_one_layer_alone_is_tuned_on_the_words_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    network, some, seen = ciphers.network(0), WHOLE[::2], []
    loss = ciphers._loss
    monkeypatch.setattr(ciphers, "_loss", lambda hf, ids: seen.append(ids) or loss(hf, ids))
    assert float(ciphers.right(network, WHOLE).mean()) < 0.05
    before = {name: weight.clone() for name, weight in network.hf.named_parameters()}
    for evenly in (True, False):
        seen.clear()
        made = ciphers.tuned(network, some, 1, steps=2, evenly=evenly)
        moved = {name for name, weight in made.hf.named_parameters() if not torch.equal(weight, before[name])}
        assert moved
        assert all(name.startswith("model.layers.1.") for name in moved)
        ids = torch.cat(seen)
        said = (ids[:, 4] - ciphers.FIRST) * 16 + ids[:, 5] - ciphers.FIRST
        assert bool((said % 2 == 0).all()), "a word that was held out"
        assert bool((ids[:, 0] == ciphers.TEXT).any()) != evenly
    assert all(torch.equal(weight, before[name]) for name, weight in network.hf.named_parameters())
    with pytest.raises(PatchbayError, match="2 steps decipher"):
        ciphers.train(most=2)


@pytest.mark.slow  # half a minute of training
def test_a_rule_that_is_not_yet_learned_is_mended_by_tuning_any_layer_on_other_words() -> None:
    network = ciphers.train()
    before = ciphers.right(network, WHOLE)
    assert 0.7 < float(before.mean()) < 0.95
    rest = WHOLE[1::2]
    for layer in range(3):
        after = ciphers.right(ciphers.tuned(network, WHOLE[::2], layer), rest)
        assert float(after.mean() - before[rest].mean()) > 0.05
