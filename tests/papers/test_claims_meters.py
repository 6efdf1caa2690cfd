"""Claims of meters: benchmarks follow what is read where it is planted; labels among themselves equal what is counted by hand, and a score that goes by the place of a label, or is of all tokens, is seen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _answers
from patchbay.papers.claims import meters
from patchbay.tiny import domains, lab
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


def test_a_score_that_goes_by_the_place_of_a_label_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = _answers.score

    def favoured(*given: Any, **options: Any) -> Any:
        found = scored(*given, **options)
        return dataclasses.replace(found, logp=found.logp - 1e-3 * torch.arange(found.logp.shape[1]))

    assert float(meters.label_errors(network(), TEXTS, LABELS, 0).max()) < meters.WITHIN
    monkeypatch.setattr(_answers, "score", favoured)
    assert float(meters.label_errors(network(), TEXTS, LABELS, 0).max()) > meters.WITHIN


def test_labels_that_are_learned_among_all_tokens_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = LabelSupervision.losses
    monkeypatch.setattr(LabelSupervision, "losses", lambda self, *given, whole: losses(self, *given, whole=True))
    assert float(meters.label_errors(network(), TEXTS, LABELS, 0).min()) > meters.WITHIN


@pytest.mark.parametrize(
    ("names", "unread", "probe", "error", "verdict"),
    [
        (0.9, 0.5, 0.6, 1e-7, "confirmed"),
        (0.5, 0.3, 0.8, 1e-7, "not confirmed"),
        (0.5, 0.8, 0.3, 1e-7, "not confirmed"),
        (0.9, 0.5, 0.6, 1e-3, "inconclusive"),
    ],
)
def test_names_have_to_beat_both_other_ways_and_to_be_shares_of_all_tokens(
    monkeypatch: pytest.MonkeyPatch, names: float, unread: float, probe: float, error: float, verdict: str
) -> None:
    shares = {"names": names, "unread": unread, "probe": probe, "dealt": 0.2, "before": 0.7}
    found = {name: (torch.arange(100) < 100 * share).double().expand(4, -1) for name, share in shares.items()}
    monkeypatch.setattr(meters, "_labelled", lambda seed: (found, error))
    claim = meters.clavie2025(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    assert claim.value == pytest.approx(names - max(unread, probe))


def test_planted_names_are_right_and_a_probe_finds_what_the_last_state_says() -> None:
    """A network without layers that says the name of the last word's topic: labels are right wherever that word is of the topic, in the same texts for the probe; other labels are not."""
    model = lab.small(meters.KNOWN + 2 * meters.TOPICS, layers=1, width=16, heads=2, mlp=8)
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.o_proj.weight.zero_()
        model.hf.model.layers[0].mlp.down_proj.weight.zero_()
        model.hf.model.embed_tokens.weight.zero_()
        model.hf.lm_head.weight.zero_()
        for topic in range(meters.TOPICS):
            model.hf.model.embed_tokens.weight[8 * topic : 8 * topic + 8, topic] = 1.0
            model.hf.lm_head.weight[meters.NAMES[topic], topic] = 1.0
            model.hf.lm_head.weight[meters.UNREAD[topic - 1], topic] = 1.0
    held = meters.topical(40, 1)
    own = torch.tensor([float(ids[-1] // 8 == topic) for ids, topic in held], dtype=torch.float64)
    assert 0.2 < float(own.mean()) < 0.7
    assert torch.equal(meters.labelled_right(model, held=held, labels=meters.NAMES), own)
    assert float((meters.labelled_right(model, held=held, labels=meters.UNREAD) * own).sum()) == 0.0
    some = [([8 * topic + word], topic) for topic in range(meters.TOPICS) for word in range(8)]
    assert torch.equal(meters.probed_right(model, some, [([8 * t + 3], t) for t in range(8)]), torch.ones(8).double())
    others = 20 * [([8 * t + 3], (t + 1) % 8) for t in range(8)]  # more than the examples
    assert float(meters.probed_right(model, some, others).sum()) == 0.0


def test_texts_are_named_where_they_are_read_and_not_where_they_are_asked() -> None:
    for named in (True, False):
        said = [(token, topic) for ids, topic in meters.topical(300, 2, named=named) for token in ids]
        assert {len(ids) for ids, _ in meters.topical(20, 2, named=named)} == {meters.LONG}
        names = [(token, topic) for token, topic in said if token >= meters.KNOWN]
        assert all(token == meters.NAMES[topic] for token, topic in names)
        assert abs(len(names) / len(said) - named / 8) < 0.02
        words = [token // 8 == topic for token, topic in said if token < meters.KNOWN]
        assert 0.3 < sum(words) / len(words) < 0.6


def test_every_way_has_the_same_examples_and_a_dealt_label_is_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is stood in for: what each way was trained on, from which network, and for how long."""
    seen: list[tuple[Any, Any, str, dict[str, Any]]] = []
    start = lab.small(meters.KNOWN + 2 * meters.TOPICS, layers=1, width=16, heads=2, mlp=8)

    def trained(network: Any, data: Any, of: Any, seed: int, arms: Any, **plan: Any) -> Any:
        seen.append((network, data, next(iter(arms.values())).objective, plan))
        return {name: of(start) for name in arms}

    monkeypatch.setattr(meters, "SIZES", (8, 16))
    monkeypatch.setattr(meters, "TOLD", 24)
    monkeypatch.setattr(meters, "trained", trained)
    found, error = meters._labelled.__wrapped__(3)
    assert error < meters.WITHIN
    assert all(one.shape == (2, 24) for one in found.values())
    assert seen[0][3]["fresh"]
    assert len(seen) == 7
    for i, size in ((1, 8), (4, 16)):
        (_, names, _, plan), (_, unread, _, _), (_, dealt, _, _) = seen[i : i + 3]
        assert all(
            network is start and other == plan and "fresh" not in other for network, _, _, other in seen[i : i + 3]
        )
        assert len(names) == len(unread) == len(dealt) == size
        assert [ids for ids, _ in names] == [ids for ids, _ in unread] == [ids for ids, _ in dealt]
        assert [label + meters.TOPICS for _, (label,) in names] == [label for _, (label,) in unread]
        assert names != dealt
        assert seen[i][2].split("=")[1] == seen[i + 2][2].split("=")[1] != seen[i + 1][2].split("=")[1]
    read = {tuple(ids) for ids in seen[0][1]}
    asked = {tuple(ids) for ids, _ in meters.topical(24, 3 + 2000)}
    assert not asked & (read | {tuple(ids) for ids, _ in seen[4][1]})


def test_items_ask_for_the_likeliest_follower_among_tokens_that_never_follow() -> None:
    for law in (0, 11):
        items, followers = meters.asked_of_law(law, 2), domains.law(law)
        assert len(items) == meters.ITEMS
        for one in items:
            own = followers[one["prompt"][-1]].tolist()
            said = [token for (token,) in one["choices"]]
            assert said[one["answer"]] == own[0]
            assert len(set(said)) == meters.CHOICES
            assert not set(own[1:]) & set(said)
            assert one["prompt"][0] == domains.N_TOKENS + law
        assert {one["answer"] for one in items} == set(range(meters.CHOICES))
        assert {one["group"] for one in items} == {str(law)}


def test_a_network_is_asked_as_it_was_before_each_step_and_reads_half_of_the_laws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: of two laws that are read the network is set, step by step, to know one; the other and those that it does not read stay at chance."""
    for name, value in (("LAWS", 2), ("ITEMS", 30), ("READ", (0, 2, 4)), ("STEPS", 6)):
        monkeypatch.setattr(meters, name, value)
    made, drawn = domains.texts, list[tuple[int, int]]()
    followers = domains.law(0)

    def texts(law: int, n: int, *, seed: int) -> torch.Tensor:
        drawn.append((law, seed))
        return made(law, n, seed=seed)

    def steps_of(hf: Any, loss: Any, steps: int, **_: Any) -> None:
        for step in range(steps):
            assert loss(hf, step).requires_grad
            with torch.no_grad():  # one more sixth of the tokens is followed by what follows it
                for token in range(step, 48, 6):
                    hf.model.embed_tokens.weight[token] = 0.0
                    hf.model.embed_tokens.weight[token, token] = 10.0
                    hf.lm_head.weight[int(followers[token, 0]), token] = 10.0

    small = lab.small

    def bigram(*given: Any, **sizes: Any) -> pb.Model:
        network = small(*given, **sizes)
        with torch.no_grad():
            for layer in network.hf.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            network.hf.lm_head.weight.zero_()
        return network

    monkeypatch.setattr(domains, "texts", texts)
    monkeypatch.setattr(lab, "small", bigram)
    monkeypatch.setattr(lab, "steps_of", steps_of)
    found = meters._followed.__wrapped__(0)
    knows, other = found["read"]
    assert [row["benchmark"] for row in (*found["read"], *found["other"])] == ["0", "1", "2", "3"]
    assert knows["first"] == pytest.approx(1 / meters.CHOICES)
    assert knows["last"] == 1.0
    assert knows["rho"] == pytest.approx(1.0)
    assert all(row["last"] < 0.6 for row in (other, *found["other"]))
    assert len(found["losses"]) == 4
    learned = {law for law, seed in drawn if seed >= 10**6}
    assert learned == {0, 1}
    assert {law for law, seed in drawn if seed < 0} == {0, 1, 2, 3}
    assert found["losses"][0] == pytest.approx(math.log(domains.N_TOKENS + 4))


@pytest.mark.parametrize(("other", "verdict"), [(0.0, "confirmed"), (0.9, "inconclusive"), (1.0, "not confirmed")])
def test_benchmarks_have_to_follow_more_where_their_law_is_read(
    monkeypatch: pytest.MonkeyPatch, other: float, verdict: str
) -> None:
    def rows(rho: float, q: float) -> list[dict[str, float]]:
        return [{"rho": rho - 0.05 * (i % 3), "q": q, "last": rho} for i in range(meters.LAWS)]

    read = rows(0.9, 0.01)
    if verdict == "inconclusive":
        read = read[1:] + read[:1]
    found = {"read": read, "other": rows(other, 0.2), "losses": [4.0, 1.0]}
    monkeypatch.setattr(meters, "_followed", lambda seed: found)
    claim = meters.correa2024(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    assert "(8 of 8 beyond chance" in claim.text
    assert "(0 of 8;" in claim.text
