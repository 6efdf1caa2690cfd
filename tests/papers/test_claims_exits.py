"""Claims of exits: layers are read as the plain loops read them, all is trained on the same texts and scored on others, and the lens of the plain network that cost as much is what stands against the exits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.features.lens import Lens
from patchbay.papers.claims import exits
from patchbay.papers.claims._claim import CLAIMS
from patchbay.tiny import lab
from patchbay.train import _equal
from patchbay.train._plan import Arm, Rows, plan_of
from tests.tolerance import close

VOCAB = 24


def network(seed: int = 0) -> pb.Model:
    return lab.small(VOCAB, layers=3, width=16, heads=2, mlp=8, seed=seed)


def texts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCAB, (n,), generator=draw).tolist() for n in (5, 9, 3)]


@pytest.mark.parametrize(
    ("with_exits", "tuned", "value", "verdict"),
    [
        ([1.5, 1.5, 1.5, 9.0], [1.9, 1.6, 1.3, 1.2], 0.1, "confirmed"),
        ([1.5, 1.5, 1.5, 0.1], [1.9, 1.4, 0.9, 5.0], -0.1, "not confirmed"),
        ([1.5, 1.5, 1.5, 1.0], [1.5, 1.5, 1.5, 1.2], 0.0, "inconclusive"),
    ],
)
def test_the_layers_before_the_last_decide(
    monkeypatch: pytest.MonkeyPatch, with_exits: list[float], tuned: list[float], value: float, verdict: str
) -> None:
    draw = torch.Generator().manual_seed(0)

    def told(nats: list[float]) -> torch.Tensor:
        noise = 0.02 * torch.randn(40, generator=draw, dtype=torch.float64)
        each = torch.tensor(nats, dtype=torch.float64)[:, None] + noise - noise.mean()
        return torch.stack([each, each / 100])

    best = [0.0] * 4  # the logit lens and plain training for as many steps decide nothing
    found = {"exits": told(with_exits), "plain": told(best), "steps": told(best), "tuned": told(tuned)}
    monkeypatch.setattr(exits, "_read", lambda seed: found)
    claim = exits.gurioli2025(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    assert close(claim.value, value, of=10.0, dtype=torch.float64)
    assert f"an exit in training, {', '.join(f'{one:.2f}' for one in tuned[:3])} through a tuned lens" in claim.text
    assert f"said by the last layer {with_exits[3]:.2f} with exits" in claim.text


def test_a_claim_of_five_seeds() -> None:
    assert CLAIMS["gurioli2025"].seeds == 5
    assert CLAIMS["gurioli2025"].kind == "made"


def test_layers_are_read_as_plain_loops_read_them() -> None:
    """The logit lens, and a lens whose map adds to each layer's stream something else; the last layer is what the network says."""
    model, draw = network(), torch.Generator().manual_seed(1)
    maps = Lens(torch.randn(3, 16, 16, generator=draw), torch.randn(3, 16, generator=draw), adds=True)
    for lens in (None, maps):
        found = exits.after_layers(model, texts(), lens)
        assert found.shape == (2, 3, 3)
        for i, ids in enumerate(texts()):
            with torch.no_grad():
                out: Any = model.hf(torch.tensor([ids]), output_hidden_states=True)
                said = out.logits[0, :-1].double().log_softmax(-1)
                for layer in range(3):
                    if layer < 2:
                        state = out.hidden_states[layer + 1][0, :-1]
                        if lens is not None:
                            state = state + state @ maps.weight[layer + 1].T + maps.bias[layer + 1]
                        read = model.hf.lm_head(model.hf.model.norm(state)).double().log_softmax(-1)
                    else:
                        read = said
                    cost = sum(-float(read[at, ids[at + 1]]) for at in range(len(ids) - 1)) / (len(ids) - 1)
                    apart = float((said.exp() * (said - read)).sum(-1).mean())
                    assert close(float(found[0, layer, i]), cost, of=10.0, dtype=torch.float32)
                    assert close(float(found[1, layer, i]), apart, of=10.0, dtype=torch.float32)


def test_the_plain_network_costs_as_many_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exits.PLAN, "batch_size", 2)
    model, data = network(), [[1, 2, 3, 4, 5, 6]] * 8
    arm = exits.as_costly(model, data, 3)
    rows = Rows([[ids] for ids in data], Arm(), plan_of({"held": 0.0, **exits.PLAN}), 3)
    plain = _equal.operations(network(), rows, "ntp")
    assert arm == Arm(longer=arm.longer)
    unembedded = (
        3 * 2 * (2 * 6) * 16 * VOCAB
    )  # a product forward and two backward, of two more layers in two rows of 6 tokens
    assert arm.longer == pytest.approx((plain + 2 * unembedded) / plain)


def test_all_learn_the_same_texts_and_are_read_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is stood in for: on what each network and the lens were trained, and of which network the lens is."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(exits, "TEXTS", 12)
    monkeypatch.setattr(exits, "HELD", 5)
    ends = {"exits": network(1), "plain": network(2), "steps": network(3)}
    maps = Lens(torch.zeros(3, 16, 16), torch.ones(3, 16), adds=True)

    def pieces(model: pb.Model, n: int, seed: int, lengths: Any) -> list[list[int]]:
        assert n == 17
        return [[1 + i, 2, 3, 4, 5] for i in range(n)]

    def trained(start: pb.Model, data: Any, of: Any, seed: int, arms: dict[str, Arm], **plan: Any) -> Any:
        seen.update(data=data, arms=arms, plan=plan)
        return {name: of(ends[name]) for name in arms}

    def tuned_lens(model: pb.Model, data: Any, *, folder: str, seed: int, **how: float) -> None:
        from patchbay.features import lens

        seen.update(lens=(model, data, how))
        lens.save(maps, folder)

    monkeypatch.setattr(lab, "pieces", pieces)
    monkeypatch.setattr(exits, "trained", trained)
    monkeypatch.setattr(exits, "as_costly", lambda network, data, seed: Arm(longer=1.5))
    monkeypatch.setattr(pb.train, "tuned_lens", tuned_lens)
    found = exits._read.__wrapped__(0)
    held, data = pieces(ends["plain"], 17, 0, None)[:5], pieces(ends["plain"], 17, 0, None)[5:]
    assert seen["arms"] == {"exits": Arm("multi-exit"), "plain": Arm(longer=1.5), "steps": Arm()}
    assert seen["data"] == data
    assert seen["plan"] == {"fresh": True, **exits.PLAN}
    assert seen["lens"] == (ends["plain"], data, exits.LENS)
    for name, model in ends.items():
        assert torch.equal(found[name], exits.after_layers(model, held))
    assert torch.equal(found["tuned"], exits.after_layers(ends["plain"], held, maps))
    assert not torch.equal(found["tuned"][:, 0], found["plain"][:, 0])
    assert torch.equal(found["tuned"][:, -1], found["plain"][:, -1])
