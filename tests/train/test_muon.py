"""Muon and COSMOS by name: steps are torch's own, which parameters step by matrices, what a checkpoint keeps, what a state holds, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.train._copies import copied
from patchbay.train._muon import MuonAdamW
from patchbay.train._optimizers import optimizer
from patchbay.train._plan import Arm, Rows, plan_of
from patchbay.train._states import held
from patchbay.train._trainer import trained
from tests.given import lent
from tests.tolerance import close
from tests.train.test_variant import PLAN, texts, variant

BOTH = ("muon", "cosmos:rank=4")


def started(text: str, model: pb.Model, rate: float = 0.02) -> Any:
    """The optimiser as the Trainer makes it, of a copy's parameters: matrices with decay, vectors without."""
    kind, options = optimizer(text, model, 0) or (None, None)
    assert kind is not None
    of = list(model.hf.parameters())
    groups = [
        {"params": [p for p in of if (p.ndim > 1) == matrix], "weight_decay": 0.1 if matrix else 0.0}
        for matrix in (True, False)
    ]
    return kind(groups, lr=rate, **options)


def fresh(name: str, dtype: torch.dtype = torch.float32) -> pb.Model:
    model = pb.load(pb.tiny.twins.twin(name).to(dtype))
    for p in model.hf.parameters():
        p.requires_grad_()
    return model


def slopes(model: pb.Model, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in model.hf.parameters():
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def by_matrices(model: pb.Model) -> set[str]:
    """The maps of a Llama or GPT-2 twin, by hand: the weights of its layers' attention and feed-forward."""
    inside = ("self_attn.", "mlp.", "attn.c_")
    return {
        name
        for name, p in model.hf.named_parameters()
        if p.ndim == 2 and any(part in name for part in inside) and "norm" not in name
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_steps_are_those_of_torchs_own_bit_for_bit(name: str) -> None:
    """Muon of the size of AdamW's step on the maps, AdamW on all else, each with the decay of its group."""
    model, other = fresh(name), fresh(name)
    mine, maps = started("muon", model), by_matrices(other)
    named = dict(other.hf.named_parameters())
    theirs = [
        torch.optim.Muon([named[one] for one in named if one in maps], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for one, p in named.items() if one not in maps and p.ndim > 1], lr=0.02, weight_decay=0.1),
        torch.optim.AdamW([p for one, p in named.items() if p.ndim == 1], lr=0.02, weight_decay=0.0),
    ]  # fmt: skip
    for step in range(3):
        for one in (model, other):
            slopes(one, step)
        mine.step()
        for part in theirs:
            part.step()
    for (one, p), q in zip(model.hf.named_parameters(), named.values(), strict=True):
        assert torch.equal(p, q), one
    for group in mine.param_groups:  # a schedule sets the rates of groups
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.hf.parameters()]
    slopes(model, 3)
    mine.step()
    assert all(torch.equal(p, q) for p, q in zip(model.hf.parameters(), before, strict=True))


def test_steps_have_the_size_of_adamw() -> None:
    """A root mean square of about .2 of the rate, whatever the shape: singular values are near 1."""
    for m, n in ((8, 40), (40, 8), (16, 16)):
        W = torch.nn.Parameter(torch.zeros(m, n))
        W.grad = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
        MuonAdamW([W], lr=0.5, among=frozenset([id(W)])).step()
        assert 0.6 < float(W.detach().square().mean().sqrt()) / (0.5 * 0.2) < 1.2


@pytest.mark.parametrize("text", BOTH)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_maps_step_by_matrices_and_all_else_by_adam(text: str, name: str) -> None:
    """Tables of tokens and positions are matrices too, and take Adam however few rows they have."""
    model = fresh(name)
    fit = started(text, model)
    slopes(model, 0)
    fit.step()
    whole = {"momentum_buffer", "M"}
    found = {one for one, p in model.hf.named_parameters() if whole & set(fit.state[p])}
    assert found == by_matrices(model)
    moments = {"exp_avg", "exp_avg_sq"} if text == "muon" else {"m", "v"}
    assert all(moments <= set(fit.state[p]) for one, p in model.hf.named_parameters() if one not in found)


@pytest.mark.parametrize("text", BOTH)
def test_states_come_back_bit_for_bit_in_half_precision(text: str) -> None:
    ends = []
    for cut in (False, True):
        model = fresh("llama", torch.bfloat16)
        fit = started(text, model)
        for step in range(4):
            slopes(model, step)
            fit.step()
            if cut and step == 1:
                kept = fit.state_dict()
                fit = started(text, model, rate=9.0)  # rates are those that were kept
                fit.load_state_dict(kept)
        ends.append([p.detach().clone() for p in model.hf.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_bytes_of_a_state_are_told(tmp_path: Path) -> None:
    """By hand: two numbers a weight for AdamW; one for Muon's matrices; (m + R)(n + R) for those of COSMOS. The estimate's memory holds them too."""
    model = lent("llama")
    n = sum(p.numel() for p in model.hf.parameters())
    shapes = [p.shape for name, p in model.hf.named_parameters() if name in by_matrices(model)]
    inside = sum(a * b for a, b in shapes)
    wanted = {
        "adamw": 2 * n,
        "muon": 2 * (n - inside) + inside,
        "cosmos:rank=4": 2 * (n - inside) + sum((a + 4) * (b + 4) for a, b in shapes),
    }
    plan = plan_of({**PLAN, "steps": 1})
    for text, numbers in wanted.items():
        arm = Arm(optimizer=text)
        found = trained(copied(model), Rows(texts(), arm, plan, 0), arm, plan, tmp_path, keep=False)
        assert found.state == 4 * numbers
    told = variant(optimizer="cosmos:rank=4", plan={**PLAN, "steps": 1})
    runs = {row["run"]: row["state_bytes"] for row in told.tables["runs"]}
    assert (runs["variant-0"], runs["twin-0"]) == (4 * wanted["cosmos:rank=4"], 8 * n)
    assert any(f"{4 * wanted['cosmos:rank=4']:,} bytes of the optimizer's state" in note for note in told.notes)
    dry = variant(optimizer="muon", plan={**PLAN, "dry_run": True})
    assert dry["state"].tolist() == [4 * wanted["muon"], 8 * n, 8 * n]
    assert float(dry["memory"]) == 16 * n
    fit = started("muon", fresh("llama"))
    assert held(fit) == 0  # before its first step


def test_what_has_no_maps_is_refused() -> None:
    """A parameter that is no matrix of a map, as shards are not, and a model that has none as modules."""
    with pytest.raises(pb.PatchbayError, match="muon: no matrix of a linear map is left as one"):
        MuonAdamW([torch.nn.Parameter(torch.ones(2, 2))], among=frozenset())
    bare = pb.load(pb.tiny.twins.twin("llama"))
    bare.hf.named_modules = lambda: iter(())  # type: ignore[method-assign, misc, assignment]
    for text in BOTH:
        with pytest.raises(
            pb.PatchbayError,
            match=rf"optimizer {text.partition(':')[0]}: this llama model has no linear maps as modules",
        ):
            optimizer(text, bare, 0)


def test_rank_and_ratio_reach_the_step() -> None:
    model = fresh("llama")
    fit = started("cosmos:rank=3,ratio=0.5", model, rate=0.1)
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    for group in fit.param_groups:
        group["weight_decay"] = 0.0
    slopes(model, 0)
    fit.step()
    for name, p in model.hf.named_parameters():
        if name in by_matrices(model):
            assert fit.state[p]["P"].shape[1] == 3
            moved = (p.detach() - before[name]).square().mean().sqrt()
            assert float(moved) == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_a_run_by_name_is_that_of_its_optimiser() -> None:
    """Two updates of the Trainer beside the same two by hand."""
    from patchbay.train._objectives._objective import collated, cross_entropy
    from patchbay.train._runs import Lab, ended

    plan = plan_of({"steps": 2, "batch_size": 4, "held": 0.0, "rate": 0.01})
    tuned = ended(Lab(lent("llama"), texts(), texts(), plan), Arm(optimizer="muon"), 3)
    model, rows = fresh("llama"), Rows(texts(), Arm(), plan, 3)
    fit = started("muon", model, rate=0.01)
    for step in range(2):
        batch = collated([rows[4 * step + i] for i in range(4)])
        with torch.enable_grad():
            loss = cross_entropy(model.hf(batch["input_ids"]).logits, batch["labels"]) / 20
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.hf.parameters(), 1.0)
        fit.step()
        fit.zero_grad()
    for name, value in model.hf.state_dict().items():
        assert close(tuned.hf.state_dict()[name], value, noise=512), name
