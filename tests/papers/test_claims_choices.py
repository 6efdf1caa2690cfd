"""Claims of choices: the better of the two other ways is what counts, both choose by the same states, all are trained alike; shares are the law's, neurons those that are active on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.corpus import recovery, selection
from patchbay.papers.claims import choices
from patchbay.tiny import lab


@pytest.mark.parametrize(
    ("gradient", "nearest", "drawn", "verdict"),
    [
        (1.0, 2.0, 3.0, "confirmed"),
        (2.0, 1.0, 3.0, "not confirmed"),
        (2.0, 3.0, 1.0, "not confirmed"),
    ],
)
def test_the_better_of_the_other_ways_is_what_counts(
    monkeypatch: pytest.MonkeyPatch, gradient: float, nearest: float, drawn: float, verdict: str
) -> None:
    noise = 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = {"gradient": gradient, "nearest": nearest, "drawn": drawn, "before": 5.0}
    shares = {"gradient": [0.1, 0.6, 0.2], "nearest": [0.3, 0.2, 0.1], "drawn": [0.1] * 3}
    found = {"losses": {name: value + noise * (i + 1) for i, (name, value) in enumerate(losses.items())}}
    monkeypatch.setattr(choices, "_chosen", lambda seed: {**found, "shares": shares})
    claim = choices.kang2024(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    assert claim.value == pytest.approx(min(nearest, drawn) - gradient, abs=0.1)
    assert "10%, 60%, 20% (gradient; most after layer 1)" in claim.text


def test_choices_are_trained_alike_and_scored_on_texts_that_no_way_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is stood in for: what each choice was trained on, for how long, and from which network."""
    seen: list[tuple[Any, int, dict[str, Any]]] = []
    start = lab.small(48, layers=3, width=16, heads=2, mlp=8)

    def trained(network: Any, data: Any, of: Any, seed: int, arms: Any, **plan: Any) -> Any:
        seen.append((network, len(data), plan))
        return {name: of(start) for name in arms}

    for name, n in (("COMMON", 90), ("RARE", 10), ("TAKEN", 8), ("HELD", 12)):
        monkeypatch.setattr(choices, name, n)
    monkeypatch.setattr(choices, "trained", trained)
    monkeypatch.setattr(selection, "pick", lambda model, pool, target, k, layer: list(range(len(pool) - k, len(pool))))
    found = choices._chosen.__wrapped__(3)
    assert [n for _, n, _ in seen] == [choices.COMMON + choices.RARE] + [choices.TAKEN] * 3
    assert seen[0][2]["fresh"]
    assert all(network is start and plan == seen[1][2] and "fresh" not in plan for network, _, plan in seen[1:])
    assert found["shares"]["gradient"] == [1.0] * 3  # the rare law stands last
    assert 0.0 <= found["shares"]["drawn"][0] < 0.6
    assert all(torch.equal(one, found["losses"]["before"]) for one in found["losses"].values())
    assert len(found["losses"]["before"]) == choices.HELD


def test_neighbours_are_the_nearest_of_any_text_of_the_target() -> None:
    model = lab.small(24, layers=2, width=16, heads=2, mlp=8)
    rows = [[i, i + 1, i + 2] for i in range(10)]
    both = selection.states(model, [*rows, [3, 4, 5], [7, 8, 9]], layer=1)
    far = [min(float((both[i] - both[j]).norm()) for j in (10, 11)) for i in range(10)]
    assert choices.nearest(model, rows, [[3, 4, 5], [7, 8, 9]], 4, 1) == sorted(range(10), key=lambda i: far[i])[:4]
    assert set(choices.nearest(model, rows, [[3, 4, 5], [7, 8, 9]], 2, 1)) == {3, 7}


def test_neurons_of_a_kind_are_those_that_are_active_on_it() -> None:
    """Planted: the first neurons of layer 0 read the first kind's tokens, the next ones the second kind's."""
    network = lab.small(24, layers=1, width=16, heads=2, mlp=64)
    layer = network.hf.model.layers[0]
    with torch.no_grad():
        network.hf.model.embed_tokens.weight[:, :2] = 0.0
        network.hf.model.embed_tokens.weight[:12, 0] = 8.0
        network.hf.model.embed_tokens.weight[12:, 1] = 8.0
        for map_ in (layer.mlp.gate_proj, layer.mlp.up_proj):
            map_.weight[:16] = 0.0
            map_.weight[:8, 0] = 5.0
            map_.weight[8:16, 1] = 5.0
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(a, a + 12, (20, 6), generator=draw).tolist() for a in (0, 12)]
    one, other = choices.of_laws(network, texts)
    assert set(one) == {(0, i) for i in range(8)}
    assert set(other) == {(0, i) for i in range(8, 16)}


def test_a_share_is_the_laws_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[Any] = []

    def pick(model: Any, pool: Any, n: int, *, cut: Any, clusters: int) -> Any:
        cuts.append(cut)
        return recovery.Picked([*range(15), *range(choices.ASKED, choices.ASKED + 5)], [], [], [], [], [])

    monkeypatch.setattr(recovery, "pick", pick)
    network = lab.small(24, layers=2, width=16, heads=2, mlp=8)
    assert choices.share(network, [], [(1, 3)], 0) == 0.75
    assert choices.share(network, [], [(0, 2), (1, 3)], 1) == 0.25
    assert cuts[1] == [pb.zero(network.layers[i].mlp.neurons[j].act) for i, j in ((0, 2), (1, 3))]


def test_half_is_what_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A law that departs more whichever is cut is no proof; one that departs where it was cut is."""
    draw = 0.02 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for shares, verdict in (((0.9, 0.1), "inconclusive"), ((0.8, 0.7), "confirmed"), ((0.2, 0.3), "not confirmed")):
        own = torch.tensor(shares, dtype=torch.float64) + draw
        monkeypatch.setattr(choices, "_recovered", lambda seed, own=own: (own, own))
        claim = choices.he2025(None, 0)  # type: ignore[arg-type]
        assert claim.verdict == verdict
        assert claim.value == pytest.approx(sum(shares) / 2, abs=0.02)
