"""Dose and response: the planted switch turns answers over; equals counting by hand; a knob that does nothing shows nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.measure._controls import random_knobs
from patchbay.measure._own_text import allowed, own_losses
from patchbay.measure._restarted import Restarted
from patchbay.tiny import planted, twins
from tests.tolerance import close
from tests.turn.test_steer import pairs

STRENGTHS = [-2.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """A neuron that decides between two answers: silent it decides nothing, turned round it decides for the other."""
    built = planted.relation_neuron(form=form, seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    knob = pb.turn.scale(list(truth["neurons"].values()), 1.0, model=model)
    result = pb.measure.dose_response(
        model, task, knob, strengths=STRENGTHS, neutral=[" the door. the cup", " one, two"]
    )
    right, wrong = result["right"].tolist(), result["wrong"].tolist()
    assert (right[2], right[3]) == (1.0, 1.0)
    assert (right[0], wrong[0]) == (0.0, 1.0)
    assert result.values[1].abs() < 1 < result.values[2]
    assert bool((result.values.diff() > 0).all())
    assert result["kl"].max() < 0.05  # texts in which the neurons do not fire
    assert torch.allclose(result["loss"], result["loss_without"].expand(4), atol=0.02)
    assert [str(part) for part in result.highlights] == list(truth["neurons"].values())


def test_reference() -> None:
    """Shares, score, loss and divergence counted by hand from Hugging Face's logits, one prompt and text at a time."""
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 7)
    texts = [[5, 9, 12, 9], [20, 21, 22, 23, 24, 25, 20, 21], [30, 31]]
    head = model.part(built.truth["induction"])
    knob = pb.turn.scale([head], 0.0)
    result = pb.measure.dose_response(model, task, knob, strengths=[0.0, 0.5, 1.0], neutral=texts, batch_size=2)
    rows = model.hf.transformer.h[head.layer].attn.c_proj.weight.data[head.index * 64 : head.index * 64 + 64]
    before = rows.clone()
    plain = [model.hf(torch.tensor([ids])).logits[0].detach() for ids in texts]
    for step, strength in enumerate((0.0, 0.5, 1.0)):
        rows.copy_(before * strength)  # what the head writes, in its weights
        counts, score = {"right": 0.0, "wrong": 0.0, "other": 0.0}, 0.0
        for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
            logits = model.hf(torch.tensor([ids])).logits[0, -1].detach()
            said = int(logits.argmax())
            counts["right" if said == right else "wrong" if said in wrong else "other"] += 1 / len(task)
            score += float(logits[right] - logits[list(wrong)].mean()) / len(task)
        loss = kl = 0.0
        for ids, base in zip(texts, plain, strict=True):
            logits = model.hf(torch.tensor([ids])).logits[0].detach()
            loss += float(cross_entropy(logits[:-1], torch.tensor(ids[1:]))) / len(texts)
            p, q = base[:-1].log_softmax(-1), logits[:-1].log_softmax(-1)
            kl += float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()) / len(texts)
        rows.copy_(before)
        for name, share in counts.items():
            assert close(float(result[name][step]), share, of=1.0)
        assert close(float(result.values[step]), score, of=result.values)
        assert close(float(result["loss"][step]), loss, of=result["loss"])
        assert close(float(result["kl"][step]), kl, of=result["kl"])
    assert result["kl"][2] == 0
    assert result["loss"][2] == result["loss_without"]
    assert result.values[2] == result["score_without"]
    assert bool((result["low"] <= result.values).all())
    assert bool((result.values <= result["high"]).all())
    for draw, other in enumerate(random_knobs(model, knob, 3, 0)[0]):
        [part] = {edit.port.part for edit in other.edits}
        rows = model.hf.transformer.h[part.layer].attn.c_proj.weight.data[part.index * 64 : part.index * 64 + 64]
        before = rows.clone()
        for step, strength in enumerate((0.0, 0.5, 1.0)):
            rows.copy_(before * strength)
            last = [model.hf(torch.tensor([ids])).logits[0, -1].detach() for ids in task.clean]
            scores = [float(x[right] - x[list(wrong)].mean()) for x, right, wrong in zip(last, task.right, task.wrong, strict=True)]  # fmt: skip
            assert close(float(result["random"][draw, step]), sum(scores) / len(task), of=result.values)
        rows.copy_(before)


def test_null() -> None:
    """A noise neuron of a random model: whatever the strength, the same answers, score within its interval, no harm."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 20)
    knob = pb.turn.scale("L0.N3", 1.0)  # type: ignore[arg-type]
    result = pb.measure.dose_response(model, task, knob, strengths=STRENGTHS, neutral=[[5, 6, 7, 8], [9, 10, 11]])
    assert (result["right"].max() - result["right"].min()) <= 0.05
    assert (result.values.max() - result.values.min()) < float((result["high"] - result["low"]).min())
    assert result["kl"].max() < 0.01


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gemma2", "phi", "mixtral", "bloom", "falcon", "mamba2", "bamba", "nanochat"]
)
def test_restarted_equals_whole_runs(name: str) -> None:
    """Edits of every layer, several at once, at some positions, of embedding and final norm; texts of several lengths."""
    model = pb.load(twins.twin(name))
    texts = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
    last = model.n_layers - 1
    noise = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    lists = [
        [pb.add(pb.Port("resid_out", 0), noise), pb.scale(pb.Port("attn.out", last), -1.5)],
        [pb.zero(pb.Port("attn.out", last), positions="last"), pb.add(pb.Port("resid_in", last), noise, positions=-2)],
        [pb.scale(pb.Port("embed"), 2.0)],
        [pb.scale(pb.Port("final_norm"), noise)],
        [pb.scale(pb.Port("logits"), 0.5)],
        [pb.add(pb.Port("resid_out", last), noise, positions=pb.Token(15))],
    ]
    for ends in (True, False):
        ready = Restarted(model, texts, last=ends)
        assert ready.logits([]) is ready.plain
        for edits in lists:
            trace = pb.run(model, texts, edits=edits)
            found, expected = ready.logits(edits), trace.last_logits if ends else trace.logits
            for i, ids in enumerate(texts):
                mine, theirs = (found[i], expected[i]) if ends else (found[i, : len(ids)], expected[i, : len(ids)])
                assert close(mine, theirs), (name, edits)


def test_an_enclosing_block_holds() -> None:
    model = pb.load(twins.twin("llama"))
    task = pb.tasks.repeated_tokens(model, 6)
    knob, other = Knob("a", [pb.scale(pb.Port("attn.out", 1), 1.0)], 2.0), pb.scale(pb.Port("mlp.out", 0), -2.0)
    with model.edited(other):
        found = pb.measure.dose_response(model, task, knob, strengths=[2.0])
        expected = task.score(pb.run(model, task, edits=[knob]).last_logits).mean()
    assert close(float(found.values[0]), float(expected), of=found.values)
    assert float(found.values[0]) != pytest.approx(
        float(pb.measure.dose_response(model, task, knob, strengths=[2.0]).values[0])
    )


def test_layers_below_the_knob_run_once_for_all_strengths() -> None:
    """Counted in calls of each layer: one base run with its proof, and from the knob's layer on once for each strength."""
    model = pb.load(twins.twin("llama", num_hidden_layers=4))
    task = pb.tasks.repeated_tokens(model, 3)  # too few to choose a strength, which would write text with it
    calls = [0] * 4
    hooks = [
        at.layer.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, at in enumerate(model.modules)
    ]
    knob = Knob("a", [pb.scale(pb.Port("attn.out", 2), 1.0)], 2.0)
    pb.measure.dose_response(model, task, knob, strengths=[0.0, 0.5, 2.0, 3.0], draws=0)
    for hook in hooks:
        hook.remove()
    assert calls[0] == calls[1] <= 2
    assert calls[2] == calls[3] == calls[0] + 4


def test_a_strength_is_chosen_on_one_half_and_tested_on_the_other() -> None:
    """The planted switch: turned up it answers right everywhere; random neurons do not; equal to counting by hand."""
    built = planted.relation_neuron(seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    many = 3 * list(range(len(truth["prompts"])))
    task = pb.Task.from_prompts(model, truth["prompts"], truth["wrong"], truth["answers"])[
        many
    ]  # the other answer is asked
    knob = pb.turn.scale(list(truth["neurons"].values()), 1.0, model=model)
    texts = [" the door. the cup", " one, two", " the cup, one", " two. the door"]
    result = pb.measure.dose_response(model, task, knob, strengths=[-4.0, -2.0, 0.0, 1.0, 2.0], neutral=texts, draws=2)
    dev, test = task.split(0.5, 0)
    assert float(result["chosen"]) in (-2.0, -4.0)
    at = float(result["chosen"])
    plain, turned = (test.score(pb.run(model, test, edits=e).last_logits).double() for e in ([], [knob.at(at)]))
    assert close(float(result["test_effect"]), float((turned - plain).mean()), of=1.0)
    assert float(result["test_effect_low"]) > 0 < float(result["test_against_random_low"])
    assert float(result["test_right"]) == 1.0
    assert float(result["p"]) == pytest.approx(1 / 3)  # two draws allow no less
    assert "an effect and more than random knobs" in result.notes[-1]
    assert result["random"].shape == (2, 5)
    assert len(dev) + len(test) == len(task)


def test_where_nothing_gains_no_strength_is_chosen() -> None:
    """A knob of noise is not confirmed; silencing what answers loses at every strength."""
    null = planted.null(seed=0)
    model = pb.load(null.model, null.tokenizer)
    task = pb.tasks.repeated_tokens(model, 40)
    result = pb.measure.dose_response(model, task, pb.turn.scale("L0.N3", 1.0), strengths=STRENGTHS)  # type: ignore[arg-type]
    assert "chosen" not in result or "NOT confirmed" in result.notes[-1]
    built = planted.relation_neuron(seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    other = pb.Task.from_prompts(model, truth["prompts"], truth["wrong"], truth["answers"])
    knob = pb.turn.scale(list(truth["neurons"].values()), 1.0, model=model)
    result = pb.measure.dose_response(model, other, knob, strengths=[2.0, 4.0], draws=0)
    assert "chosen" not in result
    assert "none was chosen" in result.notes[-1]


def test_where_all_is_right_already_no_strength_is_recommended() -> None:
    """What is right cannot be raised: of right prompts none, of both kinds those alone that are wrong."""
    built = planted.relation_neuron(seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    knob = pb.turn.scale(list(truth["neurons"].values()), 1.0, model=model)
    right = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    n = len(right)
    result = pb.measure.dose_response(model, right, knob, draws=0)
    assert "chosen" not in result
    assert result["effect"][-1] > 1  # though the score does rise
    assert f"{n} of {n} prompts are answered right as the model is" in result.notes[-1]
    assert "no strength is recommended" in result.notes[-1]
    asked = pb.Task.from_prompts(model, truth["prompts"], truth["wrong"], truth["answers"])
    both = pb.Task.joined([right[:3], asked])
    result = pb.measure.dose_response(model, both, knob, strengths=[-2.0, 0.0], draws=0)
    _, test = both[list(range(3, len(both)))].split(0.5, 0)
    plain, turned = (test.score(pb.run(model, test, edits=e).last_logits).double() for e in ([], [knob.at(-2.0)]))
    assert float(result["chosen"]) == -2.0
    assert close(float(result["test_effect"]), float((turned - plain).mean()), of=1.0)
    assert any(f"3 of {len(both)} prompts are answered right" in note for note in result.notes)


def test_a_steering_knob_is_measured_on_held_out_twins_and_kept_under_the_cap() -> None:
    """The strength that gains most diverges by nats: recommended only where such a cap is asked; with a small one none is."""
    built = planted.steering(form="llama", seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task, neutral = pairs(truth), [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [7, 9, 11, 13]]
    knob = pb.turn.steer(model, task)
    found = {cap: pb.measure.dose_response(model, task, knob, neutral, cap=cap, draws=1) for cap in (0.5, 100.0, 0.005)}
    usual = found[0.5]
    half = task.split(0.5, 0)[1]
    twins = pb.run(model, [list(ids) for ids in half.corrupted or ()]).last_logits
    assert close(float(usual["score_without"]), float(half.score(twins).mean()), of=twins)
    assert any("measured on the twins" in note for note in usual.notes)
    assert float(usual["chosen"]) == 1.0
    assert float(usual["test_kl"]) <= 0.5 < float(usual["kl"][usual.labels_of("strength").index(2.0)])
    assert float(found[100.0]["chosen"]) == 4.0
    assert "chosen" not in found[0.005]
    assert "none is recommended: at 4, which gains most for least, neutral text diverges by" in found[0.005].notes[-1]
    with pytest.raises(pb.PatchbayError, match="fitted on all 12 prompts of task sides.* give others"):
        pb.measure.dose_response(model, task.split(0.5, 0)[0], knob)
    assert "cap" in usual.provenance["options"]


def test_a_strength_that_writes_one_word_for_ever_is_not_recommended() -> None:
    """It answers right and leaves neutral text alone, but what it writes is not what the model would find likely."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.Task("one", [[i, i + 1, i + 2] for i in range(5, 25)], [40] * 20, [[41]] * 20)
    vector = torch.zeros(model.vocab_size)
    vector[40] = 30.0
    made = [Knob("one word", [pb.add(pb.Port("logits"), vector, positions=at)], 1.0) for at in ("predicting", "last")]
    texts = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [7, 9, 11, 13]]
    always, once = (pb.measure.dose_response(model, task, k, texts, strengths=[0.0, 1.0], draws=0) for k in made)
    for result in (always, once):
        assert result["right"].tolist() == [0.0, 1.0]
        assert any("at no strength does a prediction on neutral text change" in note for note in result.notes)
    assert "chosen" not in always
    assert "what it writes has a loss of" in always.notes[-1]
    assert float(once["chosen"]) == 1.0


def test_the_loss_of_own_text_is_that_of_the_plain_model() -> None:
    """A knob that writes one token only: the loss of that token again and again, by Hugging Face's logits."""
    model = pb.load(twins.twin("llama"))
    vector = torch.zeros(model.vocab_size)
    vector[7] = 1e4
    prompts, writes = [[5, 6, 7], [9, 10, 11]], pb.add(pb.Port("logits"), vector)
    plain, turned = own_losses(model, prompts, [[], [writes]], 0)
    losses = []
    for ids in prompts:
        text = torch.tensor([[*ids, *[7] * 24]])
        losses.append(cross_entropy(model.hf(text).logits[0, 2:-1].detach(), text[0, 3:], reduction="none"))
    assert close(turned, float(torch.cat(losses).mean()))
    assert abs(plain - turned) > 0.01
    assert own_losses(model, prompts, [[], [writes]], 0) == [plain, turned]
    assert allowed(2.0, 0.5) == (1.0, 3.0)
    assert allowed(0.4, 0.5)[0] < 0


def test_it_prints_as_few_columns() -> None:
    """Strength, effect, loss, KL and the range of random knobs, as the variables have them."""
    model = pb.load(twins.twin("llama"))
    task = pb.tasks.repeated_tokens(model, 5)
    knob = Knob("a", [pb.scale(pb.Port("attn.out", 1), 1.0)], 2.0)
    result = pb.measure.dose_response(model, task, knob, [[5, 6, 7], [8, 9, 10]], strengths=[0.0, 3.0], draws=1)
    rows = result.tables["dose"]
    assert list(rows[0]) == ["strength", "effect", "loss", "KL", "random"]
    for name, key in (("effect", "effect"), ("loss", "loss"), ("KL", "kl")):
        assert [row[name] for row in rows] == result[key].tolist()
    chance = (result["random"] - result["score_without"]).double()
    assert close(result["chance_low"], chance.amin(0), of=result["random"])
    assert close(result["chance_high"], chance.amax(0), of=result["random"])
    lines = str(result).split("\n")
    assert lines[1].split() == ["strength", "effect", "loss", "KL", "random"]
    assert "effect in logits, loss in nats per token, KL in nats per token" in str(result)
    bare = pb.measure.dose_response(model, task, knob, strengths=[3.0], draws=0)
    assert list(bare.tables["dose"][0]) == ["strength", "effect"]


def test_other_tasks_by_name() -> None:
    model = pb.load(twins.twin("llama"))
    task, other = pb.tasks.repeated_tokens(model, 5), pb.tasks.repeated_tokens(model, 4, seed=3)
    knob = Knob("a", [pb.scale(pb.Port("attn.out", 1), 1.0)], 2.0)
    both = {"again": other, "as probability": other.with_metric("probability")}
    result = pb.measure.dose_response(model, task, knob, strengths=[0.0, 1.0, 3.0], others=both)
    assert result.labels_of("condition") == list(both)
    for row, one in enumerate(both.values()):
        for step, strength in enumerate((0.0, 1.0, 3.0)):
            expected = one.score(pb.run(model, one, edits=[knob.at(strength)]).last_logits).mean()
            assert close(float(result["others"][row, step]), float(expected), of=result["others"])
    assert torch.equal(result["others"][:, 1], result["others_without"])


def test_random_knobs_are_as_strong_and_aimed_at_nothing() -> None:
    model = pb.load(twins.twin("llama"))
    layer = model.layers[1]
    vector, basis = torch.randn(32, generator=torch.Generator().manual_seed(0)), torch.eye(32)[:3]
    steer = Knob("s", [pb.add(layer.resid_out, vector, positions="last"), pb.project(layer.resid_mid, basis)], 2.0)
    made, said = random_knobs(model, steer, 3, 0)
    assert "random directions" in said
    for knob in made:
        add, project = knob.edits
        assert (add.port, add.positions, project.port) == (layer.resid_out, "last", layer.resid_mid)
        assert close(add.value.norm(), vector.norm())  # type: ignore[union-attr]
        assert abs(float(torch.nn.functional.cosine_similarity(add.value, vector, 0))) < 0.6  # type: ignore[arg-type]
        assert close(project.value @ project.value, project.value)  # type: ignore[operator]
        assert close(float(project.value.trace()), 29.0, of=1.0)  # type: ignore[union-attr]
    heads = pb.turn.scale(["L1.H2", "L1.H0"], 3.0, model=model)
    made, said = random_knobs(model, heads, 4, 0)
    assert "random parts" in said
    drawn = [{str(edit.port.part) for edit in knob.edits} for knob in made]
    assert all(len(one) == 2 and not one & {"L1.H2", "L1.H0"} for one in drawn)
    assert {"L1.H1", "L1.H3"} in drawn  # the same layer first
    assert len(set.union(*drawn)) > 2  # then others
    assert random_knobs(model, heads, 4, 0)[0] == made
    everything = pb.turn.scale(["L0.attn", "L1.attn"], 0.5, model=model)
    made, said = random_knobs(model, everything, 2, 0)
    assert made == []
    assert "no other part like L0.attn" in said


def test_without_neutral_texts_it_says_so() -> None:
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 3)
    knob = pb.turn.scale("L0.H0", 0.0)  # type: ignore[arg-type]
    result = pb.measure.dose_response(model, task, knob, strengths=[0.0, 1.0])
    assert "loss" not in result
    assert "not measured" in result.notes[0]
    for metric in ("kl", "probability", "accuracy"):
        other = pb.measure.dose_response(model, task.with_metric(metric), knob, strengths=[1.0])
        assert other.values[0] == other["score_without"]


def test_errors() -> None:
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 3)
    knob = pb.turn.scale("L0.H0", 0.0)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="each one once"):
        pb.measure.dose_response(model, task, knob, strengths=[1.0, 1.0])
    with pytest.raises(pb.PatchbayError, match="not a finite number"):
        pb.measure.dose_response(model, task, knob, strengths=[1.0, float("inf")])
    with pytest.raises(pb.PatchbayError, match="neutral text 1 has one token"):
        pb.measure.dose_response(model, task, knob, neutral=[[4, 5], [4]])
    with pytest.raises(pb.PatchbayError, match="cap=0"):
        pb.measure.dose_response(model, task, knob, cap=0)
