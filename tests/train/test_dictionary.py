"""`train.dictionary`: planted directions are found, sums are those of plain loops, nothing is found where nothing was planted."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import patchbay as pb
from patchbay.features.load import fvu
from patchbay.train import _allocation, _fitting, _stream
from patchbay.train._places import places_of
from tests import given
from tests.tolerance import close

TEXTS = torch.randint(3, 120, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()
SMALL: dict[str, Any] = {"n_features": 24, "sparsity": 2, "steps": 8}


def planted(n: int = 16, *, sparse: bool = True) -> tuple[pb.Model, Tensor]:
    """A model whose token embeddings are each two of `n` directions, or as large a normal vector; and the directions."""
    hf = given.gpt2(0, vocab_size=120)
    draw = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(n, 32, generator=draw), dim=1)
    pairs = torch.stack([torch.randperm(n, generator=draw)[:2] for _ in range(120)])
    sizes = torch.rand(120, 2, generator=draw) + 0.5
    table = (rows[pairs] * sizes[..., None]).sum(1) if sparse else torch.randn(120, 32, generator=draw) / 4
    hf.transformer.wte.weight.data.copy_(table)
    hf.transformer.wpe.weight.data.zero_()
    return pb.load(hf), rows


def found(it: pb.Dictionary, truth: Tensor) -> Tensor:
    """Cosines of directions with features, one to one."""
    cosines = truth @ torch.nn.functional.normalize(it.W_dec, dim=1).T
    return cosines[linear_sum_assignment(-cosines.numpy())]


@pytest.mark.parametrize(
    "form", ["topk", *(pytest.param(form, marks=pytest.mark.slow) for form in ("batchtopk", "feature_choice"))]
)
def test_planted(form: str, tmp_path: Path) -> None:
    model, truth = planted()
    result = pb.train.dictionary(
        model,
        TEXTS,
        "L0.resid_in",
        form=form,
        n_features=24,
        sparsity=2,
        steps=200,
        folder=str(tmp_path / "a"),
    )
    it = pb.load_dictionary(tmp_path / "a", model=model, texts=TEXTS)
    assert float((found(it, truth) > 0.9).double().mean()) > 0.7
    assert float(result["value"]) < 0.35 < float(result["null"])
    assert abs(float(result["l0"]) - 2) < 1


def test_null(tmp_path: Path) -> None:
    model, truth = planted(sparse=False)
    pb.train.dictionary(
        model,
        TEXTS,
        "L0.resid_in",
        n_features=24,
        sparsity=2,
        steps=100,
        folder=str(tmp_path / "a"),
    )
    it = pb.load_dictionary(tmp_path / "a")
    assert float((found(it, truth) > 0.9).double().mean()) == 0


def test_reference(tmp_path: Path) -> None:
    """What is reported is the saved dictionary's, token by token."""
    model, _ = planted()
    result = pb.train.dictionary(model, TEXTS, "L1.resid_out", folder=str(tmp_path / "a"), **SMALL)
    it = pb.load_dictionary(tmp_path / "a")
    assert it.digest == result.provenance["dictionary"]["digest"]
    held = [TEXTS[i] for i in _stream.shuffled(24, 0, "held out")[:2]]
    tokens = pb.run(model, held, taps=["L1.resid_out"])["L1.resid_out"][:, 1:].flatten(0, 1)
    mean = sum(tokens) / len(tokens)
    off = spread = active = 0.0
    ever = set()
    used = torch.zeros(24)
    for x in tokens:
        pre = (x - it.b_dec) @ it.W_enc + it.b_enc
        kept = [i for i in pre.argsort(descending=True).tolist()[:2] if pre[i] > 0]
        rebuilt = it.b_dec + sum((pre[i] * it.W_dec[i] for i in kept), torch.zeros(32))
        off, spread, active = (
            off + float(((x - rebuilt) ** 2).sum()),
            spread + float(((x - mean) ** 2).sum()),
            active + len(kept),
        )
        ever |= set(kept)
        used[kept] += 1
    assert close(result["value"], off / spread)
    assert close(result["l0"], active / len(tokens))
    assert close(result["dead"], 1 - len(ever) / 24)
    assert close(result["zipf"], _allocation.exponent(used))
    told = [pb.train.dictionary(model, TEXTS, "L1.resid_out", form=form, **SMALL) for form in ("topk", "topk zipf 0")]
    assert told[0].provenance["dictionary"]["digest"] == it.digest != told[1].provenance["dictionary"]["digest"]


def test_budgets_are_shared_out_as_each_form_says() -> None:
    value = torch.rand(7, 5, generator=torch.Generator().manual_seed(2)) + 0.1
    density = torch.tensor([0.1, 0.5, 0.2, 0.0, 0.3])
    by_token = _allocation.kept("topk", value, 2, density)
    assert by_token.tolist() == [[v in sorted(row)[-2:] for v in row] for row in value.tolist()]
    of_all = _allocation.kept("batchtopk", value, 2, density)
    assert of_all.sum() == 14
    assert float(value[of_all].min()) >= float(value[~of_all].max())
    tied = torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    assert _allocation.kept("batchtopk", tied, 1, density[:2]).tolist() == [[True, True], [False, False]], (
        "of equal ones the first, no more than the budget"
    )
    one = value[:1]
    assert torch.equal(_allocation.kept("batchtopk", one, 2, density), _allocation.kept("topk", one, 2, density))
    counts = _allocation.shares(density, 7, 2)
    assert counts.sum() == 14
    assert counts.argsort(descending=True, stable=True).tolist()[:3] == [1, 4, 2], "the densest have most"
    by_feature = _allocation.kept("feature_choice", value, 2, density)
    assert torch.equal(by_feature.sum(0), counts)
    for column, on in zip(value.T, by_feature.T, strict=True):
        assert not bool(on.any()) or bool(on.all()) or float(column[on].min()) >= float(column[~on].max())
    order = torch.tensor([3, 1, 0, 2, 6, 5, 4])
    assert torch.equal(_allocation.kept("feature_choice", value[order], 2, density), by_feature[order])
    assert _allocation.shares(density, 3, 5).tolist() == [3] * 5, "no feature keeps more than there are tokens"


def test_features_are_to_be_used_by_zipfs_law() -> None:
    """Shares, shortfalls and the fitted exponent, as plain loops."""
    density = torch.tensor([0.1, 0.9, 0.2, 0.0, 0.6])
    weight = {i: (rank + 1) ** -0.7 for rank, i in enumerate([1, 4, 2, 0, 3])}
    total = sum(weight.values())
    targets = [min(2 * weight[i] / total, 1.0) for i in range(5)]
    lack = [max(0.0, 1 - float(density[i]) / targets[i]) for i in range(5)]
    assert close(_allocation.shortfall(density, 2, 0.7, density), torch.tensor(lack))
    assert lack[3] == 1.0 > lack[0] > 0.0 == lack[1]
    assert _allocation.shares(density, 10, 2, 0.0).tolist() == [4] * 5, "an exponent of 0 is the same for all"
    assert _allocation.shares(density, 10, 2, 3.0).tolist()[1] == 10
    used = 1e6 * torch.arange(1, 65).double() ** -1.3
    assert close(_allocation.exponent(used[torch.randperm(64)]), 1.3)
    assert close(_allocation.exponent(torch.ones(64)), 0.0, of=1.0)


def test_what_is_used_too_little_rebuilds_the_error_and_silent_features_do_as_without_a_law() -> None:
    model, _ = planted()
    places = places_of(model, "L0.resid_in")
    x = pb.run(model, TEXTS, taps=["L0.resid_in"])["L0.resid_in"][:, 1:].flatten(0, 1)
    made = [
        _fitting.Fitting(_fitting.Plan("batchtopk", 24, 2, 0.0, 9, 1e-3, 64, 0, zipf), x, x, places)
        for zipf in (None, 0.7)
    ]
    losses = []
    for fitting in made:
        fitting.step, fitting.density = 5, torch.full((24,), 1.0)
        fitting.density[20:] = 0.0
        fitting.silent[20:] = _fitting.PATIENCE + 1.0
        pre = fitting._pre(x / fitting.scale_in)
        error = x / fitting.scale_out - fitting._said(pre)[0]
        losses.append(fitting._revived(pre, error, x))
    assert torch.equal(losses[0], losses[1]), "dead ones and ones in full use: aux_k"
    it = made[1]
    it.silent.zero_()
    it.density[:20] = 0.01
    lack = _allocation.shortfall(it.density, 2, 0.7, it.density)
    assert 0 < float(lack[:20].min()) < float(lack[20:].min()) == 1.0
    expected = 0.0
    with torch.no_grad():
        for row, left in zip(pre.relu(), error, strict=True):
            best = row.argsort(descending=True, stable=True)[:16].tolist()
            rebuilt = sum(((row[i] * lack[i]) * it.tensors["W_dec"][i] for i in best), torch.zeros(32))
            expected += float((left - rebuilt).pow(2).mean()) / len(error) / 32
    assert close(it._revived(pre, error, x), expected)


def test_features_are_ranked_by_what_a_whole_batch_would_keep() -> None:
    """In feature choice: shares and shortfalls go by how often each is among the largest of all, and not by what it keeps."""
    model, _ = planted()
    places = places_of(model, "L0.resid_in")
    x = pb.run(model, TEXTS, taps=["L0.resid_in"])["L0.resid_in"][:, 1:].flatten(0, 1)
    it = _fitting.Fitting(_fitting.Plan("feature_choice", 24, 2, 0.0, 9, 1e-3, 64, 0, 0.7), x, x, places)
    demand = [0.0] * 24
    for step, batch in enumerate((x[:40], x[40:104])):
        it.step = step
        with torch.no_grad():
            pre = it._pre(batch / it.scale_in)
            on = it._said(pre)[1] > 0
        every = pre.relu().tolist()
        least = sorted((value for row in every for value in row), reverse=True)[2 * len(batch) - 1]
        for i in range(24):
            share = sum(row[i] >= least for row in every) / len(batch)
            demand[i] += (0.01 if step else 1.0) * (share - demand[i])
        it.density = torch.tensor(demand).max() - torch.tensor(demand)  # the other way round
        counts = _allocation.shares(it.demand, len(batch), 2)
        assert torch.equal(on.sum(0), counts.minimum((pre > 0).sum(0)))
        assert close(it.demand, torch.tensor(demand))
    targets = 2 * _allocation.law(it.demand, 0.7)
    lack = [max(0.0, 1 - float(it.density[i]) / min(1.0, float(targets[i]))) for i in range(24)]
    assert close(it._lack(), torch.tensor(lack))


def test_thresholds_learn_by_the_papers_pseudo_gradients() -> None:
    pre = torch.tensor([[0.25, 0.9], [0.35, 0.31]], requires_grad=True)
    theta = torch.tensor([0.3, 0.3], requires_grad=True)
    z, on = _allocation.Jump.apply(pre, theta, 0.2)
    assert z.tolist() == [[0.0, pre[0, 1].item()], [pre[1, 0].item(), pre[1, 1].item()]]
    g, c = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.5], [0.25, 0.25]])
    ((z * g).sum() + (on * c).sum()).backward()
    assert pre.grad is not None
    assert theta.grad is not None
    assert close(pre.grad, torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    near = [-(0.3 * 1 + 0.3 * 3) / 0.2 - (0.5 + 0.25) / 0.2, -(0.3 * 4) / 0.2 - 0.25 / 0.2]
    assert close(theta.grad, torch.tensor(near))


@pytest.mark.parametrize(
    "form", ["relu", *(pytest.param(form, marks=pytest.mark.slow) for form in ("jumprelu", "gated"))]
)
def test_other_forms_rebuild_and_are_saved_as_they_were_trained(form: str, tmp_path: Path) -> None:
    model, _ = planted()
    more: dict[str, Any] = {"sparsity": 4 if form == "jumprelu" else 0.02, "steps": 100, "n_features": 24}
    result = pb.train.dictionary(model, TEXTS, "L0.resid_in", form=form, folder=str(tmp_path / "a"), **more)
    it = pb.load_dictionary(tmp_path / "a", model=model, texts=TEXTS)
    assert float(result["value"]) < 0.5
    assert it.form == ("relu" if form == "relu" else "jumprelu")


@pytest.mark.slow
def test_a_transcoder_rebuilds_what_is_written_from_what_is_read(tmp_path: Path) -> None:
    model, _ = planted()
    at = "L0.mlp.in to L0.mlp.out"
    result = pb.train.dictionary(
        model,
        TEXTS,
        at,
        form="batchtopk",
        n_features=48,
        sparsity=8,
        steps=250,
        folder=str(tmp_path / "a"),
    )
    it = pb.load_dictionary(tmp_path / "a", model=model, texts=TEXTS)
    assert (it.reads, it.writes, it.subtract) == ("mlp.in", "mlp.out", False)
    assert float(result["value"]) < 0.5 < float(result["null"])


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = planted()
    monkeypatch.setattr(sys.modules["patchbay.train.dictionary"], "EVERY", 3)
    how = {**SMALL, "form": "batchtopk", "at": "L0.resid_in"}
    pb.train.dictionary(model, TEXTS, folder=str(tmp_path / "whole"), **how)
    saved = _fitting.Fitting.save

    def stopped(self: Any, path: Path, request: str) -> None:
        saved(self, path, request)
        if self.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(_fitting.Fitting, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            pb.train.dictionary(model, TEXTS, folder=str(tmp_path / "half"), **how)
    assert not (tmp_path / "half").exists()
    with pytest.raises(pb.PatchbayError, match="of a training with other texts, model or options"):
        pb.train.dictionary(model, TEXTS, folder=str(tmp_path / "half"), **{**how, "sparsity": 3})
    again = pb.train.dictionary(model, TEXTS, folder=str(tmp_path / "half"), **how)
    assert [row["step"] for row in again.tables["steps"]] == [7, 8]
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["half", "whole"], "the state is gone"


def test_the_stream_goes_on_from_any_step_and_serves_every_token(tmp_path: Path) -> None:
    model, _ = planted()
    places = places_of(model, "L0.resid_in")
    source, every = _stream.Source([model], TEXTS, places), range(24)
    whole = [x for x, _ in zip(_stream.batches(source, every, 20, 60, 3), range(12), strict=False)]
    later = next(_stream.batches(source, every, 20, 60, 3, skip=7))
    assert torch.equal(later[0], whole[7][0])
    block = next(source.blocks(every, 60, 3))
    assert len(block) == 6, "as many as fill the buffer"
    seen = pb.run(model, [TEXTS[i] for i in block], taps=places.ports)["L0.resid_in"][:, 1:].flatten(0, 1)
    served = torch.cat([x for x, _ in whole[:3]])
    assert all(bool((seen == row).all(1).any()) for row in served)
    assert len(served) == 60


def test_a_trace_on_disk_gives_the_same_dictionary_signal_by_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = planted()
    at, folder = "L0.mlp.in to L0.mlp.out", tmp_path / "trace"
    trace = pb.run(model, TEXTS, taps=["L0.mlp.in", "L0.mlp.out"], folder=folder, logits=None)
    stored, live = (_stream.source_of([model], given_, places_of(model, at)) for given_ in (str(folder), TEXTS))
    for a, b in zip(stored.of([5, 2, 9]), live.of([5, 2, 9]), strict=True):
        assert close(a, b)
    monkeypatch.setattr(type(trace), "prompts_of_shards", [list(range(8)), list(range(8, 24))])
    blocks = stored.blocks(range(2, 24), 60, 0)
    assert sorted(map(len, (next(blocks), next(blocks)))) == [6, 16], "a block is what a shard has of them"
    assert len(next(stored.blocks(range(2, 24), 70, 0))) in (16, 22), "or several, where one has too few tokens"
    pb.train.dictionary(model, str(folder), at, form="batchtopk", folder=str(tmp_path / "a"), **SMALL)
    assert pb.load_dictionary(tmp_path / "a").transcodes
    with pytest.raises(pb.PatchbayError, match="a topk transcoder(?s:.)*form='batchtopk' is saved as jumprelu"):
        pb.train.dictionary(model, TEXTS, at, folder=str(tmp_path / "b"), n_features=24, steps=10**9)
    with pytest.raises(pb.PatchbayError, match=r"holds L0.mlp.in, L0.mlp.out, and not L1.resid_out"):
        pb.train.dictionary(model, str(folder), "L1.resid_out", **SMALL)
    with pytest.raises(pb.PatchbayError, match="made with another model"):
        pb.train.dictionary(pb.load(given.gpt2(3, vocab_size=120)), str(folder), at, **SMALL)


@pytest.mark.parametrize("form", ["batchtopk", *(pytest.param(form, marks=pytest.mark.slow) for form in ("topk", "relu", "jumprelu", "gated", "feature_choice"))])  # fmt: skip
def test_what_several_layers_make_is_saved_and_attached(form: str, tmp_path: Path) -> None:
    """Crosscoders and cross-layer transcoders of every form: the file computes what was measured."""
    model, _ = planted()
    how: dict[str, Any] = {"form": form, "n_features": 24, "steps": 30}
    how |= {} if form in ("relu", "gated") else {"sparsity": 3}
    for name, at in (
        ("cross", "L0.resid_out, L1.resid_out"),
        ("layers", "L0.mlp.in to L0.mlp.out, L1.mlp.in to L1.mlp.out"),
    ):
        result = pb.train.dictionary(model, TEXTS, at, folder=str(tmp_path / name), **how)
        it = pb.load_dictionary(tmp_path / name)
        held = [TEXTS[i] for i in _stream.shuffled(24, 0, "held out")[:2]]
        assert close(result["value"], fvu(it, model, held)), "each site by its own variance"
        view = model.with_dictionaries(it)
        home = "L1.features" if name == "cross" else "L1.mlp_features"
        assert torch.equal(pb.run(view, held, edits=[pb.scale(f"{home}.act", 1.0)]).logits, pb.run(model, held).logits)
    assert it.onward is not None
    assert bool((it.onward != 0).any())


def test_identical_models_share_every_feature(tmp_path: Path) -> None:
    model, _ = planted()
    model.hf.save_pretrained(tmp_path / "same")
    at = f"L0.resid_in with {tmp_path / 'same'}"
    result = pb.train.dictionary(model, TEXTS, at, form="batchtopk", n_features=24, sparsity=2, steps=20)  # fmt: skip
    half = torch.full((24,), 0.5)
    assert close(result["relative"], half, dtype=torch.float32, noise=256), "20 steps of two equal halves"
    for name in ("the first model", "the other"):
        assert f"0 of {name} alone (0 by" in str(result.notes)
    with pytest.raises(pb.PatchbayError, match="features of two models are parts of neither"):
        pb.train.dictionary(model, TEXTS, at, folder="/nowhere", **SMALL)
    with pytest.raises(pb.PatchbayError, match="one signal of one layer is read in each"):
        pb.train.dictionary(model, TEXTS, at.replace("L0.resid_in", "L0.resid_in, L1.resid_in"), **SMALL)
    given.gpt2(0).save_pretrained(tmp_path / "other")
    with pytest.raises(pb.PatchbayError, match="a second model of the same tokens; .* has 40 and this one 120"):
        pb.train.dictionary(model, TEXTS, f"L0.resid_in with {tmp_path / 'other'}", **SMALL)


@pytest.mark.slow
def test_a_direction_of_one_model_alone_is_the_one_feature_of_it(tmp_path: Path) -> None:
    model, _ = planted()
    hf = copy.deepcopy(model.hf)
    draw = torch.Generator().manual_seed(9)
    extra = torch.nn.functional.normalize(torch.randn(32, generator=draw), dim=0)
    some = torch.randperm(120, generator=draw)[:40]
    hf.transformer.wte.weight.data[some] += 1.2 * extra
    hf.save_pretrained(tmp_path / "tuned")
    at = f"L0.resid_in with {tmp_path / 'tuned'}"
    result = pb.train.dictionary(model, TEXTS, at, form="batchtopk", n_features=24, sparsity=3, steps=500)
    relative, density, row = (result[name] for name in ("relative", "density", "row"))
    active = density > 0.01
    own = (relative > 0.9) & active
    assert int(own.sum()) == 1
    cosine = torch.nn.functional.cosine_similarity(row[1][own][0], extra, dim=0)
    assert float(cosine) > 0.9
    assert float(relative[own]) > 0.97
    assert float((relative[active & ~own] - 0.5).abs().max()) < 0.2
    assert "1 of the other alone" in str(result.notes)


RUN = """
import sys, torch, torch.distributed as dist, patchbay as pb
from patchbay.train import dictionary
from tests.train.test_dictionary import TEXTS, planted
rank, world, folder, form = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=world)
sys.modules["patchbay.train.dictionary"].EVERY = 5
model, _ = planted()
steps = int(sys.argv[5])
dictionary(model, TEXTS, "L0.resid_in", form=form, n_features=24, sparsity=2, steps=steps, folder=folder)
"""


def started(rank: int, world: int, folder: Path, form: str, steps: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", RUN, str(rank), str(world), str(folder), form, str(steps)]
    return subprocess.Popen(
        words, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    )


def ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; one that takes longer than a busy machine explains is stopped."""
    try:
        return process.wait(900)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["batchtopk", "jumprelu"])
def test_two_processes_make_the_dictionary_of_one(form: str, tmp_path: Path) -> None:
    """Under gloo, within 1e-6 of the largest number, or nothing: gradients, budget and thresholds are of the whole batch."""
    pairs = [started(rank, 2, tmp_path / "two", form, 12) for rank in (0, 1)]
    assert [ended(one) for one in pairs] == [0, 0]
    assert ended(started(0, 1, tmp_path / "one", form, 12)) == 0
    two, one = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("two", "one"))
    for name, value in one.items():
        assert float((two[name] - value).abs().max()) <= 1e-6 * float(value.abs().max()), name


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert ended(started(0, 1, tmp_path / "whole", "batchtopk", 400)) == 0
    state = tmp_path / "half.training.safetensors"
    process = started(0, 1, tmp_path / "half", "batchtopk", 400)
    while not state.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert state.exists()
    assert not (tmp_path / "half").exists(), "killed before its end"
    assert ended(started(0, 1, tmp_path / "half", "batchtopk", 400)) == 0
    for name in ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sparsity": 40}, "no more active features than there are"),
        ({"steps": 0}, "1 or more"),
        ({"sparsity": 2.5}, "a whole number of active features"),
        ({"form": "best"}, "form='best'"),
        ({"at": "L0.H1.z"}, "one signal of a layer"),
        ({"at": "L9.resid_out"}, "layers 0..1"),
        ({"form": "gated zipf 0.7", "sparsity": 0.1}, "gated keeps no number of activations"),
        ({"form": "topk zipf -0.5"}, "the exponent, 0 to 20"),
        ({"form": "topk zipf much"}, "the exponent, 0 to 20"),
        ({"form": "topk zipf "}, "the exponent, 0 to 20"),
    ],
)
def test_what_cannot_be_trained_is_refused(more: dict[str, Any], said: str) -> None:
    model, _ = planted()
    with pytest.raises(pb.PatchbayError, match=said):
        pb.train.dictionary(model, TEXTS, **{"at": "L0.resid_in", **SMALL, **more})
    with pytest.raises(pb.PatchbayError, match="no text has two"):
        pb.train.dictionary(model, [[3], [4]], "L0.resid_in", **SMALL)
