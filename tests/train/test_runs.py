"""Runs that begin with another language, or whose guide leaves: what its parent learned stays in the body, the rows of tokens are the twin's draw, the estimate counts all steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.blocks.structured import guide_share
from patchbay.corpus.synthetic import texts
from patchbay.train._objectives._objective import collated, cross_entropy
from patchbay.train._plan import Arm, Rows, plan_of
from patchbay.train._runs import Lab, begun, cost, ended, parent_of
from patchbay.train._trainer import trained
from tests.given import lent
from tests.tolerance import close

DOCUMENTS = [[[i % 7 + 5, 6, 7, 8]] for i in range(12)]
ARM = Arm("transfer:source=repeats,steps=3,vocab=20,length=8")
PLAN = {"steps": 2, "batch_size": 4, "redraw": True}


def share(**more: object) -> Lab:
    return Lab(lent("llama"), DOCUMENTS, DOCUMENTS, plan_of({**PLAN, **more}))


def test_the_parent_is_trained_on_the_language_and_only_rows_of_tokens_are_drawn_anew() -> None:
    parent, child, twin = parent_of(share(), ARM, 1), begun(share(), ARM, 1), begun(share(), Arm(), 1)
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    own, there, plain = parent.hf.state_dict(), child.hf.state_dict(), twin.hf.state_dict()
    assert {name for name in own if not torch.equal(own[name], there[name])} == tables
    lent_ = lent("llama").hf.state_dict()
    assert {name for name in own if torch.equal(own[name], lent_[name])} <= {n for n in own if "rotary" in n}
    assert all(torch.equal(there[name], plain[name]) for name in tables)  # to the bit the twin's


def test_the_parent_by_plain_steps() -> None:
    """Three updates of plain torch on the same texts."""
    model, plan = lent("llama"), plan_of({**PLAN, "decay": 0.0})
    said = [[text] for text in texts("repeats", 12, 1, vocab=20, length=8)]
    rows = Rows(said, Arm(), plan_of({**PLAN, "steps": 3}), 1)
    hf = pb.tiny.twins.twin("llama")
    optimizer = torch.optim.AdamW(hf.parameters(), lr=plan.rate, weight_decay=0.0)
    for step in range(3):
        batch = collated([rows[4 * step + i] for i in range(4)])
        with torch.enable_grad():
            (cross_entropy(hf(batch["input_ids"]).logits, batch["labels"]) / 28).backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = parent_of(Lab(model, DOCUMENTS, DOCUMENTS, plan), ARM, 1).hf.state_dict()
    assert all(close(found[name], value) for name, value in hf.state_dict().items())


def test_a_parent_is_trained_once_for_several_runs() -> None:
    kept: dict[object, dict[str, torch.Tensor]] = {}
    labs = [Lab(lent("llama"), DOCUMENTS[:n], DOCUMENTS, plan_of(PLAN), kept) for n in (6, 12)]
    starts = [begun(lab, ARM, 1).fingerprint for lab in labs]
    assert starts[0] == starts[1] == begun(share(), ARM, 1).fingerprint
    assert len(kept) == 1
    assert begun(labs[0], ARM, 2).fingerprint != starts[0]
    assert len(kept) == 2


def test_a_guide_leaves_over_half_of_the_steps_and_stays_away() -> None:
    """The share that each step ran with; then the factors alone are the map, also when training goes on from there."""
    form = {"kind": "low_rank", "rank": 4, "guided": True}
    start = pb.load(pb.blocks.build(lent("llama").hf, feedforward=form))
    shares: list[float] = []
    plan = plan_of({"steps": 4, "batch_size": 4})
    watch = (1, lambda model: shares.append(float(model.hf.model.layers[0].mlp.up_proj.share)))
    lab = Lab(start, DOCUMENTS, DOCUMENTS, plan, watch=watch)
    rows, hf = Rows(DOCUMENTS, Arm(), plan, 0), begun(lab, Arm(), 0).hf
    assert float(hf.model.layers[0].mlp.up_proj.share) == 1.0
    tuned = pb.load(hf)
    trained(tuned, rows, Arm(), plan, Path(), keep=False, watch=watch)
    assert close(torch.tensor(shares), torch.tensor([guide_share(step, 4) for step in range(4)]))
    assert (shares[0], shares[2:]) == (1.0, [0.0] * 2)
    one = tuned.hf.model.layers[0].mlp.up_proj
    assert float(one.share) == 0.0
    assert not torch.equal(one.guide, start.hf.model.layers[0].mlp.up_proj.guide)
    assert close(one.weight, one.V @ one.U)
    further = ended(Lab(tuned, DOCUMENTS, DOCUMENTS, plan), Arm(), 0).hf.model.layers[0].mlp.up_proj
    assert torch.equal(further.guide, one.guide)
    assert not torch.equal(further.U, one.U)


def test_what_pretraining_asks_and_costs() -> None:
    with pytest.raises(pb.PatchbayError, match="give the plan redraw=1"):
        begun(share(redraw=False), ARM, 0)
    with pytest.raises(pb.PatchbayError, match="vocab=9000, and this model has"):
        begun(share(), Arm("transfer:vocab=9000"), 0)
    plain, longer = cost(share(), Arm()), cost(share(), Arm("transfer:steps=98,length=8"))
    assert longer["flops"] == plain["flops"] * 50
    found = pb.train.variant(lent("llama"), DOCUMENTS, objective=ARM.objective, seeds=1, plan=PLAN)
    starts = [row["start"] for row in found.tables["runs"]]
    assert len(set(starts)) == 3
    assert "null: transfer:source=independent,steps=3,vocab=20,length=8" in " ".join(found.notes)
    assert all(math.isfinite(row["loss"]) for row in found.tables["runs"])
