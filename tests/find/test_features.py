"""Features: the planted one leads, effects are the gradient's as loops and sum to the whole, and nothing where rows say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchbay as pb
from tests import given
from tests.features.given import crosscoder, dictionary, layers
from tests.tolerance import close


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return given.lent("gpt2")


def test_planted(model: pb.Model) -> None:
    """One feature writes the difference of the answers' rows, as they are read; the others write what no answer reads."""
    task = pb.Task("one", [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]], [20] * 3, [[21]] * 3)
    it = dictionary(model, "L1.resid_out", n=24)
    answer = (model.unembed.weight[20] - model.unembed.weight[21]).detach() * model.final_norm_module.weight.detach()
    answer = answer - answer.mean()
    rows = it.W_dec - (it.W_dec @ answer)[:, None] * answer / answer.pow(2).sum()
    rows[7] = 3 * answer / answer.norm()
    it = pb.Dictionary(it.W_enc.index_fill(1, torch.tensor(7), 0.0), rows, it.b_enc + 1.0, it.b_dec, layer=1)
    view = model.with_dictionaries(it)
    result = pb.find.features(view, task, "L1.features", draws=10)
    assert str(result.top(1)[0]) == "L1.F7"
    assert float(result["effect"][7]) > float(result["effect"].abs().sort().values[-2]) * 1.2
    cells = result.tables["cells"]
    assert [abs(row["effect"]) for row in cells] == sorted((abs(row["effect"]) for row in cells), reverse=True)
    assert {row["position"] for row in result.tables["cells"] if row["part"] == "L1.F7"} == {3}, (
        "the answer is read there"
    )


def test_reference(model: pb.Model) -> None:
    """d score / d signal from Hugging Face's own modules by autograd, feature by feature and token by token."""
    it = dictionary(model, "L0.resid_out", form="topk", k=6, subtract=True)
    task = given.pairs()
    result = pb.find.features(model.with_dictionaries(it), task, "L0.features", draws=2, batch_size=2)
    total = torch.zeros(len(task), 3, dtype=torch.float64)
    expected = torch.zeros(len(task), it.n_features, dtype=torch.float64)
    for p, ids in enumerate(task.clean):
        held: list[torch.Tensor] = []

        def leaf(_: object, __: object, out: object, held: list[torch.Tensor] = held) -> object:
            x = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_()  # type: ignore[attr-defined,index]
            held.append(x)
            return (x, *out[1:]) if isinstance(out, tuple) else x

        hook = model.hf.transformer.h[0].register_forward_hook(leaf)
        logits = model.hf(torch.tensor([list(ids)])).logits[0, -1]
        hook.remove()
        score = logits[task.right[p]] - torch.stack([logits[w] for w in task.wrong[p]]).mean()  # type: ignore[index]
        (g,) = torch.autograd.grad(score, held[0])
        for t in range(len(ids)):
            x, slope = held[0][0, t].detach(), g[0, t]
            z = it.encode(x)
            expected[p] += torch.stack([z[i] * (it.W_dec[i] @ slope) for i in range(it.n_features)])
            e = x - it.decode(z, x)
            total[p] += torch.stack([e @ slope, it.b_dec @ slope, x @ slope])
    assert close(result["effect"].float(), expected.mean(0))
    for column, name in enumerate(("error", "bias", "total")):
        assert close(torch.as_tensor(float(result[name])), total[:, column].mean(), of=total.abs().max()), name
    assert close(
        float(result["effect"].sum() + result["error"] + result["bias"]), float(result["total"]), of=total.abs().max()
    )
    active = [(pb.run(model, [ids], taps=["L0.resid_out"])["L0.resid_out"][0]) for ids in task.clean]
    shares = torch.stack([(it.encode(x) > 0).double().sum(0) for x in active]).sum(0) / sum(map(len, task.clean))
    assert close(result["active"].float(), shares)


def test_null(model: pb.Model) -> None:
    """Rows of length 0 have no effect, and of shuffled rows few pass the bound that shuffled rows make."""
    it = dictionary(model, "L1.resid_out")
    silent = pb.Dictionary(it.W_enc, torch.zeros_like(it.W_dec), it.b_enc, it.b_dec, layer=1)
    nothing = pb.find.features(model.with_dictionaries(silent), given.pairs(), "L1.features", draws=2)
    assert float(nothing["effect"].abs().max()) == float(nothing["null_high"]) == 0
    above = []
    for seed in range(6):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        turned = pb.Dictionary(it.W_enc, it.W_dec[order], it.b_enc, it.b_dec, layer=1)
        found = pb.find.features(model.with_dictionaries(turned), given.pairs(), "L1.features", draws=40, seed=seed)
        above.append(bool((found["effect"].abs() > found["null_high"]).any()))
    assert sum(above) <= 2


def test_with_steps_effects_sum_to_what_is_lost_without_any_feature(model: pb.Model) -> None:
    view = model.with_dictionaries(dictionary(model, "L1.resid_out"))
    off = []
    for steps in (2, 8, 32):
        found = pb.find.features(view, given.pairs(), "L1.features", steps=steps, draws=1)
        off.append(abs(float(found["effect"].sum() - found["gap"])))
    size = abs(float(found["gap"]))
    assert off[2] < 0.01 * size
    assert off[2] < off[0]
    without = pb.run(view, given.pairs(), edits=[pb.zero("L1.features.act")])
    scores = [given.pairs().score(trace.last_logits) for trace in (pb.run(view, given.pairs()), without)]
    assert close(found["gap"], (scores[0] - scores[1]).mean(), of=scores[0])


def test_removed_is_what_the_score_loses_without_a_feature(model: pb.Model) -> None:
    view, task = model.with_dictionaries(dictionary(model, "L1.resid_out")), given.pairs()
    found = pb.find.features(view, task, "L1.features", exact=3, draws=1)
    some = found["removed"].isfinite().nonzero()[:, 0].tolist()
    assert len(some) == 3
    base = task.score(pb.run(view, task).last_logits)
    for i in some:
        lost = base - task.score(pb.run(view, task, edits=[pb.zero(f"L1.F{i}.act")]).last_logits)
        assert close(found["removed"][i], lost.mean(), of=base)


def test_a_transcoder_a_crosscoder_and_normalised_tokens(model: pb.Model, tmp_path: Path) -> None:
    for at, it in (
        ("L0.mlp_features", dictionary(model, "L0.mlp.in to L0.mlp.out")),
        ("L1.features", crosscoder(model.d_model, (0, 1))),
        ("L1.attn_features", dictionary(model, "L1.attn.z", normalise="layer_norm")),
    ):
        found = pb.find.features(model.with_dictionaries(it), given.pairs(), at, draws=1)
        whole = found["effect"].sum() + found["error"] + found["bias"]
        assert close(float(whole), float(found["total"]), of=found["effect"])
    folder = str(dictionary(model, "L1.resid_out").save(tmp_path / "a"))
    again = pb.find.features(model, given.pairs(), folder, draws=1)
    assert pb.replay(again, model=model).agrees


def test_what_cannot_be_right_is_refused(model: pb.Model) -> None:
    view, task = model.with_dictionaries(dictionary(model, "L1.resid_out")), given.pairs()
    with pytest.raises(pb.PatchbayError, match="write in several layers"):
        pb.find.features(model.with_dictionaries(layers(model.d_model, (0, 1))), task, "L0.mlp_features")
    with pytest.raises(pb.PatchbayError, match="has no gradient"):
        pb.find.features(view, task.with_metric("accuracy"), "L1.features")
    with pytest.raises(pb.PatchbayError, match="kl is at its lowest"):
        pb.find.features(view, task.with_metric("kl"), "L1.features")
    with pytest.raises(pb.PatchbayError, match="all of one that is attached"):
        pb.find.features(view, task, "L1.F3")
    with pytest.raises(pb.PatchbayError, match="steps=0"):
        pb.find.features(view, task, "L1.features", steps=0)


def test_one_backward_pass_whatever_the_number_of_features_and_positions(
    model: pb.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = torch.autograd.grad

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", counted)
    task = pb.Task("long", [list(range(3, 35))], [20], [[21]])
    pb.find.features(model.with_dictionaries(dictionary(model, "L1.resid_out", n=200)), task, "L1.features", draws=1)
    assert len(calls) == 1
