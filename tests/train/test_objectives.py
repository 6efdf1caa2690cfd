"""Objectives of train.variant: what documents become, and what is minimised, by plain counting; the null that each names."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import patchbay as pb
from patchbay.tiny import lab, twins
from patchbay.train import _objectives as folder
from patchbay.train._objectives import names, objective
from patchbay.train._objectives._objective import collated, learned
from patchbay.train._objectives.infill import corrupted, restored
from patchbay.train._objectives.inverse_rl import rewards
from patchbay.train._objectives.spt import permuted
from tests.tolerance import close

SETTINGS = {
    "cloned": "cloned:vocab=10",
    "infill": "infill:vocab=20",
    "label-supervision": "label-supervision:classes=1+2",
    "langsamp": "langsamp:vocab=10",
    "translico": "translico:vocab=10",
}
DOCUMENT = [[5, 6], [1], [7, 8, 9], [2], [3, 4]]


def test_each_file_is_an_objective_of_its_name() -> None:
    assert names() == sorted(path.stem.replace("_", "-") for path in Path(folder.__file__).parent.glob("[a-z]*.py"))
    for name in names():
        aim = objective(SETTINGS.get(name, name))
        assert aim.null is None or objective(aim.null).null is None
        assert objective(aim.twin)


# --- semantic permutation -----------------------------------------------------------------------------


def test_permuted_units_keep_their_tokens_in_order() -> None:
    draw = random.Random(0)
    for way in ("kept", "reversed", "shuffled"):
        found = permuted(DOCUMENT, way, draw)
        assert Counter(map(tuple, found)) == Counter(map(tuple, DOCUMENT))
    assert permuted(DOCUMENT, "kept", draw) == DOCUMENT
    assert permuted(permuted(DOCUMENT, "reversed", draw), "reversed", draw) == DOCUMENT
    assert permuted(DOCUMENT, "reversed", draw)[0] == [3, 4]
    assert permuted(DOCUMENT, "tokens", draw) == [[4, 3, 2, 9, 8, 7, 1, 6, 5]]


def test_shares_of_ways_are_those_that_were_asked() -> None:
    plain, backwards = [5, 6, 1, 7, 8, 9, 2, 3, 4], [3, 4, 2, 7, 8, 9, 1, 5, 6]
    aim, n = objective("spt:kept=0.5,reversed=0.3"), 2000
    rows = [aim.row(DOCUMENT, random.Random(i))[0] for i in range(n)]
    for row, share in ((plain, 0.5 + 0.2 / 120), (backwards, 0.3 + 0.2 / 120)):
        assert abs(rows.count(row) / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert all(objective("spt:kept=1,reversed=0").row(DOCUMENT, random.Random(i))[0] == plain for i in range(50))
    tokens = objective(objective("spt").null or "")
    assert {tuple(tokens.row(DOCUMENT, random.Random(i))[0]) for i in range(50)} == {tuple(plain), tuple(plain[::-1])}
    assert aim.told(DOCUMENT) == plain


@pytest.mark.parametrize("text", ["spt:kept=-1", "spt:reversed=2"])
def test_shares_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="each 0 or more"):
        objective(text)


@pytest.mark.parametrize(
    ("text", "says"), [("transfer:source=dyck", "no source 'dyck'"), ("transfer:length=2", "texts of 4 or more")]
)
def test_pretraining_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        objective(text)


# --- languages ----------------------------------------------------------------------------------------


def test_sentences_are_said_in_the_language_and_scored_in_it() -> None:
    aim = objective("impossible:kind=reversed")
    assert aim.told(DOCUMENT) == [6, 5, 1, 9, 8, 7, 2, 4, 3] == aim.row(DOCUMENT, random.Random(0))[0]
    assert objective("impossible:kind=control").told(DOCUMENT) == [5, 6, 1, 7, 8, 9, 2, 3, 4]
    wild = objective("impossible:kind=random")
    assert wild.told(DOCUMENT) == wild.told(DOCUMENT)
    long = [list(range(5, 25))]
    assert len({tuple(wild.row(long, random.Random(i))[0]) for i in range(9)}) == 9
    local = objective("impossible:kind=local,width=5,salt=3").told(long)
    assert [sorted(local[i : i + 5]) for i in range(0, 20, 5)] == [list(range(i, i + 5)) for i in range(5, 25, 5)]


def test_clones_are_read_by_their_share() -> None:
    aim, plain = objective("cloned:vocab=10,share=0.8"), [5, 6, 1, 7, 8, 9, 2, 3, 4]
    rows = [aim.row(DOCUMENT, random.Random(i))[0] for i in range(1000)]
    assert abs(rows.count(plain) / 1000 - 0.8) < 0.05
    assert rows.count([token + 10 for token in plain]) == 1000 - rows.count(plain)
    assert aim.told(DOCUMENT) == plain
    assert objective("cloned:vocab=10,scored=1").told(DOCUMENT) == [token + 10 for token in plain]
    with pytest.raises(ValueError, match="which language is scored"):
        objective("cloned:vocab=10,scored=2")


# --- losses -------------------------------------------------------------------------------------------


def batch_of(n: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 40, (n, length), generator=torch.Generator().manual_seed(seed))
    rows = [(ids[i, : length - i].tolist(), ids[i, : length - i].tolist()) for i in range(n)]
    return collated(rows)


def loss_of(text: str, model: pb.Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return objective(text).loss(model, model.hf, batch, learned(batch["labels"]))


def gradient(text: str, model: pb.Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = [p for p in model.hf.parameters() if p.requires_grad or p.requires_grad_() is not None]
    with torch.enable_grad():
        found = torch.autograd.grad(loss_of(text, model, batch), weights, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(weights, found, strict=True)]
    )


def plain_losses(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[float]:
    """- log p of each learned token by loops, float64."""
    found = []
    for row, labels in zip(torch.log_softmax(logits.double(), -1), batch["labels"], strict=True):
        found += [-float(row[t - 1, int(labels[t])]) for t in range(1, len(labels)) if int(labels[t]) != -100]
    return found


@pytest.fixture
def model() -> pb.Model:
    return pb.load(twins.twin("llama"))


def test_the_plain_loss_by_loops(model: pb.Model) -> None:
    batch = batch_of()
    with torch.no_grad():
        losses = plain_losses(model.hf(batch["input_ids"]).logits, batch)
        assert len(losses) == 6 + 5 + 4 == int(learned(batch["labels"]))
        assert close(float(loss_of("ntp", model, batch)), sum(losses) / len(losses), of=10.0, dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_exits_are_the_lens_and_one_exit_is_the_plain_loss(name: str) -> None:
    """Also of Mamba, whose `hidden_states` begin behind the first layer; the last exit, normed once, is the model itself."""
    model = pb.load(twins.twin(name))
    batch, n = batch_of(), model.n_layers
    with torch.no_grad():
        assert torch.equal(loss_of(f"multi-exit:exits={n}", model, batch), loss_of("ntp", model, batch))
        trace = pb.run(
            model, [row[row != 0].tolist() for row in batch["input_ids"]], taps=[f"L{i}.resid_out" for i in range(n)]
        )
        total = 0.0
        for i in range(1, n + 1):
            state = trace[pb.Port("resid_out", i - 1)]
            logits = model.unembed_logits(model.final_norm_module(state))
            losses = plain_losses(logits, batch)
            total += i / n * sum(losses) / len(losses)
        assert close(float(loss_of("multi-exit", model, batch)), total, of=10.0, dtype=torch.float32)


def test_the_gradient_of_exits_is_the_sum_of_theirs_by_their_place_among_exits() -> None:
    """Of exits after layers 1 and 3 of three: half the gradient of the first and the whole one of the plain loss, by the layers in turn."""
    model, batch = lab.small(45, layers=3, width=16, heads=2, mlp=16), batch_of()
    hf: Any = model.hf
    weights = [p for p in hf.parameters() if p.requires_grad_() is not None]
    with torch.enable_grad():
        ids = batch["input_ids"]
        at = torch.arange(ids.shape[1])[None]
        first = hf.model.layers[0](
            hf.model.embed_tokens(ids), position_ids=at, position_embeddings=hf.model.rotary_emb(hf.lm_head.weight, at)
        )
        said = hf.lm_head(hf.model.norm(first)).log_softmax(-1)
        learn = batch["labels"][:, 1:] != -100
        loss = -said[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][learn].mean()
        early = torch.autograd.grad(loss, weights, allow_unused=True)
    own = torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(weights, early, strict=True)])
    assert float(own.abs().max()) > 0
    found, plain = gradient("multi-exit:exits=1+3", model, batch), gradient("ntp", model, batch)
    assert close(found, own / 2 + plain, of=float(plain.abs().max()), dtype=torch.float32)


def test_exits_that_cannot_be(model: pb.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, says in (
        (f"multi-exit:exits=2+{model.n_layers + 3}", "the last layer is one"),
        ("multi-exit:exits=a", "with \\+ between"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            objective(text).adapt(model)
    own = model.hf.forward

    def others(*args: Any, **options: Any) -> Any:
        found = own(*args, **options)
        if found.hidden_states is not None:
            found.hidden_states = tuple(2 * one for one in found.hidden_states)
        return found

    monkeypatch.setattr(model.hf, "forward", others)
    for text in ("multi-exit", "translico:vocab=5"):
        with pytest.raises(pb.PatchbayError, match="hidden_states of this llama model are not the streams after its"):
            objective(text).adapt(model)
    objective(f"multi-exit:exits={model.n_layers}").adapt(model)


def test_the_temporal_difference_fixes_the_gauge(model: pb.Model) -> None:
    """Rewards by loops; a constant added to a state's logits leaves probabilities and moves the term; without weight the plain loss to the bit."""
    batch, gamma = batch_of(), 0.9
    assert torch.equal(gradient("inverse-rl:weight=0", model, batch), gradient("ntp", model, batch))
    with torch.no_grad():
        logits = model.hf(batch["input_ids"]).logits.double()
    found = rewards(logits, batch["labels"], gamma)
    for i, labels in enumerate(batch["labels"].tolist()):
        real = [t for t in range(1, len(labels)) if labels[t] != -100]
        for t in range(1, len(labels)):
            q = float(logits[i, t - 1, labels[t]]) if t in real else 0.0
            after = float(logits[i, t].logsumexp(0)) if t + 1 in real else 0.0
            assert close(float(found[i, t - 1]), q - gamma * after if t in real else 0.0, of=20.0, dtype=torch.float64)
    whole = rewards(logits, batch["labels"])
    logp = [-sum(plain_losses(logits[i : i + 1], {"labels": batch["labels"][i : i + 1]})) for i in range(3)]
    for i in range(3):  # at gamma 1 they telescope
        assert close(float(whole[i].sum()), logp[i] + float(logits[i, 0].logsumexp(0)), of=50.0, dtype=torch.float64)
    moved = logits.clone()
    moved[0, 2] += 3.0
    assert plain_losses(moved, batch) == pytest.approx(plain_losses(logits, batch))
    assert float((rewards(moved, batch["labels"]) - whole).abs().sum()) == pytest.approx(6.0)


@pytest.mark.parametrize("smooth", [0.0, 0.1, 0.75])
def test_the_null_of_rewards_is_label_smoothing(model: pb.Model, smooth: float) -> None:
    """torch's to the bit, loss and gradient; and by loops: a share of the target is all tokens alike. Beside a weight it is the null arm's alone; scores are without it."""
    batch, text = batch_of(), f"inverse-rl:weight=0,smooth={smooth}"
    weights = [p for p in model.hf.parameters() if p.requires_grad_() is not None]
    labels = batch["labels"][:, 1:].flatten()
    with torch.enable_grad():
        logits = model.hf(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        torchs = (
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum", label_smoothing=smooth)
            / (labels != -100).sum()
        )
        slopes = torch.autograd.grad(torchs, weights)
    with torch.no_grad():
        assert torch.equal(loss_of(text, model, batch), torchs)
        assert torch.equal(gradient(text, model, batch), torch.cat([one.flatten() for one in slopes]))
    logp = torch.log_softmax(logits.detach().double(), -1)
    loops = []
    for i, row in enumerate(batch["labels"].tolist()):
        for t in [t for t in range(1, len(row)) if row[t] != -100]:
            one = logp[i, t - 1]
            loops.append(-(1 - smooth) * float(one[row[t]]) - smooth * float(one.sum()) / len(one))
    assert close(float(torchs.detach()), sum(loops) / len(loops), of=10.0, dtype=torch.float32)
    given = f"inverse-rl:weight=0.2,gamma=0.9,smooth={smooth}"
    assert torch.equal(gradient(given, model, batch), gradient("inverse-rl:weight=0.2,gamma=0.9", model, batch))
    assert objective(given).null == (text if smooth else None)
    assert objective(text).null is None
    held = [[row] for row in batch["input_ids"].tolist()]
    assert torch.equal(objective(text).scores(model, held), objective("ntp").scores(model, held))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("weight=-1", "weight=-1.0: 0, for cross-entropy alone, or more"),
        ("weight=inf", "weight=inf"),
        ("gamma=1.5", "gamma=1.5: a discount, from 0 to 1"),
        ("gamma=-0.1", "gamma=-0.1"),
        ("gamma=nan", "gamma=nan"),
        ("weight=0,smooth=1", "smooth=1.0: a share of the target, from 0 to below 1"),
        ("smooth=-0.1", "smooth=-0.1"),
        ("smooth=nan", "smooth=nan"),
    ],
)
def test_rewards_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        objective(f"inverse-rl:{text}")


def test_the_hardest_tokens_alone_and_all_of_them_are_the_plain_loss(model: pb.Model) -> None:
    batch = batch_of()
    assert close(gradient("self-evolution:share=1,soft=0", model, batch), gradient("ntp", model, batch))
    with torch.no_grad():
        logits = model.hf(batch["input_ids"]).logits
        losses = sorted(plain_losses(logits, batch), reverse=True)[: round(0.3 * 15)]
        assert close(
            float(loss_of("self-evolution:share=0.3,soft=0", model, batch)),
            sum(losses) / len(losses),
            of=10.0,
            dtype=torch.float32,
        )
        soft = float(loss_of("self-evolution:share=1,soft=0.5", model, batch))
        logp = torch.log_softmax(logits.double(), -1)
        entropy = [-float((logp[i, t - 1].exp() * logp[i, t - 1]).sum()) for i in range(3) for t in range(1, 7 - i)]
        assert close(
            soft, 0.5 * sum(plain_losses(logits, batch)) / 15 + 0.5 * sum(entropy) / 15, of=10.0, dtype=torch.float32
        )


def test_the_null_takes_as_many_tokens_whatever_their_loss(model: pb.Model) -> None:
    """Batches each have a draw of their own, the same each time; over many it is the mean loss and not that of the hardest."""
    null = objective("self-evolution:soft=0").null or ""
    assert null == "self-evolution:share=0.3,soft=0.0,chosen=random"
    picked, every, hardest = [], [], []
    with torch.no_grad():
        for seed in range(40):
            batch = batch_of(seed=seed)
            losses = sorted(plain_losses(model.hf(batch["input_ids"]).logits, batch))
            picked.append(float(loss_of(null, model, batch)))
            assert picked[-1] == float(loss_of(null, model, batch))
            every.append(sum(losses) / 15)
            hardest.append(sum(losses[-4:]) / 4)
    assert abs(sum(picked) - sum(every)) < 0.3 * (sum(hardest) - sum(every))
    with pytest.raises(pb.PatchbayError, match="hardest or random"):
        objective("self-evolution:chosen=all")


# --- spans moved behind the rest ----------------------------------------------------------------------


def test_what_was_cut_out_can_be_put_back() -> None:
    ids, first = [5, 6, 7, 8, 9, 10], 40
    moved, labels = corrupted(ids, [(1, 3), (4, 5)], first)
    assert moved == [5, 42, 8, 43, 10, 40, 42, 6, 7, 41, 43, 9, 41]
    assert labels == [5, -100, 8, -100, 10, 40, 42, 6, 7, 41, 43, 9, 41]
    assert restored(moved, first) == ids == restored(ids, first)
    aim = objective("infill:vocab=50,spans=2,share=1")
    long = [[draw % 30 + 5 for draw in range(23)]]
    rows = [aim.row(long, random.Random(i))[0] for i in range(100)]
    assert len({tuple(row) for row in rows}) > 50
    assert all(restored(row, 46) == long[0] for row in rows)
    assert objective("infill:vocab=50,share=0").row(long, random.Random(0)) == (long[0], long[0])
    with pytest.raises(pb.PatchbayError, match="a document holds token 47; 47 and above are special"):
        objective("infill:vocab=50").row([[47]], random.Random(0))
    with pytest.raises(pb.PatchbayError, match="vocab=50, and this model has"):
        objective("infill:vocab=50").adapt(pb.load(twins.twin("llama")))
