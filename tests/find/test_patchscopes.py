"""Patchscopes: a state says its own next token where nothing else speaks; equals hooks by hand; a state at its own place changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from tests import given
from tests.tolerance import close

SOURCES = [[5, 6, 7, 8], [11, 12, 13, 14], [20, 21, 22, 23]]
TARGET = [30, 31, 32, 33]


def alone() -> pb.Model:
    """A GPT-2 in which no token hears another."""
    hf = given.gpt2(0)
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_proj.weight.zero_()
    return pb.load(hf)


def test_planted() -> None:
    """Where no token hears another, the state of a prompt's end says in any prompt of the same length what the prompt says next."""
    model = alone()
    found = pb.find.patchscopes(model, SOURCES, TARGET, max_new_tokens=1)
    own = [str(row[0]) for row in model.generate(SOURCES, 1, new_only=True)]
    assert [row["text"] for row in found.tables["said"]] == [text for text in own for _ in range(2)]
    assert float(found["kl"].min()) > 1e-3
    assert "kl_other" in found


def by_hand(hf: Any, layer: int, places: list[int], value: Tensor | None, way: str, n: int) -> tuple[Tensor, list[int]]:
    """The first law and the tokens of the target with a state put in by a hook, without a cache."""
    ids, laws = list(TARGET), []

    def put(_: Any, args: Any) -> Any:
        x = args[0].clone()
        for at in places:
            assert value is not None
            x[0, at] = value if way == "replace" else x[0, at] + x[0, at].norm() * value / value.norm()
        return (x, *args[1:])

    for _ in range(n):
        hook = hf.transformer.h[layer].register_forward_pre_hook(put) if value is not None else None
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1]
        if hook is not None:
            hook.remove()
        laws.append(logits)
        ids.append(int(logits.argmax()))
    return laws[0].double().log_softmax(-1), ids[len(TARGET) :]


@pytest.mark.parametrize(("way", "into"), [("replace", [0, 1]), ("add", 1)])
def test_reference(way: Any, into: Any) -> None:
    """Text and numbers of every state, and of a random direction and another prompt's state, by plain hooks."""
    model = given.lent("gpt2")
    hf: Any = model.hf
    found = pb.find.patchscopes(
        model, SOURCES, TARGET, placeholder=[1, 2], layers=[0, 1], into=into, way=way, max_new_tokens=3
    )
    with torch.no_grad():
        states = torch.stack(
            [
                torch.stack(hf(torch.tensor([row]), output_hidden_states=True).hidden_states[:2])[:, 0, -1]
                for row in SOURCES
            ],
            1,
        )
    random = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    random = random / random.norm(dim=-1, keepdim=True) * states.norm(dim=-1, keepdim=True)
    for row in found.tables["said"]:
        n, layer = int(row["prompt"]), int(row["layer"])
        other, at = states[layer, (n + 1) % 3], int(row.get("into", 1))
        said = {
            kind: by_hand(hf, at, [1, 2], value, way, 3)
            for kind, value in (("text", states[layer, n]), ("random", random[layer, n]), ("other", other))
        }
        for kind, (_, ids) in said.items():
            assert row[kind] == " ".join(map(str, ids)), kind
        own = said["text"][0]
        for name, kind in (("kl", "random"), ("kl_other", "other")):
            grid = found[name][n, layer]
            asked = grid[at] if isinstance(into, list) else grid
            assert close(float(asked), float((own.exp() * (own - said[kind][0])).sum()), of=1.0)
    assert len(found.tables["said"]) == 3 * 2 * (2 if isinstance(into, list) else 1)


def test_a_state_in_its_own_place_changes_nothing() -> None:
    model = given.lent("llama")
    found = pb.find.patchscopes(model, [TARGET, SOURCES[0]], TARGET, max_new_tokens=4)
    plain = " ".join(map(str, model.generate([TARGET], 4, new_only=True)[0]))
    assert {row["text"] for row in found.tables["said"] if row["prompt"] == 0} == {plain}


def test_null() -> None:
    """The same prompt twice says nothing more than the other one, and a token that nobody hears says nothing at all."""
    model = given.lent("gpt2")
    assert float(pb.find.patchscopes(model, [SOURCES[0]] * 2, TARGET, max_new_tokens=1)["kl_other"].abs().max()) == 0.0
    unheard = pb.find.patchscopes(alone(), SOURCES, TARGET, placeholder=0, max_new_tokens=1)
    assert float(unheard["kl"].abs().max()) == 0.0
    assert "6 of them say less" in unheard.notes[0]


def test_what_is_refused() -> None:
    model = given.lent("gpt2")
    for wrong in (9, [], [0, 7]):
        with pytest.raises(pb.PatchbayError, match="stands nowhere in the target of 4 tokens"):
            pb.find.patchscopes(model, SOURCES, TARGET, placeholder=wrong)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="layers are 0 to 1"):
        pb.find.patchscopes(model, SOURCES, TARGET, into=2)
    for beyond in ([0, 2], []):
        with pytest.raises(pb.PatchbayError, match="layers are 0 to 1"):
            pb.find.patchscopes(model, SOURCES, TARGET, into=beyond)
    with pytest.raises(pb.PatchbayError, match="replace"):
        pb.find.patchscopes(model, SOURCES, TARGET, way="mix")  # type: ignore[arg-type]
