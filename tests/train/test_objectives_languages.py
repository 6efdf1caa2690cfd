"""Objectives of several languages: vectors shift logits by exactly U e and are dropped; the contrast by loops, values and gradients; their nulls."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.corpus.languages import clone, retrieved
from patchbay.tiny import lab
from patchbay.train._objectives import objective
from patchbay.train._objectives._objective import collated, learned
from patchbay.train._objectives.langsamp import NAMES
from patchbay.train._objectives.translico import contrast, pooled
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab, ended
from tests.tolerance import close

VOCAB = 12
DOCUMENT = [[1, 2], [3, 4, 5]]
PLAN = {"steps": 3, "batch_size": 4, "every": 1}


def small(clones: int = 2, seed: int = 0) -> pb.Model:
    return lab.small(VOCAB * clones, width=16, heads=2, mlp=16, positions=32, seed=seed)


def batch_of(clones: int = 2, n: int = 4) -> dict[str, torch.Tensor]:
    """Rows of clones in turn, of several lengths."""
    rng = random.Random(0)
    rows = [clone([rng.randrange(1, VOCAB) for _ in range(7 - i)], VOCAB, i % clones, clones) for i in range(n)]
    return collated([(row, list(row)) for row in rows])


def loss_of(text: str, model: pb.Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return objective(text).loss(model, model.hf, batch, learned(batch["labels"]))


# --- language and script vectors ----------------------------------------------------------------------


def test_vectors_start_at_nothing_and_shift_logits_by_their_own() -> None:
    text = f"langsamp:vocab={VOCAB},languages=2,scripts=2"
    model, batch, aim = small(4), batch_of(4), objective(text)
    with torch.no_grad():
        plain = model.hf(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        aim.adapt(model)
        assert close(loss_of(text, model, batch), loss_of("ntp", model, batch))
        for name in NAMES:
            getattr(model.hf, name).normal_(generator=torch.Generator().manual_seed(1))
        language, script, head = model.hf.language_vectors, model.hf.script_vectors, model.hf.lm_head.weight
        losses = []
        for i, row in enumerate(batch["labels"].tolist()):
            shift = head.double() @ (language[i // 2] + script[i % 2]).double()
            for t in range(1, len(row)):
                if row[t] != -100:
                    losses.append(-float(torch.log_softmax(plain[i, t - 1].double() + shift, 0)[row[t]]))
        assert close(float(loss_of(text, model, batch)), sum(losses) / len(losses), of=10.0, dtype=torch.float32)


def test_vectors_learn_and_are_dropped(tmp_path: Path) -> None:
    """Their gradient at 0 is U^T (p - one-hot), summed over the texts of a language; a checkpoint has none, and a run goes on with them."""
    text = f"langsamp:vocab={VOCAB}"
    model, batch = small(), batch_of()
    objective(text).adapt(model)
    with torch.enable_grad():
        model.hf.language_vectors.requires_grad_()
        n = learned(batch["labels"])
        [found] = torch.autograd.grad(loss_of(text, model, batch), [model.hf.language_vectors])
    with torch.no_grad():
        p = torch.softmax(model.hf(batch["input_ids"]).logits, -1)
        expected = torch.zeros_like(found)
        for i, row in enumerate(batch["labels"].tolist()):
            for t in range(1, len(row)):
                if row[t] != -100:
                    off = p[i, t - 1].clone()
                    off[row[t]] -= 1
                    expected[i % 2] += off @ model.hf.lm_head.weight / n
    assert close(found, expected)
    documents = [[[1 + i % 7, 2, 3, 4]] for i in range(20)]
    runs = [
        pb.train.variant(small(), documents, objective=text, seeds=1, folder=str(tmp_path / "runs"), plan=PLAN)
        for _ in range(2)
    ]
    assert torch.equal(runs[0]["by_run"], runs[1]["by_run"])
    opened = pb.load(tmp_path / "runs" / "variant-0")
    assert not [name for name in opened.hf.state_dict() if "vectors" in name]
    assert opened.fingerprint == runs[0].tables["runs"][0]["end"] != runs[0].tables["runs"][2]["end"]
    assert ", tied=0" not in text
    assert "tied=0" in " ".join(runs[0].notes)


def test_a_run_goes_on_with_its_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off in its third step, after checkpoints: the end is that of a run that was not."""
    from patchbay.train._plan import Rows

    share = {"objective": f"langsamp:vocab={VOCAB}", "seeds": 1, "plan": {**PLAN, "rate": 0.05}}
    documents = [[[1 + i % 7, 2, 3, 4]] for i in range(20)]
    whole = pb.train.variant(small(), documents, folder=str(tmp_path / "whole"), **share)
    own, calls = Rows.__getitem__, 0

    def dying(rows: Rows, place: int) -> object:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyError("cut off")
        return own(rows, place)

    monkeypatch.setattr(Rows, "__getitem__", dying)
    with pytest.raises(KeyError, match="cut off"):
        pb.train.variant(small(), documents, folder=str(tmp_path / "cut"), **share)
    again = pb.train.variant(small(), documents, folder=str(tmp_path / "cut"), **share)
    assert [row["end"] for row in again.tables["runs"]] == [row["end"] for row in whole.tables["runs"]]


def test_rows_are_read_in_their_shares_and_the_null_takes_vectors_from_elsewhere() -> None:
    aim = objective(f"langsamp:vocab={VOCAB},languages=3,share=0.6,scored=2")
    rows = [aim.row(DOCUMENT, random.Random(i))[0][0] // VOCAB for i in range(1500)]
    assert abs(rows.count(0) / 1500 - 0.6) < 0.05
    assert abs(rows.count(1) / 1500 - 0.2) < 0.05
    assert aim.told(DOCUMENT) == [1 + 24, 2 + 24, 3 + 24, 4 + 24, 5 + 24]
    model, null = small(3), objective(aim.null or "")
    null.adapt(model)
    with torch.no_grad():
        model.hf.language_vectors.copy_(torch.arange(3.0)[:, None].expand(3, 16))
        ids = torch.tensor([[1, 2], [13, 14], [27, 28]])
        assert aim.vectors(model, ids)[:, :, 0].tolist() == [[0, 0], [1, 1], [2, 2]]
        assert null.vectors(model, ids)[:, :, 0].tolist() == [[1, 1], [1, 1], [0, 0]]


# --- the contrast of scripts --------------------------------------------------------------------------


def by_loops(one: torch.Tensor, other: torch.Tensor, temperature: float) -> torch.Tensor:
    states, n, total = [*one, *other], len(one), torch.zeros((), dtype=torch.float64)
    for i, state in enumerate(states):
        chances = []
        for j, another in enumerate(states):
            if j != i:
                cosine = (state @ another) / (state.norm() * another.norm())
                chances.append((j == (i + n) % (2 * n), torch.exp(cosine / temperature)))
        total = total - torch.log(next(c for own, c in chances if own) / sum(c for _, c in chances))
    return total / (2 * n)


def test_the_contrast_by_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 6, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with torch.enable_grad():
        mine, loops = contrast(one, other, 0.3), by_loops(one, other, 0.3)
        assert close(mine, loops.float(), of=10.0)
        for a, b in zip(torch.autograd.grad(mine, [one, other]), torch.autograd.grad(loops, [one, other]), strict=True):
            assert close(a.float(), b.float())
    same = torch.ones(6, 4)
    assert float(contrast(same, same, 0.1)) == pytest.approx(math.log(11))  # 2 B - 1 alike
    far = torch.eye(6)
    assert float(contrast(far, far, 0.02)) < 1e-6


def test_a_text_and_its_transliteration() -> None:
    """Both sides' plain losses by themselves, padding in neither state nor loss, the null's partner another text."""
    model, batch = small(), batch_of()
    sides = [batch, objective(f"translico:vocab={VOCAB}").other(batch)]  # type: ignore[attr-defined]
    real = batch["attention_mask"].bool()
    assert sides[1]["input_ids"][real].tolist() == [
        (t + VOCAB) % (2 * VOCAB) for t in batch["input_ids"][real].tolist()
    ]
    assert sides[1]["labels"][~real].tolist() == [-100] * int((~real).sum())
    with torch.no_grad():
        plain = sum(float(loss_of("ntp", model, side)) for side in sides)
        assert close(
            float(loss_of(f"translico:vocab={VOCAB},weight=0", model, batch)), plain, of=10.0, dtype=torch.float32
        )
        states = []
        for side in sides:
            rows = [ids[mask].tolist() for ids, mask in zip(side["input_ids"], real, strict=True)]
            states.append(
                torch.stack(
                    [
                        model.hf(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0].mean(0)
                        for row in rows
                    ]
                )
            )
        for paired, other in ((1, states[1]), (0, states[1].roll(1, 0))):
            found = float(loss_of(f"translico:vocab={VOCAB},weight=2,paired={paired}", model, batch))
            assert close(found, plain + 2 * float(contrast(states[0], other, 0.1)), of=20.0, dtype=torch.float32)
    mask = torch.tensor([[1, 1, 0]])
    assert pooled(torch.tensor([[[1.0], [3.0], [100.0]]]), mask).tolist() == [[2.0]]


def test_translations_are_brought_together_by_the_contrast() -> None:
    """After a few steps the nearest state in the other script is the text's own, and not after the null's."""
    rng = random.Random(0)
    documents = [[[rng.randrange(1, VOCAB) for _ in range(8)]] for _ in range(24)]
    how = plan_of({"steps": 25, "batch_size": 12, "rate": 0.03, "held": 0.0})
    share, rates = Lab(small(), documents, documents, how), []
    for paired in (1, 0):
        model = ended(share, Arm(f"translico:vocab={VOCAB},weight=3,paired={paired}"), 0)
        sides = [
            pb.corpus.selection.states(model, [clone(d[0], VOCAB, i, 2) for d in documents], layer=0) for i in (0, 1)
        ]
        rates.append(float(retrieved(*sides).double().mean()))
    assert rates[0] > 0.7
    assert rates[1] < 0.3


def test_retrieval_sees_no_constant() -> None:
    states = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    assert retrieved(states, states + 7.0).all()
    assert int(retrieved(states, states.roll(1, 0)).sum()) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("langsamp:vocab=12,languages=1", "two clones or more"),
        ("langsamp:vocab=12,scored=2", "which clone is scored"),
        ("langsamp:vocab=100", "make one of 200"),
        ("translico:vocab=12,temperature=0", "a temperature above 0"),
        ("translico:vocab=100", "make one of 200"),
    ],
)
def test_what_cannot_be(text: str, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        objective(text).adapt(small())


def test_one_text_has_no_other() -> None:
    with pytest.raises(pb.PatchbayError, match="two rows or more"):
        loss_of(f"translico:vocab={VOCAB}", small(), batch_of(n=1))
    with pytest.raises(pb.PatchbayError, match="the same two texts or more"):
        retrieved(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(pb.PatchbayError, match="one behind the other"):
        clone([25], 12, 0, 2)
