"""find.channel_changes and pb.diff of two models: a planted change, the scores one by one, unrelated models, shapes that differ."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from scipy import stats

import patchbay as pb
from patchbay import maths
from patchbay.tiny import planted, twins
from tests.tolerance import close

HEADS = {"writers": ["head"], "kinds": ["query", "key", "value"]}


def test_planted() -> None:
    """The same random model with and without a rank-4 channel: that channel is found, and its reader's changed input alone."""
    without, made = (planted.channel(form="gpt2", strength=strength, rank=4) for strength in (0.0, 0.45))
    assert without.truth["writer"] == made.truth["writer"]
    result = pb.find.channel_changes(pb.load(without.model), pb.load(made.model), **HEADS)  # type: ignore[arg-type]
    name = f"{made.truth['writer']}>{made.truth['reader']}.q"
    first = result.table(1)[0]
    assert str(first["part"]) == name
    assert first["p_adjusted"] < 1e-3
    assert first["second"] > first["first"]
    assert [str(row["part"]) for row in result.table() if row["p_adjusted"] <= 0.05] == [name]


def test_reference() -> None:
    """Differences of the scores that find.channels gives each model."""
    models = [pb.load(twins.twin("llama", seed)) for seed in (0, 1)]
    result = pb.find.channel_changes(*models)
    each = [pb.find.channels(model, components=False, nulls=0)["whole"] for model in models]
    assert close(result["whole"], each[1] - each[0], dtype=torch.float64, equal_nan=True)
    writers, readers = result.labels_of("writer"), result.labels_of("reader")
    for row in result.table(5):
        writer, _, reader = str(row["part"]).partition(">")
        i, j = writers.index(writer), readers.index(reader)
        assert close(row["value"], float(each[1][i, j] - each[0][i, j]), of=each[0][i, j])
        assert close(row["first"], float(each[0][i, j]))
    z = result["whole_z"]
    seen = ~z.isnan()
    both_sides = torch.from_numpy(2 * stats.norm.sf(z[seen].abs().numpy()))
    assert close(result["whole_p"][seen], maths.benjamini_hochberg(both_sides), of=1.0)
    assert bool((z[seen] < 0).any())


def test_null() -> None:
    """Two random models: p uniform enough, no more finds than the rate; a model and itself: nothing changed."""
    finds, raw = 0, []
    for name, seed in itertools.product(["gpt2", "llama", "phi"], range(0, 10, 2)):
        pair = [pb.load(twins.twin(name, seed + i)) for i in (0, 1)]
        result = pb.find.channel_changes(*pair, **HEADS)  # type: ignore[arg-type]
        finds += bool((result["whole_p"] <= 0.05).any())
        z = result["whole_z"]
        raw.append(z[~z.isnan()])
    flat = torch.cat(raw)
    assert finds <= 3, finds
    assert float((flat.abs() > 1.96).double().mean()) == pytest.approx(0.05, abs=0.025)
    same = pb.find.channel_changes(pair[0], pair[0])
    assert float(same["whole"].nan_to_num(0).abs().max()) == 0.0
    assert "0 of" in same.notes[0]


def test_no_change_at_all_is_drawn(tmp_path: Path) -> None:
    model = pb.load(twins.twin("gpt2"))
    assert pb.find.channel_changes(model, model).plot(tmp_path / "a.png") is not None
    assert (tmp_path / "a.png").stat().st_size > 0


def test_diff_of_two_models_is_this() -> None:
    models = [pb.load(twins.twin("gpt2", seed)) for seed in (0, 1)]
    assert pb.diff(*models).equal(pb.find.channel_changes(*models))
    with pytest.raises(pb.PatchbayError, match="two Results, or two Models"):
        pb.diff(models[0], "gpt2")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("gpt2", {"n_embd": 16}), "d_model is 32 and 16"),
        (("gpt2", {"n_layer": 3}), "only one has L1.H0>|only one has L2"),
        (("llama", {}), "only one has"),
    ],
)
def test_models_of_other_shapes_are_refused(other: tuple[str, dict[str, int]], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.find.channel_changes(pb.load(twins.twin("gpt2")), pb.load(twins.twin(other[0], **other[1])))
