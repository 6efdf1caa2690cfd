"""find.jacobian_lens: linear blocks multiply, the formula one derivative at a time, nothing added is the logit lens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.features import lens as lenses
from tests import given
from tests.lenses import VOCAB, D, answers, blocks, rotation, texts
from tests.shared import SHARED
from tests.tolerance import close

STORIES = SHARED / "models" / "stories260K"


def test_planted(tmp_path: Path) -> None:
    """J is the product of (I + W) of the blocks that are left, and its rows say what the model says."""
    one, two = 0.3 * rotation(1), rotation(2) - torch.eye(D)
    model = blocks(one, two)
    task = answers(model)
    found = pb.find.jacobian_lens(model, task, texts=texts(4), skip=2, folder=str(tmp_path / "lens"))
    kept = lenses.load(tmp_path / "lens", model, lenses.JACOBIAN).weight
    eye = torch.eye(D)
    assert close(kept[0].T, (eye + one) @ (eye + two))
    assert close(kept[1].T, eye + two)
    assert close(found["kl"], 0.0, of=10.0)
    assert (found["rank"][:, -1] == 0).all()
    assert close(found["agreement"], 1.0)
    assert (pb.find.logit_lens(model, task)["rank"][:2, -1] > 1).all()
    again = pb.find.jacobian_lens(model, task, folder=str(tmp_path / "lens"))
    assert again.agrees(found)


def test_reference() -> None:
    """d h_last[t'] / d h_l[t] summed over t' >= t, mean over t, one number of the stream at a time, on Hugging Face's GPT-2."""
    hf = given.gpt2(1, vocab_size=VOCAB)
    model, rows, skip = pb.load(hf), [*texts(1, 6, seed=1), *texts(1, 5, seed=2)], 2
    task = pb.Task("own", texts(3, 5), [4, 5, 6], [[1]] * 3)
    found = pb.find.jacobian_lens(model, task, texts=rows, skip=skip, positions=2)
    jacobian = torch.zeros(2, 32, 32)
    for ids in rows:
        for depth in (0, 1):
            seen: list[torch.Tensor] = []
            hooks = [
                hf.transformer.h[depth].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])),
                hf.transformer.ln_f.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])),
            ]
            hf(torch.tensor([ids]))
            for hook in hooks:
                hook.remove()
            valid = range(skip, len(ids) - 1)
            for t in valid:
                for later in (x for x in valid if x >= t):
                    for i in range(32):
                        one = torch.autograd.grad(seen[1][0, later, i], seen[0], retain_graph=True)[0]
                        jacobian[depth, i] += one[0, t] / len(valid) / len(rows)
    expected = torch.zeros(2, 2)
    for ids, right in zip(task.clean, task.right, strict=True):
        with torch.no_grad():
            states = hf(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
            for depth in (0, 1):
                for place in (-2, -1):
                    read = hf.lm_head(hf.transformer.ln_f(jacobian[depth] @ states[depth][0, place])).softmax(-1)
                    expected[depth, place] += read[right] / len(task)
    assert close(found.values[:2], expected)


@pytest.mark.parametrize("family", ["gemma2", "mamba2"])
def test_null(family: str) -> None:
    """Blocks that add nothing have J = I: the logit lens, bit for bit but for the product with I."""
    model = given.lent(family)
    task = given.pairs()
    silent = [
        pb.zero(port)
        for i in range(model.n_layers)
        for port in (f"L{i}.attn.out", f"L{i}.mlp.out")
        if port.partition(".")[2] in model.signals(i)
    ]
    with model.edited(*silent):
        found, plain = pb.find.jacobian_lens(model, task, texts=task.clean, skip=1), pb.find.logit_lens(model, task)
    assert close(found["agreement_rest"][:-1].nan_to_num(0.0), 0.0, of=1.0)
    for name in plain.variables:
        assert close(found[name], plain[name], of=plain["logit"])


def test_what_is_asked_wrongly_is_refused(tmp_path: Path) -> None:
    model, task = given.lent("gpt2"), given.pairs()
    folder = str(tmp_path / "lens")
    pb.find.jacobian_lens(model, task, texts=texts(2), skip=5, folder=folder)
    cases = [
        ("the lens is made of texts", {}),
        ("the lens is made of texts", {"folder": str(tmp_path / "none")}),
        ("no text has more than skip \\+ 1 = 17 tokens \\(the longest has 8\\)", {"texts": texts(2)}),
        ("skip=-1", {"texts": texts(2), "skip": -1}),
        ("other texts or another skip", {"texts": texts(2), "skip": 4, "folder": folder}),
    ]
    for message, options in cases:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.find.jacobian_lens(model, task, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the shared model {STORIES}")
def test_by_its_divergence_it_is_not_to_be_ranked() -> None:
    """An honest negative: at middle layers the logit lens is nearer to the next token, though halves of the texts agree."""
    model = pb.load(str(STORIES))
    starts = [
        "Once upon a time",
        "There was a dog",
        "Lily had a red",
        "One day, Tom",
        "The sun was",
        "A cat and a",
        "Mom said",
        "In the park",
    ]
    made = pb.run(model, starts, max_new_tokens=50)
    rows = [made.ids[i, :n].tolist() for i, n in enumerate(made.lengths.tolist())]
    asked = rows[4:]
    task = pb.Task("next", [r[:40] for r in asked], [r[40] for r in asked], [[]] * 4, metric="log_probability")
    found, plain = pb.find.jacobian_lens(model, task, texts=rows[:4]), pb.find.logit_lens(model, task)
    ours, theirs = found["kl"].mean(1), plain["kl"].mean(1)
    assert (ours[:2] < theirs[:2]).all()  # the embedding and the first layer
    assert (ours[2:-1] > theirs[2:-1]).all()
    assert (found["agreement"][1:] > 0.8).all()
    assert any("not to be ranked by kl" in note for note in found.notes)
