"""Automata in context: what is judged, on which streams; networks that read them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patchbay.corpus import automata as languages
from patchbay.signal.port import PatchbayError
from patchbay.tiny import automata

TINY = 0.001  # what is said to be impossible has a chance of 1e-9


def saying(of: Any) -> Any:
    """A network that says, after each token, what a function of the automaton and its stream gives; the separator with the same odds as the rest together."""
    table = {tuple(ids): of(made, ids) for made, ids in automata.streams(6, -1)}

    def say(ids: Any, **_: Any) -> Any:
        rows = torch.tensor([table[tuple(row)] for row in ids.tolist()], dtype=torch.float64)
        return SimpleNamespace(logits=torch.cat([rows, torch.ones_like(rows[..., :1])], -1).clamp_min(1e-9).log())

    return SimpleNamespace(hf=say)


def test_planted_the_truth_is_at_no_distance_and_counting_at_its_own() -> None:
    found = automata.judge(saying(languages.following), n=6)
    assert float(found.distance.max()) < TINY
    assert float(found.valid.min()) == 1.0
    assert float((found.apart - found.counted).abs().max()) < TINY
    assert found.apart.shape == (3, 6)
    found = automata.judge(saying(lambda made, ids: languages.counted(ids, 2)), n=6)
    assert float(found.apart[2].max()) < TINY
    assert float((found.distance - found.counted[2]).abs().max()) < TINY
    assert float(found.apart[0].min()) > 0.1


def test_reference_distance_and_validity_as_loops() -> None:
    model = automata.network("plain")
    found = automata.judge(model, n=4, seed=3)
    for i, (made, ids) in enumerate(automata.streams(4, -4)):
        logits = model.hf(torch.tensor([ids])).logits[0].detach().double()
        true = languages.following(made, ids)
        gaps, fits = [], []
        for at in range(automata.LENGTH // 2, automata.LENGTH):
            p = [float(x) for x in logits[at, : languages.SYMBOLS].softmax(-1)]
            gaps.append(languages.distance(p, true[at]))
            fits.append(languages.valid(p, true[at]))
        assert float(found.distance[i]) == pytest.approx(sum(gaps) / len(gaps))
        assert float(found.valid[i]) == pytest.approx(sum(fits) / len(fits))


def test_null_saying_nothing_is_as_far_as_even_chances_and_streams_of_training_are_others() -> None:
    flat = automata.judge(saying(lambda made, ids: [[1 / 8] * 8] * len(ids)), n=6)
    even = [
        sum(abs(1 / 8 - p) for p in row) / 2
        for made, ids in automata.streams(6, -1)
        for row in languages.following(made, ids)[48:]
    ]
    assert float(flat.distance.mean()) == pytest.approx(sum(even) / len(even))
    judged = {tuple(ids) for _, ids in automata.streams(64, -1)}
    assert not judged & {tuple(ids) for step in range(5) for _, ids in automata.streams(automata.ROWS, 10**6 + step)}
    sizes = [sum(p.numel() for p in automata.network(form).hf.parameters()) for form in automata.FORMS]
    assert sizes[0] < sizes[1]
    with pytest.raises(PatchbayError, match="ngram"):
        automata.network("bigram")


@pytest.mark.slow  # half a minute of training each
def test_ngram_layers_bring_a_network_nearer_to_the_automaton() -> None:
    one, other = (automata.judge(automata.train(form)) for form in automata.FORMS)
    assert float(one.distance.mean()) < 0.38
    assert float(one.valid.mean()) > 0.85
    assert float((other.distance - one.distance).mean()) > 0.05
