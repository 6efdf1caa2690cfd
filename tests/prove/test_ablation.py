"""Ablation: planted parts cost the answer and random ones nothing; equals hooks put on by hand; nothing in a random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.prove._removal import activity
from patchbay.tiny import planted
from tests import given
from tests.features.given import dictionary
from tests.given import lent
from tests.shares import by_turns
from tests.tolerance import NOISE, close


def circuit(form: Any = "gpt2", seed: int = 0) -> tuple[pb.Model, pb.Task, list[str]]:
    built = planted.induction(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    return (
        model,
        pb.tasks.repeated_tokens(model, 12, seed=seed),
        [built.truth["previous_token"], built.truth["induction"]],
    )


@pytest.mark.parametrize(("by", "form"), by_turns(["zero", "mean", "resample"], ["gpt2", "llama"], of=2))
def test_planted(form: Any, by: Any) -> None:
    model, task, heads = circuit(form)
    result = pb.prove.ablation(model, task, heads, by=by, draws=8)
    assert [str(part) for part in result.parts or []] == heads
    assert result["accuracy"] == 1.0
    assert result["accuracy_joint"] < 0.3
    assert result["accuracy_random"].min() == 1.0
    assert result["joint_low"] > 5
    assert result["random"].abs().max() < 0.5
    assert result["difference_low"] > 5
    assert result["p"] == pytest.approx(1 / (1 + len(result["random"])))
    needed = result.values if by != "resample" else result.values[1:]  # the twin's first string is the prompt's own
    assert needed.min() > 5
    assert "together" in result.notes[0]


def with_zero(model: pb.Model, heads: list[str], value: Any, ids: list[int], which: int) -> Tensor:
    """Last logits of Hugging Face's GPT-2 with slices of c_proj's input overwritten by hand."""
    hooks = []
    for text in heads:
        part = model.part(text)

        def overwrite(_: Any, args: Any, part: Any = part, text: str = text) -> Any:
            x = args[0].clone()
            d = x.shape[-1] // 4
            x[0, :, part.index * d : part.index * d + d] = value(text, which) if callable(value) else value
            return (x, *args[1:])

        hooks.append(model.hf.transformer.h[part.layer].attn.c_proj.register_forward_pre_hook(overwrite))
    with torch.no_grad():
        out = model.hf(torch.tensor([ids])).logits[0, -1].double()
    for hook in hooks:
        hook.remove()
    return out


def signals(model: pb.Model, heads: list[str], prompts: Any) -> list[dict[str, Tensor]]:
    """z of each head on each prompt [position, d_head], read by hand."""
    found = []
    for ids in prompts:
        seen: dict[str, Tensor] = {}
        hooks = []
        for text in heads:
            part = model.part(text)

            def keep(_: Any, args: Any, part: Any = part, text: str = text, seen: Any = seen) -> None:
                d = args[0].shape[-1] // 4
                seen[text] = args[0][0, :, part.index * d : part.index * d + d].detach()

            hooks.append(model.hf.transformer.h[part.layer].attn.c_proj.register_forward_pre_hook(keep))
        with torch.no_grad():
            model.hf(torch.tensor([list(ids)]))
        for hook in hooks:
            hook.remove()
        found.append(seen)
    return found


def test_a_prompt_takes_the_values_of_its_own_twin_in_any_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    clean, twins_ = ([torch.randint(3, 90, (n,), generator=draw).tolist() for n in (4, 6, 4, 6)] for _ in range(2))
    task = pb.Task("random", clean, [5, 6, 7, 8], [[9]] * 4, twins_)
    one, several = (
        pb.prove.ablation(lent("gpt2"), task, ["L0.H1", "L1.H2"], by="resample", draws=1, batch_size=size)  # type: ignore[list-item]
        for size in (1, 8)
    )
    assert close(one.values, several.values, of=1.0)
    assert not close(one.values, 0.0, of=1.0)


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
def test_reference(by: Any) -> None:
    """clean minus ablated, prompt by prompt and condition by condition, with plain hooks: joint, single and every draw."""
    model, task, heads = circuit(seed=1)
    task = task[:5]
    result = pb.prove.ablation(model, task, heads, by=by, draws=3, batch_size=7, seed=4)
    every = sorted({part for row in result.tables["random_parts"] for part in row["parts"]} | set(heads))
    if by == "zero":
        value: Any = 0.0
    elif by == "mean":
        seen = signals(model, every, task.clean)
        means = {text: torch.cat([one[text] for one in seen]).mean(0) for text in every}
        value = lambda text, which: means[text]  # noqa: E731
    else:
        twins = signals(model, every, task.corrupted)
        value = lambda text, which: twins[which][text]  # noqa: E731

    def lost(parts: list[str]) -> float:
        total = 0.0
        for which, (ids, right, wrong) in enumerate(zip(task.clean, task.right, task.wrong, strict=True)):
            scores = []
            for now in ([], parts):
                logits = with_zero(model, now, value, list(ids), which)
                scores.append(float(logits[right] - logits[list(wrong)].mean()))
            total += (scores[0] - scores[1]) / len(task)
        return total

    assert close(float(result["joint"]), lost(heads), of=1.0, noise=4 * NOISE)
    assert close(result.values.tolist(), [lost([head]) for head in heads], of=1.0, noise=4 * NOISE)
    draws = [row["parts"] for row in result.tables["random_parts"]]
    assert close(result["random"].tolist(), [lost(parts) for parts in draws], of=1.0, noise=4 * NOISE)
    assert close(float(result["difference"]), float(result["joint"] - result["random"].mean()), of=1.0)
    accurate = task.with_metric("accuracy")
    if by == "zero":
        for parts, share in zip(draws, result["accuracy_random"].tolist(), strict=True):
            edits = [pb.zero(model.part(text).port()) for text in parts]
            right = accurate.score(pb.run(model, task, edits=edits, logits="last").last_logits)
            assert share == pytest.approx(float(right.double().mean()))
    hits = sum(lost(parts) >= lost(heads) for parts in draws)
    assert float(result["p"]) == pytest.approx((1 + hits) / (1 + len(draws)))


def test_null() -> None:
    """Of a random model no heads matter more than others: not where they rank, not in the interval, not in size."""
    built = planted.null(seed=5)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 20)
    ps, wide = [], []
    for parts in ("L0.H0,L1.H1", "L0.H1,L1.H2", "L0.H2,L1.H3", "L0.H3,L1.H0"):
        result = pb.prove.ablation(model, task, parts, by="mean", draws=9)  # type: ignore[arg-type]
        ps.append(float(result["p"]))
        wide.append(bool(result["difference_low"] <= 0 <= result["difference_high"]))
        assert abs(float(result["joint"])) < 0.2
    assert sorted(ps)[1] > 0.15
    assert sum(wide) >= 3


def test_controls_match_layer_and_kind_and_are_never_the_parts() -> None:
    model, task, heads = circuit()
    rows = pb.prove.ablation(model, task[:2], heads, draws=9).tables["random_parts"]
    assert len({tuple(row["parts"]) for row in rows}) == len(rows) == 9
    for row in rows:
        assert [part.split(".")[0] for part in row["parts"]] == ["L0", "L1"]
        assert not set(row["parts"]) & set(heads)
    most = pb.prove.ablation(model, task[:2], [f"L0.H{i}" for i in range(3)], draws=12)  # 3 of 5 others: 10 sets
    assert any("other layers" in note for note in most.notes)
    assert len(most["random"]) == 10
    assert any("12 draws were asked; 10 different" in note for note in most.notes)
    with pytest.raises(pb.PatchbayError, match=r"5 parts of kind head.*give fewer"):
        pb.prove.ablation(model, task[:2], ["L0.H0", "L0.H1", "L0.H2", "L0.H3", "L1.H0"])


def test_other_kinds_of_parts_and_mixtures() -> None:
    built = planted.relation_neuron(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    parts = [*truth["neurons"].values(), truth["subject_head"]]
    result = pb.prove.ablation(model, task, parts, by="zero", draws=5)
    assert result["difference_low"] > 1
    built = planted.routed_expert(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], metric="log_probability")
    result = pb.prove.ablation(model, task, truth["expert"], by="zero", draws=3)
    assert result["difference_low"] > 1
    for part in ("L1.mlp", "L0.attn", "L0.KV1"):
        assert pb.prove.ablation(model, task[:2], part, draws=1)["random"].isfinite().all()  # type: ignore[arg-type]


def test_metrics_where_less_is_better_are_turned_round() -> None:
    model, task, heads = circuit()
    for metric in ("rank", "kl"):
        result = pb.prove.ablation(model, task.with_metric(metric), heads, draws=3)
        assert result["joint"] > 1
        assert result.unit == task.with_metric(metric).unit
        assert abs(float(result["random"].mean())) < 0.1


def test_a_result_gives_its_first_parts() -> None:
    model, task, heads = circuit()
    ranked = pb.find.direct_logit_attribution(model, task)
    result = pb.prove.ablation(model, task[:4], ranked, top=1, draws=3)
    assert [str(part) for part in result.parts or []] == heads[1:]
    again = pb.replay(result, model)
    assert again, str(again)
    with pytest.raises(pb.PatchbayError, match="say how many"):
        pb.prove.ablation(model, task, ranked)


def test_resample_without_twins_takes_another_prompt() -> None:
    model, task, heads = circuit()
    bare = pb.Task("own", task.clean, task.right, task.wrong)
    result = pb.prove.ablation(model, bare, heads, by="resample", draws=3)
    assert result["joint_low"] > 5
    with pytest.raises(pb.PatchbayError, match="a second prompt"):
        pb.prove.ablation(model, bare[:1], heads, by="resample")


def test_errors_name_what_is_possible() -> None:
    model, task, heads = circuit()
    with pytest.raises(pb.PatchbayError, match="possible are zero, mean, resample"):
        pb.prove.ablation(model, task, heads, by="noise")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match=r"L0\.H9.*has 4"):
        pb.prove.ablation(model, task, "L0.H9")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="draws=0"):
        pb.prove.ablation(model, task, heads, draws=0)
    with pytest.raises(pb.PatchbayError, match="not a part"):
        pb.prove.ablation(model, task, "head 3")  # type: ignore[arg-type]


def test_random_features_are_active_about_as_often_as_those_that_are_given() -> None:
    """Twelve features are always active, eighteen now and then, and ten never: for two of the first, others of them."""
    model, task = given.lent("gpt2"), given.pairs(n=4)
    x = pb.run(model, task, taps=["L1.resid_out"])["L1.resid_out"].flatten(0, 1)
    it = dictionary(model, "L1.resid_out", n=40)
    pre = x @ it.W_enc
    bias = torch.cat([1.0 - pre[:, :12].amin(0), -pre[:, 12:30].quantile(0.9, dim=0), -1.0 - pre[:, 30:].amax(0)])
    it = pb.Dictionary(it.W_enc, it.W_dec, bias, it.b_dec, layer=1)
    view = model.with_dictionaries(it)
    share = activity(view, task, [view.part("L1.F0")], 3)["feature", 1]
    assert close(share, (it.encode(x) > 0).double().mean(0))
    found = pb.prove.ablation(view, task, [view.part("L1.F0"), view.part("L1.F1")], by="zero", draws=6)
    drawn = {name for row in found.tables["random_parts"] for name in row["parts"]}
    assert drawn <= {f"L1.F{i}" for i in range(2, 12)}
    assert any("about as often" in note for note in found.notes)
    rare = pb.prove.ablation(view, task, [view.part("L1.F14")], by="zero", draws=6)
    assert {row["parts"][0] for row in rare.tables["random_parts"]} <= {f"L1.F{i}" for i in range(12, 30)}
    few = pb.Dictionary(it.W_enc, it.W_dec, bias.index_fill(0, torch.arange(2, 40), -1e4), it.b_dec, layer=1)
    with pytest.raises(pb.PatchbayError, match="too few others are active on these prompts"):
        pb.prove.ablation(
            model.with_dictionaries(few), task, [pb.Part(1, "feature", 0), pb.Part(1, "feature", 1)], draws=2
        )
