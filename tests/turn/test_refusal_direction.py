"""turn.refusal_direction: a planted refusal ends and nothing else changes; equals the paper's numbers by hand; no direction where none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import twins
from tests import given
from tests.tolerance import close

REFUSED = 9


def prompts(n: int = 12) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts with a token that is refused (5, 6 or 7) at their end, and with others."""
    rows = torch.randint(20, 60, (2 * n, 5), generator=torch.Generator().manual_seed(0))
    rows[:n, -1] = 5 + torch.arange(n) % 3
    return rows[:n].tolist(), rows[n:].tolist()


def refusing() -> pb.Model:
    """A GPT-2 of weak layers whose tokens 5, 6 and 7 carry a direction that the refusal's word reads."""
    hf = twins.twin("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        u = torch.randn(hf.config.n_embd, generator=torch.Generator().manual_seed(1))
        u /= u.norm()
        for block in hf.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight *= 0.05
        table = hf.transformer.wte.weight
        table -= (table @ u)[:, None] * u
        hf.transformer.wpe.weight -= (hf.transformer.wpe.weight @ u)[:, None] * u
        table[[5, 6, 7]] += 6.0 * table.norm(dim=1).mean() * u
        out = hf.lm_head.weight
        out -= (out @ u)[:, None] * u
        out[REFUSED] = 0.2 * out[REFUSED] + 2.0 * u
    return pb.load(hf)


def test_planted(tmp_path: Path) -> None:
    model = refusing()
    knob = pb.turn.refusal_direction(model, *prompts(20))
    found = knob.evidence["refusal"]
    assert found["refused"].tolist() == [1.0, 0.0]
    assert float(found["random"].min()) > 0.7
    assert float(found["p"]) < 0.1
    assert float(found["kept"]) > 0.9
    assert float(found["induced"]) > 0.0
    assert f"begins with {REFUSED}" in found.notes[1]
    bad = prompts(20)[0]
    knob.export(model, tmp_path / "answers")
    exported = pb.load(str(tmp_path / "answers"))
    assert close(pb.run(exported, bad).logits, pb.run(model, bad, edits=[knob]).logits)


def test_reference() -> None:
    """Means, ablation, induction and KL of a candidate by plain hooks and projected weights on GPT-2."""
    model = refusing()
    hf: Any = model.hf
    bad, good = prompts()
    knob = pb.turn.refusal_direction(model, bad, good, refusal=[REFUSED, 3], tokens=2)
    fitted = {tuple(ids) for ids in knob.provenance["fitted"]}
    sides = [[ids for ids in side if tuple(ids) in fitted] for side in (bad, good)]
    table = {(row["token"], row["layer"]): row for row in knob.evidence["refusal"].tables["candidates"]}
    assert set(table) == {(at, layer) for at in (-2, -1) for layer in (0, 1)}

    def states(ids: Any, layer: int, at: int) -> Tensor:
        with torch.no_grad():
            return hf(torch.tensor(ids), output_hidden_states=True).hidden_states[layer][:, at]

    def refusal(logits: Tensor) -> Tensor:
        p = logits.double().softmax(-1)[:, [3, REFUSED]].sum(-1)
        return p.log() - (1 - p).log()

    r = states(sides[0], 1, -1).double().mean(0) - states(sides[1], 1, -1).double().mean(0)
    row = table[-1, 1]
    add = hf.transformer.h[1].register_forward_pre_hook(lambda _, args: (args[0] + r.float(), *args[1:]))
    with torch.no_grad():
        induced = refusal(hf(torch.tensor(sides[1])).logits[:, -1]).mean()
    add.remove()
    assert close(float(row["induced"]), float(induced), of=10.0)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = hf(torch.tensor(sides[1])).logits[:, -1].double().log_softmax(-1)
        unit = (r / r.norm()).float()
        kept = {name: value.clone() for name, value in hf.state_dict().items()}
        for weight in (hf.transformer.wte.weight, hf.transformer.wpe.weight):
            weight -= (weight @ unit)[:, None] * unit
        for block in hf.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight -= (module.weight @ unit)[:, None] * unit
                module.bias -= (module.bias @ unit) * unit
        left = refusal(hf(torch.tensor(sides[0])).logits[:, -1]).mean()
        moved = hf(torch.tensor(sides[1])).logits[:, -1].double().log_softmax(-1)
        hf.load_state_dict(kept)
    assert close(float(row["left"]), float(left), of=10.0)  # type: ignore[arg-type]
    assert close(float(row["kl"]), float((plain.exp() * (plain - moved)).sum(-1).mean()), of=1.0)  # type: ignore[arg-type]
    chosen = next(one for one in table.values() if knob.name.endswith(f"L{one['layer']}, token {one['token']}"))
    at, layer = int(chosen["token"]), int(chosen["layer"])  # type: ignore[call-overload]
    r = (states(sides[0], layer, at).double().mean(0) - states(sides[1], layer, at).double().mean(0)).float()
    add = hf.transformer.h[layer].register_forward_pre_hook(lambda _, args: (args[0] + r, *args[1:]))
    with torch.no_grad():
        others = refusal(hf(torch.tensor([ids for ids in good if tuple(ids) not in fitted])).logits[:, -1]).mean()
    add.remove()
    assert close(float(knob.evidence["refusal"]["induced"]), float(others), of=10.0)
    allowed = [one for one in table.values() if one["kl"] < 0.1 and one["induced"] > 0 and one["layer"] < 1.6]  # type: ignore[operator]
    best = min(allowed, key=lambda one: one["left"])
    assert knob.name == f"refusal direction of L{best['layer']}, token {best['token']}"


def test_null() -> None:
    """Two groups that differ in nothing: no direction is left, or it ends no more than random ones."""
    rows = torch.randint(3, 60, (24, 5), generator=torch.Generator().manual_seed(3)).tolist()
    with pytest.raises(pb.PatchbayError, match="directions is left.*induces no refusal"):
        pb.turn.refusal_direction(given.lent("gpt2"), rows[:12], rows[12:], kl=10.0)


def test_a_direction_has_to_pass_all_three_tests() -> None:
    model = refusing()
    with pytest.raises(
        pb.PatchbayError, match=r"none of 2 directions is left: 2 moves answered prompts by 1e-12 nats or more"
    ):
        pb.turn.refusal_direction(model, *prompts(), kl=1e-12)
    with pytest.raises(pb.PatchbayError, match=r"2 induces no refusal"):
        pb.turn.refusal_direction(model, *prompts()[::-1], refusal=[REFUSED], kl=100.0)
    with pytest.raises(pb.PatchbayError, match="at least the last token"):
        pb.turn.refusal_direction(model, *prompts(), tokens=0)


def test_behind_a_norm_it_acts_in_runs_and_its_export_says_so(tmp_path: Path) -> None:
    """Gemma 2 norms what a block adds: nothing that is added holds the direction, and no weights could do that."""
    model = given.lent("gemma2")
    bad, good = prompts()
    likely = pb.run(model, bad).last_logits.mean(0).topk(60).indices  # more than half of what it may say
    knob = pb.turn.refusal_direction(model, bad, good, kl=1e6, refusal=likely.tolist())
    [r] = {tuple(torch.linalg.svd(torch.eye(model.d_model) - one.value)[0][:, 0].tolist()) for one in knob.edits[:1]}  # type: ignore[operator]
    ports = [pb.Port(signal, i) for i in range(model.n_layers) for signal in ("attn.out", "mlp.out")]
    trace = pb.run(model, bad, taps=[*ports, pb.Port("resid_out", 1)], edits=[knob])
    for port in (*ports, pb.Port("resid_out", 1)):
        assert float((trace[port] @ torch.tensor(r)).abs().max()) < 1e-4 * float(trace[port].norm(dim=-1).max())
    with pytest.raises(pb.PatchbayError, match="a norm stands between"):
        knob.export(model, tmp_path / "out")
