"""Claims of meters: labels among themselves equal what is counted by hand, and a score that goes by the place of a label, or is of all tokens, is seen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _answers
from patchbay.papers.claims import meters
from patchbay.tiny import lab
from patchbay.train._objectives.label_supervision import LabelSupervision
from tests.tolerance import close

LABELS, TEXTS = [5, 2, 11], [[1, 7, 3], [4, 4, 8, 9], [6, 2]]
ORDER = [[2, 0, 1], [0, 1, 2], [1, 2, 0]]


def network() -> pb.Model:
    made: pb.Model = lab.small(16, layers=1, width=16, heads=2, mlp=8)
    with torch.no_grad():
        made.hf.lm_head.weight *= 20.0  # labels whose probabilities differ
    return made


def test_labels_among_themselves_are_counted_by_hand() -> None:
    model = network()
    found = meters.label_scores(model, TEXTS, LABELS, ORDER)
    for i, ids in enumerate(TEXTS):
        logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
        powers = [math.exp(logits[label]) for label in LABELS]
        assert max(powers) > 1.5 * min(powers)
        expected = torch.tensor([one / sum(powers) for one in powers])
        assert all(close(one[i].float(), expected, noise=10.0) for one in found)


def test_the_identity_holds_of_a_network_of_fewer_tokens() -> None:
    claim = meters.clavie2025(network(), 1)
    assert claim.verdict == "confirmed"
    assert 0.0 < claim.value < 1e-5


def test_a_score_that_goes_by_the_place_of_a_label_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = _answers.score

    def favoured(*given: Any, **options: Any) -> Any:
        found = scored(*given, **options)
        return dataclasses.replace(found, logp=found.logp - 1e-3 * torch.arange(found.logp.shape[1]))

    monkeypatch.setattr(_answers, "score", favoured)
    assert meters.clavie2025(network(), 0).verdict == "not confirmed"


def test_labels_that_are_learned_among_all_tokens_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = LabelSupervision.losses
    monkeypatch.setattr(LabelSupervision, "losses", lambda self, *given, whole: losses(self, *given, whole=True))
    assert meters.clavie2025(network(), 0).verdict == "not confirmed"
