"""Knockout curve: redundant heads cost nothing one by one and the answer together; equals hooks by hand; null is uniform."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from tests.tolerance import close


def redundant(n: int = 12, d: int = 64) -> tuple[pb.Model, pb.Task, list[str]]:
    """Induction with the induction head twice, each writing less than it takes to lose the answer."""
    built = planted.induction(seed=0, n_heads=8, d_model=8 * d)
    index = int(built.truth["induction"].split("H")[1])
    twin = (index + 1) % 8
    attn = built.model.transformer.h[1].attn
    with torch.no_grad():
        for start in (0, 8 * d, 16 * d):
            own = slice(start + index * d, start + index * d + d)
            attn.c_attn.weight[:, start + twin * d : start + twin * d + d] = attn.c_attn.weight[:, own]
        attn.c_proj.weight[twin * d : twin * d + d] = attn.c_proj.weight[index * d : index * d + d]
    model = pb.load(built.model, built.tokenizer)
    return model, pb.tasks.repeated_tokens(model, n), [f"L1.H{index}", f"L1.H{twin}"]


def test_planted() -> None:
    """Only the joint curve decides: either twin alone leaves every answer right, both take all of them."""
    model, task, heads = redundant(n=6)
    task = task.with_metric("accuracy")
    result = pb.prove.knockout_curve(model, task, [*heads, "L0.H0"], draws=24)  # type: ignore[list-item]
    assert result.coords["n_parts"] == [1, 2, 3]
    assert result.values.tolist()[:2] == [0.0, 1.0]
    assert result["singles"].tolist()[:2] == [0.0, 0.0]
    assert result["accuracy"].tolist()[:2] == [1.0, 0.0]
    assert result["null_mean"][1] < 0.2
    assert result["difference_low"][1] > 0.7
    assert result["p"][0] == 1.0
    assert result["p"][1] < 0.15  # of 28 pairs of the layer one is the twins
    assert "one by one 0 in sum" in result.notes[0]
    assert result.plot() is not None


def test_planted_parts_across_layers_are_rare_at_random() -> None:
    built = planted.induction(seed=0, n_heads=8, d_model=512)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 12)
    heads = [built.truth["previous_token"], built.truth["induction"]]
    result = pb.prove.knockout_curve(model, task, heads, draws=30)
    assert result["low"].min() > 5
    assert result["accuracy"].max() == 0.0
    assert result["accuracy_random"].min() > 0.6
    assert result["p"][0] < 0.35  # 1 of 8 heads
    assert result["singles"][1] > 1.5 * result.values[1]  # two steps of one path: each alone already costs all


def lost_by_hand(model: pb.Model, task: pb.Task, parts: list[str]) -> list[float]:
    """Loss of logit difference on each prompt with zeros put into c_proj's input by a hook."""
    d = model.d_model // model.n_heads(0)

    def difference(i: int) -> float:
        with torch.no_grad():
            logits = model.hf(torch.tensor([list(task.clean[i])])).logits[0, -1].double()
        return float(logits[task.right[i]] - logits[list(task.wrong[i])].mean())

    plain = [difference(i) for i in range(len(task))]
    hooks = []
    for part in map(model.part, parts):

        def zero(_: Any, args: Any, at: int = (part.index or 0) * d) -> Any:
            x = args[0].clone()
            x[..., at : at + d] = 0.0
            return (x,)

        hooks.append(model.hf.transformer.h[part.layer].attn.c_proj.register_forward_pre_hook(zero))
    cut = [difference(i) for i in range(len(task))]
    for hook in hooks:
        hook.remove()
    return [a - b for a, b in zip(plain, cut, strict=True)]


def test_reference() -> None:
    """Joint, single and random curves, their p values and differences, from one-by-one runs with plain hooks."""
    model, task, heads = redundant(n=5)
    ranked = ["L0.H3", heads[0], "L1.H2", heads[1]]
    result = pb.prove.knockout_curve(model, task, ranked, by="zero", sizes=[1, 3, 4], draws=4, batch_size=7, seed=3)
    orders = [row["parts"] for row in result.tables["random_parts"]]
    for j, k in enumerate([1, 3, 4]):
        joint = torch.tensor(lost_by_hand(model, task, ranked[:k])).double()
        drawn = torch.tensor([lost_by_hand(model, task, order[:k]) for order in orders]).double()  # [draw, prompt]
        assert close(float(result.values[j]), float(joint.mean()), of=result.values)
        assert close(result["random"][:, j].tolist(), drawn.mean(1).tolist(), of=result["random"])
        assert close(float(result["null_mean"][j]), float(drawn.mean()), of=result["null_mean"])
        assert close(float(result["difference"][j]), float((joint - drawn.mean(0)).mean()), of=result["difference"])
        hits = int((drawn.mean(1) >= joint.mean() - 1e-5).sum())
        assert float(result["p"][j]) == pytest.approx((1 + hits) / 5)
        alone = sum(sum(lost_by_hand(model, task, [part])) / 5 for part in ranked[:k])
        assert close(float(result["singles"][j]), alone, of=result["singles"])


def test_null() -> None:
    """Arbitrary rankings of a random model: every p is as likely, so that their mean is a half and few are small."""
    ps = []
    for seed in range(16):
        built = planted.null(seed=seed, n_heads=8, d_model=128, d_mlp=32, n_positions=32)
        model = pb.load(built.model, built.tokenizer)
        task = pb.tasks.repeated_tokens(model, 4, max_period=5, max_offset=2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        ranked = [f"L{i % 2}.H{h}" for i, h in enumerate(torch.randperm(8, generator=generator)[:4].tolist())]
        result = pb.prove.knockout_curve(model, task, ranked, sizes=[2, 4], draws=9, seed=seed)  # type: ignore[arg-type]
        ps.append(result["p"])
    p = torch.stack(ps)
    assert 0.3 < float(p.mean()) < 0.75
    assert float((p <= 0.1).double().mean()) < 0.3


def test_random_orders_keep_kind_and_layer_place_by_place() -> None:
    model, task, heads = redundant(n=2)
    ranked = [heads[0], "L0.H1", "L1.N4", "L0.mlp", heads[1]]
    result = pb.prove.knockout_curve(model, task, ranked, draws=12, sizes=[5])  # type: ignore[arg-type]
    for row in result.tables["random_parts"]:
        kinds = [part.rstrip("0123456789") for part in row["parts"]]
        assert kinds[:3] == ["L1.H", "L0.H", "L1.N"]
        assert row["parts"][3] in ("L0.mlp", "L1.mlp")
        assert kinds[4] == "L1.H"
        assert len(set(row["parts"])) == 5
    assert len({tuple(row["parts"]) for row in result.tables["random_parts"]}) > 6


def test_prompts_that_ranked_are_left_out() -> None:
    model, task, heads = redundant()
    half = pb.find.direct_logit_attribution(model, task[:5])
    result = pb.prove.knockout_curve(model, task, half, draws=3)
    assert "5 prompts on which the parts were ranked are left out: 7 remain" in result.notes[1]
    rest = pb.prove.knockout_curve(model, task[5:], half, draws=3)
    assert torch.equal(result.values, rest.values)
    assert len(rest.notes) == 1
    assert result.coords["n_parts"][-1] == 8  # half of 16 heads
    assert {row["part"] for row in result.tables["ranking"][:2]} == set(heads)
    every = pb.find.direct_logit_attribution(model, task)
    assert "nothing is held out" in pb.prove.knockout_curve(model, task, every, draws=3, sizes=[1, 2]).notes[1]


def test_order_by_effect_uses_one_half_and_curves_the_other() -> None:
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 10)
    every = [f"L{layer}.H{head}" for layer in range(2) for head in range(4)]
    result = pb.prove.knockout_curve(model, task, every, order="effect", draws=3, sizes=[1, 2])  # type: ignore[arg-type]
    found = {row["part"] for row in result.tables["ranking"]}
    assert found == {built.truth["previous_token"], built.truth["induction"]}
    assert "ranked by single effects on 5 prompts, curves on the other 5" in result.notes[1]
    test = task.split()[1]
    again = pb.prove.knockout_curve(model, test, [row["part"] for row in result.tables["ranking"]], draws=3)
    assert close(again.values, result.values)


def test_sizes_grow_and_end_at_the_last() -> None:
    from patchbay.prove.knockout_curve import _sizes

    assert _sizes(5, None) == [1, 2, 3, 4, 5]
    assert _sizes(20, None) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20]
    assert _sizes(9, [4, 2, 4]) == [2, 4]


def test_errors_name_what_is_possible() -> None:
    model, task, heads = redundant(n=2)
    curve = pb.prove.knockout_curve
    with pytest.raises(pb.PatchbayError, match="possible are zero, mean, resample"):
        curve(model, task, heads, by="noise")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="possible are given, effect"):
        curve(model, task, heads, order="best")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="sizes go up to 5, 2 parts"):
        curve(model, task, heads, sizes=[1, 5])  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="draws=0"):
        curve(model, task, heads, draws=0)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match=r"L0\.H9.*has 8"):
        curve(model, task, ["L0.H9"])  # type: ignore[list-item]
    with pytest.raises(pb.PatchbayError, match="no parts"):
        curve(model, task, [])
