"""Panel: each reading is its finder's own; planted heads show, a random model shows nothing, and what is not offered is said."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.stories.panel import said_twice
from patchbay.tiny import planted
from tests.given import lent
from tests.tolerance import close


def texts(n: int = 6, length: int = 20, *, high: int = 60, seed: int = 0) -> list[list[int]]:
    return torch.randint(3, high, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def by_name(found: pb.Result) -> dict[str, dict[str, float]]:
    return {row["reading"]: row for row in found.tables["panel"]}


def test_planted() -> None:
    """A built induction circuit: its heads look back and at what followed, far above what even attention and a moved target give."""
    built = planted.induction(seed=0)
    found = pb.panel(pb.load(built.model, built.tokenizer), texts(high=50))
    rows = by_name(found)
    for name in ("induction_highest", "previous_token_highest"):
        assert rows[name]["value"] > 0.9
        assert rows[name]["null"] < 0.3
    at = int(found["induction"].argmax())
    assert float(found["induction_null"].flatten()[at]) < 0.2
    assert close(rows["mass_mean"]["value"], 1.0)


def test_reference() -> None:
    """Every number is that of its finder, asked alone on the same texts."""
    model, stream = lent("llama"), [ids[: 14 + i] for i, ids in enumerate(texts())]
    found = pb.panel(model, stream, length=18, repeats=5, seed=2, batch_size=4)
    read = [ids[:18] for ids in stream]
    sinks = pb.find.attention_sinks(model, read)
    assert close(found.values, sinks["alpha"])
    assert close(found["alpha_uniform"], sinks["uniform"])
    assert close(found["previous_token"], pb.find.previous_token_heads(model, read).values)
    twice = said_twice(read, 5, 2)
    induction = pb.find.induction_heads(model, twice)
    assert close(found["induction"], induction.values)
    assert close(found["induction_null"], induction["null_high"])
    assert close(found["importance"], pb.find.head_importance(model, read, exact=0)["norm"])
    assert close(found["isotropy"], pb.find.isotropy(model, read).values[1:3])  # the first row is the embedding
    kl = torch.zeros(2, dtype=torch.float64)
    for ids in read:  # the last 13 positions before the last token, of all texts alike
        with torch.no_grad():
            out = model.hf(torch.tensor([ids[:-1]]), output_hidden_states=True)
            lens = model.hf.lm_head(model.hf.model.norm(out.hidden_states[1]))[0, -13:].log_softmax(-1)
            said = out.logits[0, -13:].log_softmax(-1)
        kl[0] += float((said.exp() * (said - lens)).sum(-1).mean()) / len(read)
    assert close(found["kl"], kl)
    rows = by_name(found)
    spread = found["importance"].std(correction=0) / found["importance"].mean()
    assert close(rows["importance_spread"]["value"], spread)
    assert rows["alpha_highest"]["value"] == float(found["alpha"].max())
    assert float(found["kl_mean"]) == rows["kl_mean"]["value"]


def test_null() -> None:
    """A model whose keys are 0 attends evenly: every reading of attention is its null, heads of one kind are near in size."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    with model.edited(*(pb.zero(layer.attn.k) for layer in model.layers)):
        rows = by_name(pb.panel(model, texts()))
    for name in ("alpha_highest", "previous_token_highest", "induction_highest", "alpha_mean", "previous_token_mean"):
        assert close(rows[name]["value"], rows[name]["null"])
    assert rows["importance_spread"]["value"] < 0.5


def test_strings_said_twice() -> None:
    """Tokens of the stream after what all texts begin with; two copies of one string, at distances that differ."""
    stream = [[1, *ids] for ids in texts(3, 30)]
    rows = said_twice(stream, 8, seed=1)
    seen = {token for ids in stream for token in ids}
    distances = set()
    for row in rows:
        assert row[0] == 1
        assert set(row) <= seen
        assert len(row) <= 31
        again = [at for at in range(1, len(row)) if row[at] in row[1:at]]
        distance = again[0] - row.index(row[again[0]])
        assert [row[at] for at in again] == [row[at - distance] for at in again]
        assert len(again) >= 5
        distances.add(distance)
    assert len(distances) > 2


def test_a_model_without_patterns_says_so() -> None:
    found = pb.panel(lent("mamba"), texts())
    assert bool(found.values.isnan().all())
    assert set(by_name(found)) == {"kl_mean", "isotropy_mean"}
    assert "sinks not read: attention_sinks needs attention patterns" in found.notes[0]


def test_what_no_panel_can_be_read_of() -> None:
    model = lent("llama")
    with pytest.raises(pb.PatchbayError, match="prompt 1 has 2 tokens; each text needs 4 or more"):
        pb.panel(model, [[5, 6, 7, 8], [5, 6]])
    with pytest.raises(pb.PatchbayError, match="length=2 and repeats=16"):
        pb.panel(model, texts(), length=2)
    found = pb.panel(model, [[5, 5, 5, 5, 5]])
    assert any("induction not read: 0 different tokens" in note for note in found.notes)
    assert "induction_highest" not in by_name(found)


def test_two_panels_differ_by_what_was_changed() -> None:
    """Replayed it is the same; a head that is scaled away is smaller."""
    model, stream = lent("llama"), texts()
    found = pb.panel(model, stream)
    assert pb.replay(found, model).agrees
    with model.edited(pb.scale(model.layers[0].heads[1].z, 0.0)):
        changed = pb.panel(model, stream)
    assert float(changed["importance"][0, 1]) == 0.0
    assert float(changed["importance_spread"]) > float(found["importance_spread"])
