"""Tuning for sub-networks: a step is the model without some of its weights, and the whole model where nothing is cut; draws are alike likely and of one step for all rows."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.edits.edit import Edit
from patchbay.train._objectives import objective
from patchbay.train._objectives._objective import collated, learned
from patchbay.train._objectives.supernet import Supernet
from patchbay.train._plan import Arm, Rows, plan_of
from patchbay.train._runs import Lab, ended
from tests.given import lent
from tests.tolerance import close

DOCUMENTS = [[[(3 * i + j) % 30 + 5 for j in range(9)]] for i in range(8)]


def batch_of(by: int) -> dict[str, Tensor]:
    """Two documents of different lengths as rows of a step whose sub-network a number draws."""
    rows = [(ids, [by, *ids[1:]]) for ids in (DOCUMENTS[0][0], DOCUMENTS[1][0][:6])]
    return collated(rows)


def losses(
    aim: Supernet, model: pb.Model, hf: torch.nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    weights = [weight.requires_grad_() for weight in hf.parameters()]
    with torch.enable_grad():
        loss = aim.loss(model, hf, batch, learned(batch["labels"]))
    return loss.detach(), list(torch.autograd.grad(loss, weights, allow_unused=True))


def kept(edits: list[Edit], model: pb.Model) -> tuple[list[int], list[Tensor]]:
    """Of the edits of a sub-network: the layers without attention, and of each layer which neurons stay, 0 or 1."""
    off, rows = [], [torch.ones(model.n_neurons(layer)) for layer in range(model.n_layers)]
    for edit in edits:
        if edit.port.signal == "attn.out":
            off.append(edit.port.layer)
        else:
            rows[edit.port.layer] = edit.value.flatten()
    return off, rows  # type: ignore[return-value]


def test_reference_a_step_is_the_model_without_these_weights_and_its_gradient() -> None:
    model, plain = pb.load(copy.deepcopy(lent("llama").hf)), objective("ntp")
    aim = objective("supernet:shares=1+0.5+0")
    assert isinstance(aim, Supernet)
    whole, batch = batch_of(-100), batch_of(0)
    loss, slopes = losses(aim, model, model.hf, whole)
    expected = losses(plain, model, model.hf, whole)  # type: ignore[arg-type]
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(slopes, expected[1], strict=True))  # type: ignore[arg-type]
    by = next(
        i
        for i in range(99)
        if len(kept(aim.drawn(model, i), model)[0]) == 1
        and any(0 < float(row.mean()) < 1 for row in kept(aim.drawn(model, i), model)[1])
    )
    batch["labels"][:, 0] = by
    off, rows = kept(aim.drawn(model, by), model)
    cut = copy.deepcopy(model.hf)
    with torch.no_grad():
        for layer, row in zip(cut.model.layers, rows, strict=True):
            layer.mlp.down_proj.weight *= row
        for layer in off:
            cut.model.layers[layer].self_attn.o_proj.weight.zero_()
    loss, slopes = losses(aim, model, model.hf, batch)
    told, wanted = losses(plain, pb.load(cut), cut, batch)  # type: ignore[arg-type]
    assert close(loss, told)
    for name, found, there in zip([name for name, _ in cut.named_parameters()], slopes, wanted, strict=True):
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        if name.endswith("o_proj.weight") and layer in off:  # cut off it is never read
            assert found is None or not found.any()
            continue
        mine = torch.zeros_like(cut.get_parameter(name)) if found is None else found
        assert there is not None
        assert close(mine, there * rows[layer] if name.endswith("down_proj.weight") else there), name


def test_sub_networks_are_drawn_alike_often_and_one_lies_within_another() -> None:
    model = lent("llama")
    aim, null = objective("supernet"), objective(objective("supernet").null or "")
    assert isinstance(aim, Supernet)
    assert isinstance(null, Supernet)
    draws = [kept(aim.drawn(model, i), model) for i in range(600)]
    for layer in range(model.n_layers):
        n = model.n_neurons(layer)
        assert abs(sum(layer in off for off, _ in draws) / 600 - 0.5) < 0.08
        sizes = Counter(round(float(rows[layer].sum())) for _, rows in draws)
        assert sizes.keys() == {n, round(n / 2), round(n / 4)}
        assert all(abs(times / 600 - 1 / 3) < 0.08 for times in sizes.values())
        assert all(torch.equal(rows[layer], rows[layer].sort(descending=True).values) for _, rows in draws)
    others = [kept(null.drawn(model, i), model) for i in range(60)]
    assert [off for off, _ in others] == [off for off, _ in draws[:60]]
    assert all(
        torch.equal(a.sum(), b.sum())
        for (_, one), (_, other) in zip(others, draws, strict=False)
        for a, b in zip(one, other, strict=True)
    )
    halves = {tuple(rows[0].tolist()) for _, rows in others if 0 < float(rows[0].mean()) < 1}
    assert len(halves) > 20
    assert not any(kept(objective("supernet:attention=0").drawn(model, i), model)[0] for i in range(40))  # type: ignore[attr-defined]


def test_rows_of_a_step_have_one_sub_network_and_the_next_step_another() -> None:
    rows = Rows(DOCUMENTS, Arm("supernet"), plan_of({"steps": 6, "batch_size": 4}), 0)
    by = [rows[i][1][0] for i in range(24)]
    assert [len(set(by[i : i + 4])) for i in range(0, 24, 4)] == [1] * 6
    assert len(set(by)) == 6
    assert by == [rows[i][1][0] for i in range(24)]
    assert all(rows[i][1][1:] == rows[i][0][1:] for i in range(24))
    assert {tuple(rows[i][0]) for i in range(24)} == {tuple(one[0]) for one in DOCUMENTS}


@pytest.mark.slow  # trains for some seconds
def test_planted_tuning_makes_sub_networks_cheaper_and_null_other_batches_do_not() -> None:
    from patchbay.papers.claims import blocks
    from patchbay.tiny import lab

    texts, held = ([ids for ids, _ in lab.mentions(n, at)] for n, at in ((256, 0), (16, 1000)))
    documents = [[ids] for ids in texts]
    share = Lab(
        lab.small(64, width=32, mlp=64), documents, documents, plan_of({"steps": 200, "batch_size": 16, "fresh": True})
    )  # type: ignore[arg-type]
    arms = {"supernet": Arm("supernet"), "twin": Arm(), "other": Arm(other_batches=True)}
    asked = {name: blocks._every(ended(share, arm, 0), held) for name, arm in arms.items()}
    cost = {name: torch.stack([each for one, (each, _) in some.items() if any(one)]).mean() for name, some in asked.items()}  # fmt: skip
    assert float(cost["twin"] - cost["supernet"]) > 0.05
    assert abs(float(cost["twin"] - cost["other"])) < 0.1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("supernet:shares=0.5+1", "the first of them 1"),
        ("supernet:shares=1+2", "from 0 to 1"),
        ("supernet:shares=1+half", "as 1\\+0.5\\+0.25"),
        ("supernet:nested=2", "and 0 or 1"),
        ("supernet:attention=-1", "and 0 or 1"),
    ],
)
def test_settings_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        objective(text)


def test_a_model_without_neurons_is_refused_by_name() -> None:
    with pytest.raises(pb.PatchbayError, match=r"mlp\.act"):
        objective("supernet").adapt(lent("mamba"))
