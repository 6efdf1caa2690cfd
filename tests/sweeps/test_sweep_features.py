"""Sweeps over features: every edit is what a whole run with it gives, at every place, joined or under a session."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.model.attached import HOME
from patchbay.sweeps.joins import Joins
from patchbay.sweeps.plan import changed_by
from patchbay.sweeps.sweep import Sweep
from tests import given
from tests.features.given import crosscoder, dictionary, layers
from tests.tolerance import close

PLACES = (
    "L0.resid_in",
    "L0.resid_mid",
    "L0.resid_out",
    "L1.attn.out",
    "L0.attn.z",
    "L0.mlp.in",
    "L0.mlp.act",
    "L1.mlp.out",
    "L0.mlp.in to L0.mlp.out",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_sweep_over_features_is_whole_runs(place: str) -> None:
    model = given.lent("llama")
    it = dictionary(model, place, subtract="to" not in place)
    view, task = model.with_dictionaries(it), given.pairs()
    home, part = (
        f"L{it.layer}.{HOME[it.writes]}",
        str(model.with_dictionaries(it).part(f"L{it.layer}.F0")).removesuffix("0"),
    )
    entries: list[Any] = [pb.zero(f"{part}{i}.act", positions=[i]) for i in range(3)]
    entries += [
        pb.zero(f"{home}.act", positions=-1),
        pb.add(f"{part}5.act", torch.rand(3, 1)),
        pb.replace(f"{part}6.act", 1.0, rows=[1]),
    ]
    entries += [
        pb.add(f"{home}.error", torch.ones(it.d_out)),
        [pb.zero(f"{part}7.act"), pb.zero(f"{part}8.act")],
        pb.scale(f"{part}9.act", 1.0),
    ]
    swept = pb.sweep(view, task, entries)
    whole = [task.score(pb.run(view, task, edits=e if isinstance(e, list) else [e]).last_logits) for e in entries]
    assert close(swept["value"], torch.stack(whole))
    assert bool((swept["value"][3:-1] != swept["base"]).any(1).all()), (
        "those at the last token, or at all, change the score"
    )
    joined = changed_by(view, view.port(f"{part}0.act"))
    assert joined == (it.writes if it.writes != "attn.z" else "attn_features.act")


def test_features_of_normalised_tokens_run_under_a_session() -> None:
    view = given.lent("llama").with_dictionaries(
        dictionary(given.lent("llama"), "L0.resid_out", normalise="layer_norm")
    )
    task = given.pairs()
    edit = pb.add("L0.F3.act", 2.0)
    assert close(pb.sweep(view, task, [edit])["value"][0], task.score(pb.run(view, task, edits=[edit]).last_logits))
    assert changed_by(view, view.port("L0.F3.act")) == "features.act"


def test_features_of_several_layers_are_swept_by_whole_runs() -> None:
    model, task = given.lent("llama"), given.pairs()
    view = model.with_dictionaries(layers(model.d_model, (0, 1)), crosscoder(model.d_model, (0, 1)))
    entries = [pb.add("L0.mlp.F3.act", 2.0), pb.add("L1.F3.act", 2.0, positions=-1), pb.zero("L1.mlp_features.error")]
    swept = pb.sweep(view, task, entries)
    whole = [task.score(pb.run(view, task, edits=[e]).last_logits) for e in entries]
    assert close(swept["value"], torch.stack(whole))
    assert any("read or written in several layers" in note for note in swept.notes)


@pytest.mark.parametrize("place", ["L0.resid_out", "L0.mlp.in to L0.mlp.out"])
def test_rows_join_where_a_feature_is_first_active_and_silent_ones_are_the_base_run(place: str) -> None:
    model, task = given.lent("llama"), given.pairs()
    it = dictionary(model, place, n=40, form="topk", k=3, subtract="to" not in place)
    view = model.with_dictionaries(it)
    home = f"L{it.layer}.{HOME[it.writes]}"
    part = str(view.part(f"L{it.layer}.F0")).removesuffix("0")
    entries = [pb.zero(f"{part}{i}.act") for i in range(40)] + [pb.add(f"{home}.act", torch.zeros(40))]
    planned = Sweep(view, task, entries)
    base, [cells] = planned.ready(0).base, planned.ready(0).batches
    moving = {cell.index: cell for cell in Joins(base).moving(cells)}
    z = pb.run(view, task, taps=[f"{home}.act"])[f"{home}.act"]
    for i in range(40):
        active = (z[:, :, i] != 0).any(0).nonzero()[:, 0].tolist()
        assert (i in moving) == bool(active)
        if active:
            assert (moving[i].start, moving[i].stop) == (active[0], active[-1] + 1)
    assert 40 not in moving
    assert 0 < len(moving) < 40
    assert any(cell.start for cell in moving.values())
    swept = planned.run()
    whole = torch.stack([task.score(pb.run(view, task, edits=[one]).last_logits) for one in entries])
    assert close(swept["value"], whole)
    silent = [i for i in range(41) if i not in moving]
    assert torch.equal(torch.as_tensor(swept["value"][silent]), torch.as_tensor(swept["base"]).expand(len(silent), -1))
