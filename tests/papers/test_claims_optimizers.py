"""The claim of optimizers: rates are chosen on other texts, all ways start alike and read alike, and the panel is read where the loss of AdamW is reached."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patchbay.papers.claims import _check, _claim, optimizers
from patchbay.papers.claims.optimizers import Trained
from patchbay.tiny import lab
from patchbay.train._plan import plan_of

PANEL = {"alpha_highest": 0.25, "induction_highest": 0.5, "previous_token_mean": 0.125}


@pytest.mark.parametrize(("muon", "cosmos", "verdict"), [(3.3, 3.2, "confirmed"), (3.2, 3.3, "not confirmed")])
def test_cosmos_is_beside_muon(monkeypatch: pytest.MonkeyPatch, muon: float, cosmos: float, verdict: str) -> None:
    """Whatever AdamW and full rank give, which are told."""
    noise = 0.01 * torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = {"AdamW": 3.0, "Muon": muon, "COSMOS": cosmos, "SOAP": 2.0, "other": 3.5}
    found = {
        name: Trained(loss + noise * (i + 1), 1000 * i, None if name == "Muon" else 10 * i, PANEL)
        for i, (name, loss) in enumerate(losses.items())
    }
    monkeypatch.setattr(optimizers, "_compared", lambda seed: found)
    monkeypatch.setattr(optimizers, "_rates", lambda: {"AdamW": 0.003, "Muon": 0.02, "COSMOS": 0.01, "SOAP": 0.04})
    claim = optimizers.liu2025c(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    assert claim.value == pytest.approx(muon - cosmos, abs=0.01)
    assert claim.bound == 0.0
    for said in (
        "rates of 0.003, 0.02, 0.01, 0.04",
        "hold 0, 1, 2, 3 kB",
        "after 0, no, 20, 30 steps",
        "with most 0.25, 0.25, 0.25, 0.25 (AdamW on other batches 0.25)",
    ):
        assert said in claim.text


def test_rates_are_chosen_by_another_seed_and_used_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least loss of each way; the five seeds are run at these and nothing is chosen there; what is to be reached is AdamW's loss of the same seed."""
    least = {"AdamW": 6e-3, "Muon": 2e-2, "COSMOS": 1e-2, "SOAP": 4e-2}
    seen: list[tuple[Any, ...]] = []

    def trained(seed: int, name: str, rate: float, *, reach: float | None = None, other: bool = False) -> Trained:
        seen.append((seed, name, rate, reach, other))
        return Trained(torch.tensor([seed + abs(rate - least[name])], dtype=torch.float64), 0)

    monkeypatch.setattr(optimizers, "_trained", trained)
    monkeypatch.setattr(optimizers, "_rates", optimizers._rates.__wrapped__)
    assert optimizers._rates() == least
    assert {(seed, len(optimizers.RATES[name])) for seed, name, *_ in seen} == {(optimizers.CHOOSING, 3)}
    assert len(seen) == 12
    seeds = [_check.STEP * at for at in range(_claim.TRAINED)]
    for texts in (0, 1000):  # texts that are trained on and those that are held out are drawn by these
        assert optimizers.CHOOSING + texts not in [seed + other for seed in seeds for other in (0, 1000)]
    monkeypatch.setattr(optimizers, "_rates", lambda: least)
    seen.clear()
    found = optimizers._compared.__wrapped__(20)
    assert list(found) == [*optimizers.WAYS, "other"]
    assert seen[0] == (20, "AdamW", 6e-3, None, False)
    assert seen[1:] == [(20, name, least[name], 20.0, False) for name in optimizers.WAYS] + [
        (20, "AdamW", 6e-3, 20.0, True)
    ]


def test_ways_start_and_read_alike_and_are_read_where_the_loss_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is stood in for by losses that fall: the panel is read at the first look that reaches, or in the end."""
    from patchbay.train import _panels, _runs, _trainer

    starts, batches, arms = [], [], []
    for name, value in (("TEXTS", 40), ("HELD", 6)):
        monkeypatch.setattr(optimizers, name, value)
    begun = _runs.begun
    losses = iter([5.0, 4.0, 3.0, 2.0])

    def started(share: Any, arm: Any, seed: int) -> Any:
        found = begun(share, arm, seed)
        starts.append(found.fingerprint)
        return found

    def trained(model: Any, rows: Any, arm: Any, plan: Any, place: Any, *, keep: bool, watch: Any = None) -> Any:
        batches.append([rows[i] for i in range(16)])
        arms.append(arm.optimizer)
        assert plan == plan_of({"fresh": 1, "steps": optimizers.STEPS, "batch_size": 16, "rate": plan.rate})
        return _trainer.Trained([], [] if watch is None else [watch[1](model) for _ in range(3)], 7)

    looks: list[float] = []

    def scores(model: Any, held: Any) -> torch.Tensor:
        looks.append(next(losses))
        return torch.full((len(held),), looks[-1])

    monkeypatch.setattr(_runs, "begun", started)
    monkeypatch.setattr(_trainer, "trained", trained)
    monkeypatch.setattr(_panels, "read", lambda *_: {"alpha_highest": [looks[-1]]})
    aim = SimpleNamespace(scores=scores)
    monkeypatch.setattr("patchbay.train._objectives.objective", lambda _: aim)

    def run(name: str, *falling: float, **options: Any) -> Trained:
        nonlocal losses
        losses = iter(falling)
        return optimizers._trained(0, name, 0.01, **options)

    found = run("Muon", 5.0, 4.0, 3.0, 2.0, 2.0, reach=3.5)
    assert (found.steps, found.panel, found.state, float(found.loss[0])) == (
        2 * optimizers.EVERY,
        {"alpha_highest": 3.0},
        7,
        2.0,
    )
    late = run("COSMOS", 5.0, 4.0, 3.6, 3.5, 3.5, reach=3.5)  # by the last look
    assert (late.steps, late.panel) == (3 * optimizers.EVERY, {"alpha_highest": 3.5})
    never = run("SOAP", 5.0, 4.0, 3.9, 3.8, 3.8, reach=3.5)
    assert (never.steps, never.panel) == (None, {"alpha_highest": 3.8})
    plain = run("AdamW", 4.0, 4.0)
    assert (plain.steps, plain.panel) == (None, {})
    run("AdamW", 4.0, 4.0, other=True)
    assert len(set(starts)) == 1
    assert batches[0] == batches[1] == batches[2] == batches[3] != batches[4]
    assert arms == ["muon", "cosmos:rank=4", "cosmos:rank=96", "adamw", "adamw"]


def test_a_run_trains_the_network_that_the_claim_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each: bytes of states by hand, as many texts told, full rank is that of every matrix, and other steps end elsewhere."""
    monkeypatch.setattr(optimizers, "STEPS", 2)
    monkeypatch.setattr(optimizers, "HELD", 8)
    network = lab.small(64, width=48, mlp=96)
    shapes = [p.shape for name, p in network.hf.named_parameters() if "proj" in name]
    n, inside = sum(p.numel() for p in network.hf.parameters()), sum(a * b for a, b in shapes)
    assert 45_000 < n < 55_000
    ranked = {rank: sum((a + min(rank, b)) * (b + min(rank, b)) for a, b in shapes) for rank in (4, 96)}
    wanted = {"AdamW": 2 * inside, "Muon": inside, "COSMOS": ranked[4], "SOAP": ranked[96]}
    assert max(b for _, b in shapes) == 96
    ends = set()
    for name, numbers in wanted.items():
        found = optimizers._trained(0, name, 0.01)
        assert found.state == 4 * (numbers + 2 * (n - inside))
        assert len(found.loss) == 8
        ends.add(float(found.loss.mean()))
    assert len(ends) == 4
