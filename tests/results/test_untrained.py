"""untrained: a network of the form, drawn by the seed, whose name is no place where a tokenizer lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import patchbay as pb
from patchbay.results.untrained import untrained
from patchbay.train import _equal
from tests.given import lent


def test_it_has_the_form_and_weights_of_the_seed() -> None:
    model = lent("llama")
    one, same, other = (untrained(model, seed) for seed in (0, 0, 1))
    assert isinstance(one, pb.Model) and isinstance(same, pb.Model) and isinstance(other, pb.Model)  # noqa: PT018
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, model.fingerprint}) == 3
    own, drawn = model.hf.state_dict(), one.hf.state_dict()
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in drawn.items()}


def test_no_tokenizer_is_looked_for_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder nor the hub is asked for one, also where a method is given the network, and where it is drawn wider."""
    asked: list[Any] = []

    def from_pretrained(*args: Any, **options: Any) -> None:
        asked.append((args, options))
        raise OSError

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    model = lent("llama")
    drawn = untrained(model, 0)
    assert isinstance(drawn, pb.Model)
    wide = _equal.of_width(drawn, 40, drawn, 0)
    for one in (drawn, wide):
        assert one.tokenizer is None
        pb.find.isotropy(one, torch.randint(3, 60, (2, 8)).tolist())
        assert asked == []
