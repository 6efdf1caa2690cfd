"""turn.route: forbidden experts are never chosen, forced ones always; every token keeps as many experts as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.tolerance import close

ROUTED = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3", "dots1", "phimoe")


def ids(n: int = 4, length: int = 12) -> Tensor:
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(0))


def routed(model: pb.Model, layer: int, *edits: Any) -> tuple[Tensor, Tensor]:
    """Weights [token, expert] and chosen experts [token, choice]."""
    ports = [pb.Port("router.weights", layer), pb.Port("router.experts", layer)]
    trace = pb.run(model, ids(), taps=ports, edits=edits)
    return tuple(trace[port].flatten(0, 1) for port in ports)  # type: ignore[return-value]


def test_planted() -> None:
    """Without the planted expert its class of words is answered no more; any other expert off changes little."""
    built = planted.routed_expert(seed=2)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    expert, word = truth["expert"], truth["token_id"]

    def said(*knobs: Any) -> Tensor:
        return pb.run(model, truth["prompts"], edits=list(knobs)).last_logits[:, word]

    assert said().mean() > 3
    assert said(pb.turn.route(model, expert)).abs().max() < 0.5
    layer, own = int(expert[1]), int(expert[-1])
    others = [f"L{layer}.E{e}" for e in range(4) if e != own]
    assert all((said(pb.turn.route(model, [other])) - said()).abs().max() < 0.5 for other in others)  # type: ignore[list-item]
    foreign = next(w for w in (" hat", " key") if model.token_id(w) != word)
    before, after = (
        pb.run(model, foreign, edits=edits).last_logits[0, word]
        for edits in ([], [pb.turn.route(model, expert, to="force", strength=0.9)])
    )
    assert before < 0.5
    assert after > 3


@pytest.mark.parametrize("name", ROUTED)
def test_forbidden_experts_add_nothing_and_every_token_keeps_its_number(name: str) -> None:
    model = pb.load(twins.twin(name))
    layer = model.n_layers - 1
    before, _ = routed(model, layer)
    busiest = int(before.mean(0).argmax())
    knob = pb.turn.route(model, f"L{layer}.E{busiest}", texts=ids().tolist())  # type: ignore[arg-type]
    after, chosen = routed(model, layer, knob)
    assert (after[:, busiest] == 0).all()
    corrected = name in ("deepseek_v3", "dots1")  # it may be named there, with weight 0
    assert corrected or not (chosen == busiest).any()
    assert chosen.shape[1] == model.config.num_experts_per_tok
    assert torch.equal(chosen.sort(1).values, torch.stack([row.unique() for row in chosen]))  # all different
    shift = knob.evidence["load"]
    assert shift["load"][busiest] == 0
    assert torch.equal(shift["shift"], shift["load"] - shift["without"])
    assert close(shift["without"][busiest], (before[:, busiest] != 0).float().mean())
    if not corrected:
        assert close(shift["load"].sum(), model.config.num_experts_per_tok)
    forced = pb.turn.route(model, f"L{layer}.E{busiest}", to="boost", strength=1e4)  # type: ignore[arg-type]
    assert corrected or (routed(model, layer, forced)[0][:, busiest] > 0).all()
    assert routed(model, layer, forced)[1].shape[1] == model.config.num_experts_per_tok


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
def test_reference(strength: float) -> None:
    """Mixtral's routing by hand: logits changed, softmax, top-2, divided by their sum; forced weights mixed in after it."""
    model = pb.load(twins.twin("mixtral"))
    port = pb.Port("mlp.in", 1)
    tokens = pb.run(model, ids(), taps=[port])[port].flatten(0, 1)
    logits = tokens @ model.hf.model.layers[1].mlp.gate.weight.detach().T
    for to in ("forbid", "boost", "force"):
        knob = pb.turn.route(model, "L1.E0,L1.E3", to=to, strength=strength)  # type: ignore[arg-type]
        if to == "forbid" and strength != 1.0:
            continue
        changed = logits.clone()
        if to != "force":
            changed[:, [0, 3]] = -torch.inf if to == "forbid" else changed[:, [0, 3]] + strength
        expected = torch.zeros_like(logits)
        for token, p in enumerate(changed.softmax(-1).tolist()):
            best = sorted(range(4), key=p.__getitem__)[2:]
            for e in best:
                expected[token, e] = p[e] / sum(p[i] for i in best)
        if to == "force":
            expected = (1 - strength) * expected + strength * torch.tensor([0.5, 0.0, 0.0, 0.5])
        found, _ = routed(model, 1, knob)
        assert close(found, expected), to


def test_forced_experts_serve_every_token_and_what_is_shared_stays() -> None:
    model = pb.load(twins.twin("qwen2_moe"))
    shared = model.hf.model.layers[1].mlp.shared_expert
    seen: list[Tensor] = []
    hook = shared.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        pb.run(model, ids())
        found, _ = routed(model, 1, pb.turn.route(model, "L1.E1", to="force", strength=0.3))  # type: ignore[arg-type]
    finally:
        hook.remove()
    assert (found[:, 1] >= 0.3 - 1e-6).all()
    assert torch.equal(seen[0], seen[1])


def test_null() -> None:
    """At 0 nothing is edited, bit for bit; an expert that no token chose can be forbidden without effect."""
    built = planted.routed_expert(seed=2)
    model = pb.load(built.model, built.tokenizer)
    plain = pb.run(model, ids()).logits
    expert = built.truth["expert"]
    for to in ("forbid", "boost", "force"):
        assert torch.equal(
            pb.run(model, ids(), edits=[pb.turn.route(model, expert, to=to, strength=0.0)]).logits, plain
        )  # type: ignore[arg-type]
    layer, own = int(expert[1]), int(expert[-1])
    weights, _ = routed(model, layer)
    if not bool((weights[:, own] != 0).any()):
        assert torch.equal(pb.run(model, ids(), edits=[pb.turn.route(model, expert)]).logits, plain)


def test_errors() -> None:
    model = pb.load(twins.twin("mixtral"))
    for experts, options, message in (
        ("L1.H0", {}, "is no expert"),
        ("L1.E9", {}, r"L1\.E9.*has 4"),
        ("L1.E0,L1.E1,L1.E2", {}, "every token needs 2"),
        ("L1.E0", {"to": "on"}, "forbid, boost, force"),
        ([], {}, "no experts"),
        ("L1.E0", {"strength": float("inf")}, "finite number"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.turn.route(model, experts, **options)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match=r"no layer of this gpt2 model has it"):
        pb.turn.route(pb.load(twins.twin("gpt2")), "L1.E0")  # type: ignore[arg-type]
