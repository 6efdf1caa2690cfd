"""train.subspace_fusion: planted entries are told apart, an update is the chain rule's by hand, masks of ones and zeros are the two models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.train._merging import merged
from patchbay.train.subspace_fusion import (
    START,
    TEMPERATURE,
    changes,
    fused,
    learned_mask,
    mean_kept,
    weights,
)
from tests.given import lent
from tests.tolerance import close

HARMED = "model.layers.1.mlp.down_proj.weight"


def task(n: int = 64) -> pb.Task:
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 40, (n, 5), generator=rng).tolist()
    return pb.Task("refusals", prompts, [7] * n, [[8]] * n).with_metric("log_probability")


def slope(model: pb.Model, some: pb.Task, name: str) -> torch.Tensor:
    """The gradient of the mean - log p of the right answers."""
    hf = copy.deepcopy(model.hf)
    parameter = dict(hf.named_parameters())[name].requires_grad_()
    with torch.enable_grad():
        logp = hf(torch.tensor(some.clean)).logits[:, -1].log_softmax(-1)
        [found] = torch.autograd.grad(-logp[:, 7].mean(), [parameter])
    return found


def tuned_from(model: pb.Model, size: float = 0.05) -> tuple[pb.Model, torch.Tensor]:
    """Half of a matrix changed so that the answer is lost, half so that it is not; which half [entry]."""
    found = slope(model, task(), HARMED)
    harm = torch.rand(found.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        dict(hf.named_parameters())[HARMED].add_(size * found.sign() * torch.where(harm, 1.5, -0.5))
    return pb.load(hf), harm


def test_planted() -> None:
    """Entries that lost the answer are left out, the others kept, and the answer is back beyond a random mask's."""
    model = lent("llama")
    tuned, harm = tuned_from(model)
    found = pb.train.subspace_fusion(model, tuned, task(), steps=40)
    logits, _ = learned_mask(model, changes(model, tuned), task(), 40, 0.1, 0)
    ranked, n = logits[HARMED].flatten().argsort().argsort().double(), int(harm.sum())
    above = (ranked[~harm.flatten()].sum() - (harm.numel() - n) * (harm.numel() - n - 1) / 2) / (n * (harm.numel() - n))
    assert float(above) > 0.9  # the area under the curve
    base, lost, masked, random = found["score"].tolist()
    assert lost < base
    assert masked > random + 0.01
    assert float(found["gain_low"]) > 0
    assert 0.3 < float(found["kept"]) < 0.8
    assert [row["tensor"] for row in found.tables["tensors"]] == [HARMED]


def test_reference() -> None:
    """Two updates of Adam, the gradient by the chain rule: dL/dm_i = g_i tau_i / mean - sum_j g_j m_j tau_j / (n mean^2)."""
    model, some = lent("llama"), task()
    tuned, _ = tuned_from(model)
    changed = changes(model, tuned)
    tau = changed[HARMED].double()
    found, losses = learned_mask(model, changed, some, 2, 0.1, 3)
    draw = torch.Generator().manual_seed(3)
    entry, first, second = torch.full_like(tau, START), torch.zeros_like(tau), torch.zeros_like(tau)
    for step in (1, 2):
        rows = torch.randperm(len(some), generator=draw)[:16].tolist()
        u = torch.rand(tau.shape, generator=draw).clamp(1e-6, 1 - 1e-6).double()
        m = 1 / (1 + torch.exp(-(entry + torch.log(u / (1 - u))) / TEMPERATURE))
        hf = copy.deepcopy(model.hf)
        with torch.no_grad():
            dict(hf.named_parameters())[HARMED].add_((m * tau / m.mean()).float())
        now = pb.load(hf)
        g = slope(now, some[rows], HARMED).double()
        by_mask = g * tau / m.mean() - (g * m * tau).sum() / (tau.numel() * m.mean() ** 2)
        gradient = by_mask * m * (1 - m) / TEMPERATURE
        logp = now.hf(torch.tensor(some[rows].clean)).logits[:, -1].detach().double().log_softmax(-1)[:, 7]
        assert close(losses[step - 1], -float(logp.mean()), of=10.0, dtype=torch.float32)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        entry = entry - 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    far = (found[HARMED].double() - entry).abs()
    assert (
        float((far < 1e-3).double().mean()) > 0.98
    )  # a step is a sign, which rounding decides where the slope is near 0


def test_null() -> None:
    """What was changed has no part in the answer: the mask stays whole, and nothing is gained."""
    model = lent("llama")
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        hf.get_input_embeddings().weight[50:60] += 0.3  # rows of tokens that no prompt has
    found = pb.train.subspace_fusion(model, pb.load(hf), task(), steps=5)
    assert float(found["kept"]) == 1.0 == float(found["of_change"])
    assert float(found["gain"]) == 0.0
    assert len(set(found["score"].tolist())) == 1


def test_masks_of_ones_and_zeros_are_the_two_models() -> None:
    model = lent("llama")
    tuned, _ = tuned_from(model)
    changed = changes(model, tuned)
    own, other = (dict(one.hf.named_parameters())[HARMED].detach() for one in (model, tuned))
    ones, zeros = ({HARMED: torch.full_like(own, value)} for value in (1.0, 0.0))
    assert close(weights(model, changed, ones)[HARMED], other)
    assert torch.equal(weights(model, changed, zeros)[HARMED], own)
    assert fused(model, changed, zeros).fingerprint == model.fingerprint
    half = {HARMED: (torch.arange(own.numel()) % 2).reshape(own.shape).float()}
    assert float(mean_kept(half, changed)) == 0.5
    there = weights(model, changed, half)[HARMED]
    for i, j in ((0, 0), (0, 1), (3, 5)):
        kept = (i * own.shape[1] + j) % 2
        assert close(
            float(there[i, j]), float(own[i, j] + kept * 2 * (other[i, j] - own[i, j])), of=1.0, dtype=torch.float32
        )


def test_the_masked_model_is_written(tmp_path: Path) -> None:
    model = lent("llama")
    tuned, _ = tuned_from(model)
    found = pb.train.subspace_fusion(model, tuned, task(), steps=2, folder=str(tmp_path / "fused"))
    assert pb.load(tmp_path / "fused").fingerprint == found.provenance["checkpoint"]["fingerprint"]
    with pytest.raises(pb.PatchbayError, match="already there"):
        pb.train.subspace_fusion(model, tuned, task(), steps=2, folder=str(tmp_path / "fused"))


# --- several tuned models -----------------------------------------------------------------------------


def test_changes_are_merged_as_loops() -> None:
    """Sum, TIES and DARE, number by number; one change alone is itself by each, but for what TIES and DARE leave out."""
    draw = torch.Generator().manual_seed(0)
    several = [{"a": torch.randn(3, 4, generator=draw), "b": torch.randn(5, generator=draw)} for _ in range(3)]
    flat = [torch.cat([one["a"].flatten(), one["b"]]).tolist() for one in several]

    def told(found: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([found.get("a", torch.zeros(3, 4)).flatten(), found.get("b", torch.zeros(5))])

    assert close(told(merged(several, "sum", 0)), torch.tensor([sum(some) for some in zip(*flat, strict=True)]))
    trimmed = [[x if abs(x) >= sorted(map(abs, one))[-7] else 0.0 for x in one] for one in flat]  # 7 of 17 stay
    elected = []
    for some in zip(*trimmed, strict=True):
        sign = (sum(some) > 0) - (sum(some) < 0)
        agreeing = [x for x in some if x * sign > 0]
        elected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    assert close(told(merged(several, "ties:keep=0.4", 0)), torch.tensor(elected))
    assert close(told(merged(several[:1], "ties:keep=1", 0)), torch.tensor(flat[0]))
    again = torch.Generator().manual_seed(3)
    kept = [
        {name: torch.where(torch.rand(x.shape, generator=again) < 0.5, 0.0, 2 * x) for name, x in one.items()}
        for one in several
    ]
    by_hand = {name: sum(one[name] for one in kept) for name in "ab"}
    assert close(told(merged(several, "dare:drop=0.5", 3)), told(by_hand))  # type: ignore[arg-type]
    mean = torch.stack([told(merged(several[:1], "dare:drop=0.5", seed)) for seed in range(400)]).mean(0)
    assert float((mean - told(several[0])).abs().max()) < 5 * float(told(several[0]).abs().max()) / 20
    lacking = merged([{"a": several[0]["a"]}, {"b": several[1]["b"]}], "sum", 0)
    assert torch.equal(told(lacking), torch.cat([several[0]["a"].flatten(), several[1]["b"]]))
    with pytest.raises(pb.PatchbayError, match="are all 0"):
        merged([several[0], {name: -x for name, x in several[0].items()}], "sum", 0)


def test_two_tunings_are_masked_together(tmp_path: Path) -> None:
    """The second undoes half of the first: the merge is what is scored as tuned, and what the mask is learned on."""
    model = lent("llama")
    tuned, _ = tuned_from(model)
    other = copy.deepcopy(model.hf)
    with torch.no_grad():
        own, first = (dict(one.named_parameters())[HARMED] for one in (model.hf, tuned.hf))
        dict(other.named_parameters())[HARMED].copy_(own - 0.5 * (first - own))
    other.save_pretrained(tmp_path / "other")
    found = pb.train.subspace_fusion(model, tuned, task(), merge={"with": [str(tmp_path / "other")]}, steps=1)
    half = fused(model, {HARMED: 0.5 * changes(model, tuned)[HARMED]}, {HARMED: torch.ones_like(own)})
    alone = pb.train.subspace_fusion(model, half, task(), steps=1)
    assert close(found["score"], alone["score"], of=10.0)
    assert "tuned is 2 models merged by sum" in " ".join(found.notes)
    for wrong, says in (
        ({"by": "sum"}, "the names of other tuned models and how"),
        ({"with": ["A"], "how": "sum"}, "the names of other tuned models and how"),
        ({"with": [str(tmp_path / "other")], "by": "tie"}, "no way to merge 'tie'; ways are sum, ties, dare.*ties"),
        ({"with": [str(tmp_path / "other")], "by": "ties:keep=0"}, "above 0 to 1"),
        ({"with": [str(tmp_path / "other")], "by": "dare:drop=1"}, "from 0 to below 1"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            pb.train.subspace_fusion(model, tuned, task(), merge=wrong, steps=1)


def test_refusals() -> None:
    model = lent("llama")
    tuned, _ = tuned_from(model)
    for other, options, says in (
        (model, {}, "the same weights"),
        (lent("gpt2"), {}, "other tensors"),
        (tuned, {"steps": 0}, "1 or more steps"),
        (tuned, {"rate": 0.0}, "a rate above 0"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            pb.train.subspace_fusion(model, other, task(), **options)  # type: ignore[arg-type]
