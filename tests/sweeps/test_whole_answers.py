"""Whole answers and metrics of the user's own: a sweep gives what plain runs of every prompt with every answer give, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.jacks.session import Session
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.tasks.answers import compared
from patchbay.tiny.twins import twin
from tests.tolerance import close

PROMPTS = ((5, 6, 7, 8), (9, 10, 11, 12, 13, 14), (15, 16, 17, 18))
ANSWERS = (((20, 21), (20, 22, 23), (24,)), ((25,), (26, 27)), ((28, 29, 30), (31,), (32, 33)))
TEXTS = (((" ab", " abc", " d")), (" é", " ef"), (" ghi", " j", "k"))


def a_task(**more: object) -> pb.Task:
    given: dict[str, object] = {"answers": ANSWERS, "answer_texts": TEXTS} | more
    return pb.Task(name="several", clean=PROMPTS, right=(), **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Model:
    return pb.load(twin("llama"))


def by_hand(model: Model, edits: list[pb.Edit], metric: str, normalise: str = "none") -> list[float]:
    """Each prompt with each answer run alone by transformers, its tokens' log-probabilities added up, as a harness does."""
    out = []
    for i, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        found, greedy = [], []
        for ids, text in zip(answers, TEXTS[i], strict=True):
            whole = torch.tensor([[*prompt, *ids]])
            with torch.no_grad(), Session(model, (), edits, prompt_length=len(prompt)):
                lp = model.hf(whole, use_cache=False).logits[0].double().log_softmax(-1)
            steps = [float(lp[len(prompt) + k - 1, token]) for k, token in enumerate(ids)]
            greedy.append(all(int(lp[len(prompt) + k - 1].argmax()) == token for k, token in enumerate(ids)))
            bare = text.lstrip()
            size = {"none": 1, "token": len(ids), "byte": len(bare.encode()), "character": len(bare)}[normalise]
            found.append(sum(steps) / size)
        right, wrong = found[0], found[1:]
        out.append({
            "log_probability": right,
            "probability": math.exp(right),
            "logit_diff": right - sum(wrong) / len(wrong),
            "logit_diff_best": right - max(wrong),
            "option_accuracy": float(right > max(wrong)),
            "accuracy": float(greedy[0]),
        }[metric])  # fmt: skip
    return out


WHERE = [None, 0, -1, -2, "last", "generated", slice(2, None), slice(1, -1), slice(-2, None), (0, -1), slice(0, 4, 2),
         pb.Token(22), torch.tensor([[True, False, True]])]  # fmt: skip


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_a_sweep_counts_positions_in_the_prompts(model, where):
    edits = [pb.scale(model.port(f"L{layer}.mlp.out"), -1.0, positions=where) for layer in range(2)]
    found = pb.sweep(model, a_task(metric="log_probability"), edits)
    for edit, values in zip(edits, found["value"].tolist(), strict=True):
        assert close(values, by_hand(model, [edit], "log_probability"))
    assert close(found["base"].tolist(), by_hand(model, [], "log_probability"))


@pytest.mark.parametrize("normalise", ["none", "token", "byte", "character"])
@pytest.mark.parametrize("metric", ["log_probability", "logit_diff", "logit_diff_best", "option_accuracy"])
def test_metrics_of_whole_answers(model, metric, normalise):
    task = a_task(metric=metric, normalise=normalise)
    edit = pb.scale(model.port("L1.attn.out"), 3.0, positions=-1)
    logits = pb.run(model, task.continuations, logits="last").last_logits
    assert close(task.score(logits).tolist(), by_hand(model, [], metric, normalise), of=1.0)
    found = pb.sweep(model, task, [edit])
    assert close(found["value"][0].tolist(), by_hand(model, [edit], metric, normalise), of=1.0)
    assert found.unit == task.unit


@pytest.mark.parametrize("metric", ["probability", "accuracy"])
def test_probability_and_greedy_accuracy_of_whole_answers(model, metric):
    task = a_task(metric=metric)
    logits = pb.run(model, task.continuations, logits="last").last_logits
    assert close(task.score(logits).tolist(), by_hand(model, [], metric), of=1.0)
    found = pb.sweep(model, task, [pb.scale(model.port("embed"), 1.0)])["value"][0]
    assert close(found.tolist(), by_hand(model, [], metric), of=1.0)
    sure = torch.full((len(task.continuations), 96), -9.0)
    rows = {ids: i for i, ids in enumerate(task.continuations)}
    for prompt, (right, *_) in zip(PROMPTS, ANSWERS, strict=True):
        for k, token in enumerate(right):
            sure[rows[(*prompt, *right[:k])], token] = 9.0
    assert task.with_metric("accuracy").score(sure).tolist() == [1.0, 1.0, 1.0]
    sure[rows[(*PROMPTS[2], 28)], 50] = 10.0  # one token of the third answer is not the likeliest
    assert task.with_metric("accuracy").score(sure).tolist() == [1.0, 1.0, 0.0]


def test_a_whole_answer_is_right_where_each_of_its_tokens_is_the_likeliest(model):
    logits = pb.run(model, [[*PROMPTS[0], token] for token in range(96)], logits="last").last_logits
    first = int(pb.run(model, PROMPTS[:1], logits="last").last_logits.argmax())
    second = int(logits[first].argmax())
    likeliest, other = (
        pb.Task("one", PROMPTS[:1], (), answers=[[(first, at)]], metric="accuracy") for at in (second, second - 1)
    )
    unchanged = [pb.scale(model.port("embed"), 1.0)]
    assert [float(pb.sweep(model, task, unchanged)["value"][0]) for task in (likeliest, other)] == [1.0, 0.0]


def test_option_that_ties_with_the_best_wrong_one_is_not_right():
    tied = torch.tensor([[-1.0, -1.0], [-1.0, -2.0], [-2.0, -1.0]])
    assert compared("option_accuracy", tied).tolist() == [0.0, 1.0, 0.0]


def test_answers_of_one_token_score_alike_in_both_forms(model):
    one = pb.Task("one", PROMPTS, (20, 25, 28), ((24, 21), (26,), (31,)))
    same = pb.Task("one", PROMPTS, (), answers=one.whole_answers)
    logits = pb.run(model, PROMPTS, logits="last").last_logits
    for metric in ("logit_diff", "logit_diff_best", "log_probability", "option_accuracy", "accuracy"):
        assert close(one.with_metric(metric).score(logits), same.with_metric(metric).score(logits), of=logits)
    edits = [pb.zero(head.z) for head in model.layers[1].heads]
    for metric in ("logit_diff", "kl"):
        found = [pb.sweep(model, task.with_metric(metric), edits)["value"] for task in (one, same)]
        assert close(*found, of=1.0)


def test_methods_of_one_token_say_what_to_do_and_steps_do_it(model):
    task = a_task()
    for method in (pb.find.direct_logit_attribution, lambda *given: pb.prove.ablation(*given, "L1.H1")):
        with pytest.raises(PatchbayError, match="task.steps"):
            method(model, task)
    steps = task.steps()
    assert (len(steps), steps.labels["prompt"], steps.right) == (6, (0, 0, 1, 2, 2, 2), (20, 21, 25, 28, 29, 30))
    assert steps.clean[1] == (*PROMPTS[0], 20)
    scores = steps.score(pb.run(model, steps, logits="last").last_logits)
    summed = [float(scores[[p == i for p in steps.labels["prompt"]]].sum()) for i in range(3)]
    assert close(summed, by_hand(model, [], "log_probability"))
    assert pb.find.direct_logit_attribution(model, steps).ranked


def test_twins_of_whole_answers(model):
    task = a_task(metric="log_probability", corrupted=tuple(tuple(reversed(ids)) for ids in PROMPTS))
    edit = pb.scale(model.port("L0.mlp.out"), -1.0, positions=0)
    found = pb.sweep(model, task, [edit], on="corrupted")["value"][0]
    turned = pb.Task("t", task.corrupted, (), answers=ANSWERS, metric="log_probability")
    assert close(found, pb.sweep(model, turned, [edit])["value"][0])
    assert [
        step[: len(ids)] for step, ids in zip(task.steps("corrupted").clean, [task.corrupted[0]] * 2, strict=False)
    ] == [task.corrupted[0]] * 2


def test_positions_outside_the_prompts_are_refused_although_answers_stand_there(model):
    with pytest.raises(PatchbayError, match="position 5 is outside prompt 0, which has 4 tokens"):
        pb.sweep(model, a_task(), [pb.zero(model.port("L0.mlp.out"), positions=5)])


# --- metrics that are functions ---


def top(logits: Tensor, prompt: Tensor) -> Tensor:
    return logits.max(-1).values + prompt.to(logits)


def pair(logits: Tensor, prompt: Tensor) -> Tensor:
    assert logits.shape[-1] == 2
    return logits[..., 0] - logits[..., 1]


pair.tokens = [40, 7]  # type: ignore[attr-defined]
pair.unit = "logits"  # type: ignore[attr-defined]


def surprise(logits: Tensor, prompt: Tensor) -> Tensor:
    """Largest logit of all positions."""
    return logits.flatten(1).amax(-1)


surprise.positions = "all"  # type: ignore[attr-defined]


def test_own_metrics_hold_wherever_a_metric_is_taken(model):
    task = pb.Task("own", PROMPTS, (20, 25, 28), ((24,), (26,), (31,)), metric=top)
    edits = [pb.zero(model.port("L1.mlp.out")), pb.add(model.port("logits"), torch.ones(96), positions=-1)]
    plain = pb.run(model, PROMPTS, logits="last").last_logits
    assert torch.equal(task.score(plain), plain.max(-1).values + torch.arange(3))
    for given, metric in ((task, None), (task.with_metric("kl"), top)):
        found = pb.sweep(model, given, edits, metric)
        for edit, values in zip(edits, found["value"], strict=True):
            logits = pb.run(model, PROMPTS, edits=[edit], logits="last").last_logits
            assert close(values, logits.max(-1).values + torch.arange(3))
    lost = pb.prove.ablation(model, task, "L1.H1", draws=2)
    assert lost.provenance["task"]["metric"] == "function top"
    asked = pb.prove.ablation(model, task.with_metric("kl"), "L1.H1", draws=2, metric=top)
    assert asked.equal(lost)
    assert asked.provenance["task"] == lost.provenance["task"]
    with pytest.raises(PatchbayError, match="no option 'metrics'; its options are .*, metric; did you mean 'metric'"):
        pb.prove.ablation(model, task, "L1.H1", metrics=top)
    with pytest.raises(PatchbayError, match="find.direct_logit_attribution has no option 'metric'"):
        pb.find.direct_logit_attribution(model, task.with_metric("logit_diff"), metric=top)
    assert torch.equal(task[[2]].score(plain[[2]]), plain[[2]].max(-1).values + 2)  # a prompt keeps its number


def test_a_metric_that_names_its_tokens_gets_only_those(model):
    task = pb.Task("own", PROMPTS, metric=pair)
    edits = [pb.zero(model.port("L1.mlp.out")), pb.add(model.port("logits"), torch.arange(96.0), positions=-1)]
    found = pb.sweep(model, task, edits)
    for edit, values in zip(edits, found["value"], strict=True):
        logits = pb.run(model, PROMPTS, edits=[edit], logits="last").last_logits
        assert close(values, logits[:, 40] - logits[:, 7], of=logits)
        assert close(task.score(logits), values, of=logits)
    assert found.unit == "logits"


def test_a_metric_over_all_positions(model):
    task = pb.Task("own", PROMPTS, metric=surprise)
    edits = [pb.scale(model.port("L0.mlp.out"), 2.0, positions=0), pb.zero(model.port("L1.H1.z"))]
    found = pb.sweep(model, task, edits)
    for edit, values in zip(edits, found["value"], strict=True):
        right = [float(pb.run(model, [list(ids)], edits=[edit]).logits.max()) for ids in PROMPTS]
        assert close(values.tolist(), right)
    assert "reads all positions" in " ".join(found.notes)
    with pytest.raises(PatchbayError, match=r"reads logits \[prompt, position, vocab\] of 3 prompts"):
        task.score(torch.zeros(3, 96))


def test_own_metrics_that_are_none_are_refused(model):
    task = pb.Task("own", PROMPTS, metric=lambda logits, prompt: logits.mean())
    for call in (
        lambda: task.score(torch.zeros(3, 96)),
        lambda: pb.sweep(model, task, [pb.zero(model.port("L0.mlp.out"))]),
    ):
        with pytest.raises(PatchbayError, match="gives one number for each"):
            call()
    with pytest.raises(PatchbayError, match="cannot be made from its record alone"):
        pb.Task.from_json(pb.Task("own", PROMPTS, metric=top).to_json())
