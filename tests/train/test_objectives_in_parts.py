"""Objectives that hide, label, compare or reward: values and gradients by plain loops, the nulls that they name, and what they refuse."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.blocks.two_way import two_way
from patchbay.tiny.text import story
from patchbay.train._objectives import objective
from patchbay.train._objectives._masks import masked
from patchbay.train._objectives._objective import collated, learned
from patchbay.train._objectives.fine_grained import drawn, moved, reinforce, rewards
from patchbay.train._objectives.sami import bound, contrast
from patchbay.train._plan import Arm, Rows, plan_of
from tests.given import lent
from tests.tolerance import close

TEXTS = [[[5, 6, 7, 8, 9, 10]], [[11, 12, 13, 14]], [[6, 5, 15]]]


def batch_of(aim: Any, documents: Sequence[Any], seed: int = 0) -> dict[str, Tensor]:
    return collated([aim.row(one, random.Random(f"{seed} {i}")) for i, one in enumerate(documents)])


def graded(model: pb.Model, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss and its gradient by all weights."""
    weights = [p for p in model.hf.parameters() if p.requires_grad or p.requires_grad_() is not None]
    with torch.enable_grad():
        found = loss()
        parts = torch.autograd.grad(found, weights, allow_unused=True)
    for p in weights:
        p.requires_grad_(False)
    return found.detach(), torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(weights, parts, strict=True)]
    )


def same(model: pb.Model, text: str, documents: Sequence[Any], by_hand: Callable[[], Tensor], seed: int = 0) -> None:
    """The objective's loss and gradient are those of a sum written out in the test."""
    aim = objective(text)
    batch = batch_of(aim, documents, seed)
    found, slope = graded(model, lambda: aim.loss(model, model.hf, batch, learned(batch["labels"])))
    expected, by = graded(model, by_hand)
    assert close(found, expected, of=10.0)
    assert float(by.abs().max()) > 0
    assert close(slope, by, of=max(1.0, float(by.abs().max())), noise=512)  # summed in another order


def logp(model: pb.Model, ids: Sequence[int]) -> Tensor:
    """log p [position, vocab] of a text alone."""
    return torch.log_softmax(model.hf(torch.tensor([list(ids)])).logits[0].float(), -1)


# --- masked tokens, seen from both sides --------------------------------------------------------------


def test_bico_masks_by_its_share_and_never_the_first() -> None:
    aim, n = objective("bico:share=0.3,both=0.5,mask=1"), 2000
    rows = [aim.row(TEXTS[0], random.Random(i)) for i in range(n)]
    plain = [row for row in rows if row[0] == row[1]]
    assert abs(len(plain) / n - 0.5) < 4 * (0.25 / n) ** 0.5
    filled = [row for row in rows if row[0] != row[1]]
    assert all(ids[0] == 5 and labels[0] == -100 for ids, labels in filled)
    hidden = sum(token == 1 for ids, _ in filled for token in ids)
    places = 5 * len(filled)
    assert abs(hidden / places - 0.3) < 4 * (0.21 / places) ** 0.5
    for ids, labels in filled[:50]:
        assert [one if two == -100 else two for one, two in zip(ids, labels, strict=True)] == TEXTS[0][0]
        assert all((token == 1) == (label != -100) for token, label in zip(ids, labels, strict=True))


def test_bico_throws_one_coin_for_all_rows_of_a_batch() -> None:
    plan = plan_of({"steps": 400, "batch_size": 3})
    rows = Rows(TEXTS, Arm("bico:share=1,both=0.3,mask=1"), plan, 0)
    filled = [[rows[3 * step + i][0][1] == 1 for i in range(3)] for step in range(400)]
    assert all(len(set(batch)) == 1 for batch in filled)
    assert abs(sum(batch[0] for batch in filled) / 400 - 0.3) < 4 * (0.21 / 400) ** 0.5
    assert rows[7] == Rows(TEXTS, Arm("bico:share=1,both=0.3,mask=1"), plan, 0)[7]


def test_bico_without_its_coin_is_the_plain_loss() -> None:
    model = lent("llama")
    batch = batch_of(objective("bico:both=0"), TEXTS)
    one, two = (
        graded(model, lambda name=name: objective(name).loss(model, model.hf, batch, 7)) for name in ("bico", "ntp")
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_bico_reads_masked_tokens_at_the_place_before_and_plain_rows_as_ever() -> None:
    """A batch of both kinds: each row by itself, the masked ones with nothing but masked keys hidden."""
    model, text = lent("llama"), "bico:share=0.4,both=0.6,mask=1"
    seed = next(
        seed
        for seed in range(99)
        if [a != b for a, b in (objective(text).row(one, random.Random(f"{seed} {i}")) for i, one in enumerate(TEXTS))]
        == [True, False, True]
    )

    def by_hand() -> Tensor:
        rows = [objective(text).row(one, random.Random(f"{seed} {i}")) for i, one in enumerate(TEXTS)]
        total, n = torch.zeros(()), 0
        for ids, labels in rows:
            given = torch.tensor([ids])
            if ids == labels:
                found = logp(model, ids)
            else:
                with two_way(model, 8):
                    logits = masked(model.hf, given, given != 1, torch.tensor([True])).logits[0]
                found = torch.log_softmax(logits, -1)
            for t in range(1, len(ids)):
                if labels[t] != -100:
                    total, n = total - found[t - 1, labels[t]], n + 1
        return total / n

    same(model, text, TEXTS, by_hand, seed)


def test_bico_refuses_what_it_cannot_do() -> None:
    for text, says in (("bico:share=0", "above 0 to 1"), ("bico:both=2", "from 0 to 1")):
        with pytest.raises(pb.PatchbayError, match=says):
            objective(text)
    with pytest.raises(pb.PatchbayError, match="holds token 5, which stands for what is masked"):
        objective("bico:mask=5").row(TEXTS[0], random.Random(0))
    with pytest.raises(pb.PatchbayError, match="this model has tokens 0"):
        objective("bico:mask=100000").adapt(lent("llama"))
    for name, says in (("gpt2", "do not turn queries and keys"), ("bloom", "bloom"), ("gemma3_text", "windows|window")):
        with pytest.raises(pb.PatchbayError, match=says):
            objective("bico").adapt(lent(name))
    objective("bico").adapt(lent("llama"))


# --- a prefix seen both ways --------------------------------------------------------------------------


def test_a_prefix_is_seen_both_ways_and_not_learned() -> None:
    """Each row by itself: the mask written out place by place, the rest said after it; moved spans beside it as ever."""
    model, text = lent("llama"), "infill:vocab=96,share=0.4,prefix=0.7"
    aim = objective(text)
    kinds = [[_kind(aim.row(one, random.Random(f"{seed} {i}"))) for i, one in enumerate(TEXTS)] for seed in range(99)]
    seed = next(i for i, found in enumerate(kinds) if set(found) == {"prefix", "plain", "moved"})

    def by_hand() -> Tensor:
        total, n = torch.zeros(()), 0
        for i, one in enumerate(TEXTS):
            ids, labels = aim.row(one, random.Random(f"{seed} {i}"))
            first = next(t for t, label in enumerate(labels) if label != -100) if kinds[seed][i] == "prefix" else 0
            mask = torch.full((1, 1, len(ids), len(ids)), torch.finfo(torch.float32).min)
            for query, key in itertools.product(range(len(ids)), repeat=2):
                if key <= query or (query < first and key < first):
                    mask[..., query, key] = 0.0
            found = torch.log_softmax(model.hf(torch.tensor([ids]), attention_mask=mask).logits[0].float(), -1)
            for t in range(1, len(ids)):
                if labels[t] != -100:
                    total, n = total - found[t - 1, labels[t]], n + 1
        return total / n

    same(model, text, TEXTS, by_hand, seed)


def _kind(row: tuple[list[int], list[int]]) -> str:
    ids, labels = row
    return "plain" if ids == labels else "moved" if max(ids) > 90 else "prefix"


def test_prefixes_are_as_often_as_asked_and_without_them_the_loss_is_the_plain_one() -> None:
    aim, n = objective("infill:vocab=96,share=0.25,prefix=0.4"), 2000
    rows = [aim.row(TEXTS[0], random.Random(i)) for i in range(n)]
    share = sum(_kind(row) == "prefix" for row in rows) / n
    assert abs(share - 0.3) < 4 * (0.21 / n) ** 0.5
    cut = [labels.count(-100) for ids, labels in rows if _kind((ids, labels)) == "prefix"]
    assert set(cut) == {2, 3, 4, 5}  # of six tokens, one or more is said
    model, batch = lent("llama"), batch_of(objective("infill:vocab=96,share=0"), TEXTS)
    one, two = (
        graded(model, lambda text=text: objective(text).loss(model, model.hf, batch, 7))
        for text in ("infill:vocab=96,share=0", "ntp")
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    with pytest.raises(pb.PatchbayError, match=r"prefix=2.0.*shares from 0 to 1"):
        objective("infill:vocab=96,prefix=2")
    with pytest.raises(pb.PatchbayError, match="infill with a prefix: this bloom model"):
        objective(f"infill:vocab={lent('bloom').vocab_size},prefix=0.5").adapt(lent("bloom"))


# --- labels -------------------------------------------------------------------------------------------

LABELLED = [[[5, 6, 7, 8], [20]], [[9, 10], [22]], [[11], [21]]]
CLASSES = "label-supervision:classes=20+21+22"


def test_a_label_is_read_at_the_last_real_token_among_the_classes_alone() -> None:
    """Padding at the right is not the last token; the restricted softmax is the full one, renormalised."""
    model = lent("llama")

    def by_hand() -> Tensor:
        total = torch.zeros(())
        for text, (label,) in LABELLED:
            p = logp(model, text)[-1].exp()
            total = total - (p[label] / (p[20] + p[21] + p[22])).log()
        return total / 3

    same(model, CLASSES, LABELLED, by_hand)
    same(model, "label-supervision:classes=22+20+21", LABELLED, by_hand)  # in another order
    same(model, f"{CLASSES},whole=1", LABELLED, lambda: -sum(logp(model, t)[-1, y[0]] for t, y in LABELLED) / 3)  # type: ignore[return-value]
    with torch.no_grad():
        scores = objective(CLASSES).scores(model, LABELLED)
        assert close(scores.mean(), by_hand(), of=10.0)
        assert torch.equal(objective(f"{CLASSES},whole=1").scores(model, LABELLED), scores)


def test_the_largest_of_each_channel_is_of_real_tokens() -> None:
    model = lent("llama")

    def by_hand() -> Tensor:
        total = torch.zeros(())
        for text, (label,) in LABELLED:
            state = model.hf(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0].amax(0)
            total = total - torch.log_softmax(model.unembed_logits(state)[[20, 21, 22]], -1)[label - 20]
        return total / 3

    same(model, f"{CLASSES},pool=max", LABELLED, by_hand)


@torch.no_grad()
def test_without_its_mask_each_token_sees_all_others() -> None:
    model = lent("llama")
    documents = [[[5, 6, 7], [20, 21, 22]], [[9, 10], [22, 20]]]
    other = [[[5, 6, 8], [20, 21, 22]], [[9, 10], [22, 20]]]
    for text, blind in ((CLASSES, True), (f"{CLASSES},two_way=1", False)):
        aim = objective(text)
        one, two = (aim.losses(model, model.hf, batch_of(aim, d), False)[0] for d in (documents, other))
        assert torch.equal(one[:2], two[:2]) == blind
        assert not torch.equal(one[2], two[2])
        assert close(one[3:], two[3:], of=10.0)
        alone = [aim.losses(model, model.hf, batch_of(aim, [d]), False)[0] for d in documents]
        assert close(one, torch.cat(alone), of=10.0)  # padding is seen by nobody
        assert close(
            aim.scores(model, documents),
            torch.stack([one[:3].mean(), one[3:].mean()]).double(),
            of=10.0,
            dtype=torch.float32,
        )


def test_labels_and_classes_that_cannot_be() -> None:
    for text, says in (
        ("", "two tokens or more"),
        (":classes=3", "two tokens"),
        (":classes=3+4,pool=mean", "last, max"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            objective(f"label-supervision{text}")
    aim = objective(CLASSES)
    for document, says in (
        ([[5, 6]], "a text and its label"),
        ([[5, 6, 7], [20, 21]], "a text and its label"),
        ([[5, 6], [23]], "label 23 is none of the classes"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            aim.row(document, random.Random(0))
    with pytest.raises(pb.PatchbayError, match="of one label for a whole text"):
        objective(f"{CLASSES},pool=max").row([[5, 6], [20, 21]], random.Random(0))
    with pytest.raises(pb.PatchbayError, match="this model has tokens"):
        objective("label-supervision:classes=1+100000").adapt(lent("llama"))
    with pytest.raises(pb.PatchbayError, match="label-supervision: this mamba model"):
        objective(f"{CLASSES},two_way=1").adapt(lent("mamba2"))
    assert aim.twin == f"{CLASSES},whole=1"
    assert objective(f"{CLASSES},two_way=1").twin == CLASSES


# --- rationales ---------------------------------------------------------------------------------------

REASONED = [[[5, 6], [7, 8, 9], [20], [21], [22]], [[10], [11, 12], [22], [20]]]


def test_an_answer_without_its_rationale_is_smoothed() -> None:
    model = lent("llama")
    for text, smooth in (("pinto:weight=0.5,mask=1", None), ("pinto:weight=0.5,mask=1,smooth=0.3", 0.3)):

        def by_hand(smooth: float | None = smooth) -> Tensor:
            total = torch.zeros(())
            for question, why, (right,), *others in REASONED:
                answers = [right, *(one[0] for one in others)]
                own = logp(model, question + why)[-1, answers]
                blind = logp(model, [*question, *[1] * len(why)])[-1, answers]
                e = 1 - 1 / len(answers) if smooth is None else smooth
                total = total - (own[0] - own.logsumexp(0))
                target = [1 - e] + [e / (len(answers) - 1)] * (len(answers) - 1)
                for share, one in zip(target, blind, strict=True):
                    total = total - 0.5 * share * (one - blind.logsumexp(0))
            return total / 2

        same(model, text, REASONED, by_hand)
    aim = objective("pinto:mask=1")
    assert aim.row(REASONED[0], random.Random(0)) == ([5, 6, 7, 8, 9, 20, 21, 22], [-2, -2, 1, 1, 1, -3, -3, -3])
    assert objective(aim.null or "").row(REASONED[0], random.Random(0))[1][2:5] == [7, 8, 9]
    kept = [
        objective("pinto:share=0.25,mask=1").row(REASONED[0], random.Random(i))[1][2:5].count(1) for i in range(900)
    ]
    assert abs(sum(kept) / 2700 - 0.25) < 0.04


def test_pinto_is_scored_by_its_answers_and_its_twin_has_no_second_term() -> None:
    model = lent("llama")
    with torch.no_grad():
        by_hand = []
        for question, why, *answers in REASONED:
            own = logp(model, question + why)[-1, [one[0] for one in answers]]
            by_hand.append(float(own.logsumexp(0) - own[0]))
    assert close(objective("pinto").scores(model, REASONED), torch.tensor(by_hand), of=10.0)
    assert objective("pinto:mask=1").twin == "pinto:weight=0.0,mask=1"
    batch = batch_of(objective("pinto"), REASONED)
    assert close(
        float(objective("pinto:weight=0").loss(model, model.hf, batch, 1)),
        sum(by_hand) / 2,
        of=10.0,
        dtype=torch.float32,
    )
    for document in ([[5], [6], [20]], [[5], [6], [20], [21, 22]]):
        with pytest.raises(pb.PatchbayError, match="answers of one token"):
            objective("pinto").row(document, random.Random(0))
    with pytest.raises(pb.PatchbayError, match="at most 1"):
        objective("pinto:smooth=2")


# --- principles and responses -------------------------------------------------------------------------

PRINCIPLED = [[[5], [20], [6, 7, 8], [21], [9, 10]], [[11, 12], [20], [6], [21], [7, 8], [22], [9]]]


def test_principles_and_responses_are_told_apart_both_ways() -> None:
    model = lent("llama")

    def table(document: Any) -> list[list[Tensor]]:
        x, principles, responses = document[0], document[1::2], document[2::2]
        rows = []
        for c in principles:
            row = []
            for y in responses:
                said, start = logp(model, [*c, *x, *y]), len(c) + len(x)
                row.append(sum(said[start + t - 1, token] for t, token in enumerate(y)) / len(y))
            rows.append(row)
        return rows

    def by_hand(shift: int = 0) -> Tensor:
        total = torch.zeros(())
        for document in PRINCIPLED:
            S, n = table(document), len(document) // 2
            for i in range(n):
                right = S[i][(i - shift) % n]
                along = torch.stack(S[i])
                across = torch.stack([S[j][(i - shift) % n] for j in range(n)])
                total = total - 0.5 * (2 * right - along.logsumexp(0) - across.logsumexp(0)) / n / 2
        return total

    same(model, "sami", PRINCIPLED, by_hand)
    same(model, "sami:shuffled=1", PRINCIPLED, lambda: by_hand(1))
    same(model, "sami:plain=1", PRINCIPLED, lambda: -sum(sum(row[i] for i, row in enumerate(table(d))) / (len(d) // 2) for d in PRINCIPLED) / 2)  # type: ignore[return-value]  # fmt: skip
    with torch.no_grad():
        scores = objective("sami:plain=1").scores(model, PRINCIPLED)
        assert close(scores.mean(), by_hand(), of=10.0, dtype=torch.float32)
    aim = objective("sami")
    assert (aim.null, aim.twin, objective(aim.null or "").null) == ("sami:shuffled=1", "sami:plain=1", None)


def test_the_contrast_of_what_tells_nothing_apart_and_its_bound() -> None:
    draw = torch.Generator().manual_seed(0)
    for C in (2, 5):
        assert close(contrast(torch.full((C, C), -3.0)), math.log(C), of=10.0)
        S = torch.randn(C, C, generator=draw)
        assert bound(S) <= math.log(C)
        assert close(bound(torch.eye(C) * 50), math.log(C), of=10.0, dtype=torch.float32)
        raised = S.clone()
        raised[1] += 4.0  # a row's constant: rows do not see it, columns do
        assert close(bound(raised), bound(S), of=10.0, dtype=torch.float32)
        assert not close(contrast(raised), contrast(S), of=10.0)
    for document, says in (([[5], [20], [6]], "two principles or more"), ([[5], [20], [6], [21]], "got 4 units")):
        with pytest.raises(pb.PatchbayError, match=says):
            objective("sami").row(document, random.Random(0))
    with pytest.raises(pb.PatchbayError, match="no contrast to shuffle"):
        objective("sami:plain=1,shuffled=1")


# --- rewards ------------------------------------------------------------------------------------------


def test_rewards_stand_at_the_ends_of_segments_and_keep_their_sum() -> None:
    said, kinds = [1, 2, 3, 1, 1, 9, 2], [[1], [2, 3]]
    own = rewards(said, kinds, [1.0, -0.5], 3)
    assert own == [0.0, 0.0, 0.0, 0.0, 0.0, 2.0, -0.5]
    draw = random.Random(0)
    assert moved(own, 3, "own", draw) == own
    assert moved(own, 3, "end", draw) == [0.0] * 6 + [1.5]
    others = {tuple(moved(own, 3, "random", draw)) for _ in range(60)}
    assert len(others) == 9  # two rewards at three ends, of which one segment is worth 0
    assert all(sum(one) == 1.5 and not any(one[i] for i in (0, 1, 3, 4)) for one in others)
    assert rewards(said, kinds, [1.0, -0.5], 7) == moved(own, 3, "end", draw)  # one segment is the whole


def test_the_gradient_is_the_expected_rewards_on_a_bandit() -> None:
    """Two tokens, answers of two, all pairs of answers by their chance: the mean gradient is that of the expectation, baseline or none."""
    theta = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    worth = {(a, b): [1.0 * a - 0.3, 2.0 * a * b] for a in (0, 1) for b in (0, 1)}
    answers = list(worth)

    def of(answer: tuple[int, int]) -> Tensor:
        return torch.log_softmax(theta, 0)[list(answer)]

    value = sum(of(one).sum().exp() * sum(worth[one]) for one in answers)
    assert isinstance(value, Tensor)
    true = torch.autograd.grad(value, theta)[0]
    for n in (1, 2, 3):
        mean = torch.zeros(2, dtype=torch.float64)
        for batch in itertools.product(answers, repeat=n):
            chance = math.exp(sum(float(of(one).detach().sum()) for one in batch))
            loss = reinforce(
                torch.stack([of(one) for one in batch]), torch.tensor([worth[one] for one in batch]).double()
            )
            mean -= chance * torch.autograd.grad(loss, theta)[0]
        assert close(mean, true, dtype=torch.float64)


def test_answers_are_drawn_from_the_model_by_their_own_seeds() -> None:
    model, n = lent("llama"), 3000
    chance = logp(model, [5, 6])[-1].exp().double()
    found = torch.tensor([one[0] for one in drawn(model.hf, [[5, 6]] * n, 1, range(n))]).bincount(minlength=len(chance))
    spread = (n * chance * (1 - chance)).sqrt()
    assert float(((found - n * chance).abs() / (spread + 1)).max()) < 5
    one = drawn(model.hf, [[5, 6], [7]], 4, [3, 4])
    assert [drawn(model.hf, [[7]], 4, [4])[0], drawn(model.hf, [[5, 6]], 4, [3])[0]] == one[::-1]


def test_fine_grained_by_loops() -> None:
    """Two answers, others' mean as the baseline, and the cost of leaving the start."""
    model = pb.load(pb.tiny.twins.twin("llama"))
    documents = [[[5, 6], list(range(20)), [20, 21]], [[7], list(range(9)), [30]]]
    text = "fine-grained:weights=1/-2,segment=2,length=5,beta=0.5"
    aim = objective(text)
    aim.adapt(model)
    with torch.no_grad():
        for p in model.hf.parameters():
            p.mul_(1.1)  # it has left its start
    rows = [aim.row(one, random.Random(f"0 {i}")) for i, one in enumerate(documents)]
    seeds = [labels[-1] - 1000 for _, labels in rows]
    assert [labels[:-1] for _, labels in rows] == [[i for i, unit in enumerate(d) for _ in unit] for d in documents]
    said = drawn(model.hf, [d[0] for d in documents], 5, seeds)
    start = pb.tiny.twins.twin("llama")

    def by_hand() -> Tensor:
        logs, after = [], []
        for (prompt, good, bad), ids in zip(documents, said, strict=True):
            whole, at = [*prompt, *ids], range(len(prompt) - 1, len(prompt) + 4)
            mine = torch.stack([logp(model, whole)[i, whole[i + 1]] for i in at])
            with torch.no_grad():
                first = torch.log_softmax(start(torch.tensor([whole])).logits[0], -1)
            r = [-0.5 * float(mine[t].detach() - first[i, whole[i + 1]]) for t, i in enumerate(at)]
            for begin, end in ((0, 1), (2, 3), (4, 4)):
                some = ids[begin : end + 1]
                r[end] += sum(one in good for one in some) - 2.0 * sum(one in bad for one in some)
            logs.append(mine)
            after.append([sum(r[t:]) for t in range(5)])
        total = torch.zeros(())
        for i in (0, 1):
            for t in range(5):
                total = total - (after[i][t] - after[1 - i][t]) * logs[i][t] / 2
        return total

    same(model, text, documents, by_hand)
    scores = aim.scores(model, documents)
    for i, (prompt, good, bad) in enumerate(documents):
        ids = drawn(model.hf, [prompt], 5, [i])[0]
        assert float(scores[i]) == -sum(one in good for one in ids) + 2.0 * sum(one in bad for one in ids)


def test_rewards_that_cannot_be() -> None:
    for text, says in (
        (":weights=a", "numbers with / between"),
        (":segment=0", "1 token or more"),
        (":placed=x", "one of own, end"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            objective(f"fine-grained{text}")
    with pytest.raises(pb.PatchbayError, match="tokens of 1 kinds, as many as weights; got 3 units"):
        objective("fine-grained").row([[1], [2], [3]], random.Random(0))
    aim = objective("fine-grained:segment=2")
    assert (aim.twin, aim.null) == ("fine-grained:segment=2,placed=end", "fine-grained:segment=2,placed=random")


# --- the lab ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "documents", "unit"),
    [
        (CLASSES, [[[5 + i, 6], [20 + i % 3]] for i in range(8)], "nats per label"),
        ("fine-grained:length=4,segment=2", [[[5 + i], list(range(60))] for i in range(8)], "of the reward"),
    ],
)
def test_the_lab_trains_it_beside_the_twin_that_it_names(text: str, documents: Any, unit: str) -> None:
    model = lent("llama")
    before = model.fingerprint
    found = pb.train.variant(
        model, documents, objective=text, seeds=1, plan={"steps": 2, "batch_size": 4, "held": 0.25}
    )
    assert unit in found.units["effect"]
    assert any(note.startswith(f"twin: {objective(text).twin} with adamw") for note in found.notes)
    runs = {row["arm"]: row for row in found.tables["runs"]}
    assert len({row["end"] for row in runs.values()}) == 3
    assert len({row["start"] for row in runs.values()}) == 1
    model._fingerprint = None
    assert model.fingerprint == before


def test_documents_in_parts_lie_in_a_file(tmp_path: Path) -> None:
    """Units as ids or as texts, beside records of text; a record of neither is refused by its line."""
    from patchbay.train._documents import read

    file, model = tmp_path / "parts.jsonl", pb.load("tiny")
    said = story(random.Random(0)).text.split(".")[0]
    records = ({"units": [[5, 6], [7]]}, {"units": [said, said]}, {"text": said})
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    found = read(model, str(file), 64)
    assert found[0] == [[5, 6], [7]]
    assert [len(one) for one in found] == [2, 2, 1]
    file.write_text('{"units": []}\n')
    with pytest.raises(pb.PatchbayError, match="line 1 has no field `text`"):
        read(model, str(file), 64)
