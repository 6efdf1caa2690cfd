"""Low-rank tuning: the start is the truncated update, factors' gradients are autograd's, nothing else moves, and what is written is a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.train._low_rank import Lora, LoraSB, LowRank, adapter, kept, maps
from patchbay.train._objectives._objective import collated, cross_entropy
from patchbay.train._optimizers import form_of
from patchbay.train._plan import Arm, Rows, plan_of
from patchbay.train._runs import Lab, ended
from tests.given import lent
from tests.tolerance import close

PLAN = {"steps": 4, "batch_size": 4, "rate": 0.02}


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts() -> list[list[int]]:
    return [[5 + i % 7, 6, 7 + i % 3, 8, 9] for i in range(20)]


def test_the_start_is_the_best_update_of_that_rank() -> None:
    """scale B R A = the truncated SVD of - first sign(G), in orthonormal bases; R of nothing has the same bases."""
    G, W = matrix(12, 20), matrix(12, 20, 1)
    form = LoraSB(rank=5, first=0.01, scale=0.5)
    found = form.start(W, G, torch.Generator())
    U, S, V = torch.linalg.svd(-0.01 * torch.sign(G), full_matrices=False)
    assert close(0.5 * found["B"] @ found["R"] @ found["A"], (U[:, :5] * S[:5]) @ V[:5], dtype=torch.float64)
    for one in (found["B"].T @ found["B"], found["A"] @ found["A"].T):
        assert close(one, torch.eye(5).double(), dtype=torch.float64)
    assert found["R"].shape == (5, 5)
    zero = LoraSB(rank=5, first=0.0).start(W, G, torch.Generator())
    assert torch.equal(zero["B"], found["B"])
    assert not bool(zero["R"].any())
    for bases in ("weights", "random"):
        start = LoraSB(rank=5, bases=bases).start(W, G, torch.Generator().manual_seed(0))
        assert not bool(start["R"].any())
    own = LoraSB(rank=5, bases="weights").start(W, G, torch.Generator())
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    assert close(own["B"] @ own["A"], (U[:, :5] * S[:5]) @ V[:5], dtype=torch.float64)
    assert close(start["A"] @ start["A"].T, torch.eye(5).double(), dtype=torch.float64)
    assert not bool(Lora(rank=5).start(W, G, torch.Generator())["B"].any())


def test_how_much_of_the_signs_is_kept() -> None:
    G = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([5.0, -1.0]))
    assert close(kept(G, 1), 1.0, dtype=torch.float32)  # signs of rank 1
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert close(kept(7 * square, 1), 0.5, dtype=torch.float32)
    drawn = [kept(matrix(24, 40, seed).float(), 6) for seed in range(5)]
    assert 0.45 < sum(drawn) / 5 < 0.6  # signs of noise: about half of the squares at a quarter of the rank


@pytest.mark.parametrize(
    "form", [LoraSB(rank=3, bases="random", scale=2.0), LoraSB(rank=3, first=0.1, scale=2.0), Lora(rank=3, scale=2.0)]
)
def test_steps_are_those_of_adam_on_the_factors(form: Any) -> None:
    """Three steps beside torch.optim.Adam on factors that autograd differentiates."""
    target, x = matrix(6, 9).float(), matrix(9, 9, 1).float()
    W = torch.nn.Parameter(matrix(6, 9, 2).float())
    still = torch.nn.Parameter(torch.ones(3))
    ours = LowRank([W, still], 0.05, form, frozenset([id(W)]), seed=4)
    before = W.detach().clone()

    def loss(weight: Tensor) -> Tensor:
        return ((weight - target) @ x).square().sum() + still.sum()

    def step() -> None:
        ours.zero_grad()
        loss(W).backward()
        ours.step()

    jumps = isinstance(form, LoraSB) and form.bases == "gradient"
    G = torch.autograd.grad(loss(W), W)[0]
    start = form.start(before, G, torch.Generator().manual_seed(4 * 1_000_003 + 1))
    factors = {name: start[name].clone().requires_grad_(name in form.learned) for name in "BRA"}

    def whole() -> Tensor:
        return before + 2.0 * factors["B"] @ factors["R"] @ factors["A"]

    theirs = torch.optim.Adam([factors[name] for name in form.learned], lr=0.05)
    if jumps:  # the first update is the start
        step()
        assert close(W.detach(), whole().detach(), of=10.0)
        assert not torch.equal(W.detach(), before)
    for _ in range(3):
        step()
        theirs.zero_grad()
        loss(whole()).backward()
        theirs.step()
        assert close(W.detach(), whole().detach(), of=10.0, noise=512)  # Adam divides by what rounds
    assert torch.equal(still.detach(), torch.ones(3))
    for name in "BA":  # bases stay, and LoRA's factors do not
        assert torch.equal(ours.state[W][name], start[name]) == isinstance(form, LoraSB)
    assert int(torch.linalg.matrix_rank((W.detach() - before).double(), rtol=1e-4)) == 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("gpt2", "lora-sb:rank=2"), pytest.param("llama", "lora:rank=2", marks=pytest.mark.slow)],  # both ways round
)
def test_what_is_written_is_a_plain_lora_and_the_merged_model(name: str, optimizer: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = lent(name)
    pb.train.variant(
        model, texts(), optimizer=optimizer, seeds=1, folder=str(tmp_path / "runs"), plan={**PLAN, "steps": 2}
    )
    tuned = pb.load(tmp_path / "runs" / "variant-0")
    changed = maps(model)
    for key, value in tuned.hf.state_dict().items():
        if key.removesuffix(".weight") not in changed:
            assert torch.equal(value, model.hf.state_dict()[key]), key
    read = peft.PeftModel.from_pretrained(pb.tiny.twins.twin(name), str(tmp_path / "runs" / "variant-0.adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert close(read(ids).logits, tuned.hf(ids).logits, noise=512)  # factors of a difference of rounded weights
        assert not close(tuned.hf(ids).logits, model.hf(ids).logits)
    assert read.peft_config["default"].r == 2
    assert not (tmp_path / "runs" / "twin-0.adapter").exists()


@pytest.mark.slow  # the lab's own resume is tested with AdamW; this asks whether factors are kept
def test_a_low_rank_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchbay.train import _trainer

    options: dict[str, Any] = {"optimizer": "lora-sb:rank=2", "seeds": 1, "plan": {**PLAN, "every": 2}}
    whole = pb.train.variant(lent("llama"), texts(), **options)
    made = _trainer.learned
    calls = iter(range(99))

    def dies(labels: Tensor) -> Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return made(labels)

    monkeypatch.setattr(_trainer, "learned", dies)
    with pytest.raises(KeyboardInterrupt):
        pb.train.variant(lent("llama"), texts(), folder=str(tmp_path / "runs"), **options)
    monkeypatch.undo()
    assert list((tmp_path / "runs" / ".variant-0").glob("checkpoint-2/whole.json"))
    again = pb.train.variant(lent("llama"), texts(), folder=str(tmp_path / "runs"), **options)
    assert [row["end"] for row in again.tables["runs"]] == [row["end"] for row in whole.tables["runs"]]


# --- the low ranks of a cut ---------------------------------------------------------------------------


def cut() -> pb.Model:
    """A Llama of which queries and keys of one layer have rank 4, of 32 and 16, and values rank 9 of 16."""
    names = {"q": 4, "k": 4, "v": 9}
    ranks = {f"model.layers.0.self_attn.{name}_proj": rank for name, rank in names.items()}
    return pb.load(pb.blocks.build(pb.tiny.twins.twin("llama"), ranks=ranks))


def test_low_ranks_move_by_plain_adamw_and_nothing_else_does() -> None:
    """Two updates beside torch's AdamW on the factors of rank 4 alone; what has more than half of its rank is not low."""
    plan = plan_of({"steps": 2, "batch_size": 4, "held": 0.0, "rate": 0.01, "decay": 0.1})
    model, documents = cut(), [[one] for one in texts()]
    tuned = ended(Lab(model, documents, documents, plan), Arm(optimizer="low-ranks"), 3)
    low = [f"model.layers.0.self_attn.{map_}_proj.{factor}" for map_ in "qk" for factor in "UV"]
    before, after = model.hf.state_dict(), tuned.hf.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == low
    hf, rows = cut().hf, Rows(documents, Arm(), plan, 3)
    moved = [dict(hf.named_parameters())[name].requires_grad_() for name in low]
    fit = torch.optim.AdamW(moved, lr=0.01, weight_decay=0.1)
    for step in range(2):
        batch = collated([rows[4 * step + i] for i in range(4)])
        with torch.enable_grad():
            loss = cross_entropy(hf(batch["input_ids"]).logits, batch["labels"]) / 16
            for one, slope in zip(moved, torch.autograd.grad(loss, moved), strict=True):
                one.grad = slope
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        fit.step()
    for name, one in zip(low, moved, strict=True):
        assert close(after[name], one.detach(), noise=512)  # Adam divides by what rounds
    assert not any(p.requires_grad for p in tuned.hf.parameters())
    with pytest.raises(
        pb.PatchbayError, match=r"optimizer low-ranks tunes matrices .* this llama model has none: hf = pb.blocks"
    ):
        ended(Lab(lent("llama"), documents, documents, plan), Arm(optimizer="low-ranks"), 0)


def test_what_it_refuses(tmp_path: Path) -> None:
    for text, says in (
        ("lora-sb:rank=0", "1 or more"),
        ("lora-sb:bases=own", "one of gradient, weights, random"),
        ("lora:ranks=2", "optimizer lora has no setting 'ranks'; its settings are rank, scale"),
        ("lora:rank=x", "rank is written as int"),
        ("muon:rank=2", "muon has no settings"),
        ("cosmos:rank=0", "cosmos: rank=0, ratio=0.2: 1 or more, above 0"),
        ("cosmos:ratio=inf", "cosmos: rank=16, ratio=inf"),
        ("cosmos:ranks=2", "optimizer cosmos has no setting 'ranks'; its settings are rank, ratio"),
        ("low-ranks:rank=2", "low-ranks has no settings"),
        ("lora-xs", "no optimizer 'lora-xs'"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            form_of(text)
    with pytest.raises(pb.PatchbayError, match="no matrix of a linear map is left"):
        LowRank([torch.nn.Parameter(torch.ones(2, 2))], 0.1, Lora(), frozenset())
    other = pb.load(pb.tiny.twins.twin("llama"))
    with torch.no_grad():
        for module in maps(other).values():
            module.weight.mul_(1.5)  # type: ignore[operator]
    with pytest.raises(pb.PatchbayError, match="changed by more than rank 2"):
        adapter(lent("llama"), other, 2, tmp_path / "adapter")
