"""Path patching: finds planted paths and their channel; equals two runs by hand; frozen senders sum; nothing at random."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.signal.port import Port
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.shares import by_turns
from tests.tolerance import close


def pairs(vocab: int, n: int = 3, length: int = 7, seed: int = 0) -> pb.Task:
    """Random prompts of one length; the twin has two other tokens."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, vocab, (n, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, [1, 3]] = torch.randint(3, vocab, (n, 2), generator=generator)
    right, wrong = torch.randint(3, vocab // 2, (n,), generator=generator), torch.full((n, 1), vocab // 2 + 1)
    return pb.Task("pairs", clean.tolist(), right.tolist(), wrong.tolist(), corrupted.tolist())


def circuit(form: Any, n: int = 10) -> tuple[pb.Model, pb.Task, dict[str, Any]]:
    """Induction, with twins in which the word before the answer's first place is another."""
    built = planted.induction(form=form, seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, n)
    rng, twins = random.Random(0), []
    for clean, first in zip(task.clean, task.marks["first"], strict=True):
        ids = list(clean)
        for at in first:
            ids[at] = rng.choice([token for token in range(3, 60) if token not in clean])
        twins.append(tuple(ids))
    return model, dataclasses.replace(task, corrupted=tuple(twins)), dict(built.truth)


@pytest.mark.parametrize(("mlps", "form"), by_turns(["recomputed", "frozen"], ["gpt2", "llama"], of=2))
def test_planted(form: Any, mlps: Any) -> None:
    """To the logits only the induction head speaks; to it only the previous-token head, and by its keys."""
    model, task, truth = circuit(form)
    direct = pb.prove.path_patching(model, task, mlps=mlps)
    best, *others = direct.table()
    assert str(best["part"]) == truth["induction"]
    assert best["share"] > 0.9
    assert best["relative"] < -0.9
    assert best["low"] > 5
    assert max(abs(row["value"]) for row in others) < 0.1
    assert direct["mlp"].abs().max() < 0.1
    keys, queries, values = (
        pb.prove.path_patching(model, task, receivers=[f"{truth['induction']}.{name}"], mlps=mlps) for name in "kqv"
    )
    best, *others = keys.table()
    assert str(best["part"]) == truth["previous_token"]
    assert best["share"] > 0.9
    assert best["p_adjusted"] < 0.05
    assert max(abs(row["value"]) for row in others) < 0.1
    assert queries.values.nan_to_num().abs().max() < 0.1
    assert values.values.nan_to_num().abs().max() < 0.2
    assert keys.values[1].isnan().all()  # a head cannot speak to one of its own layer
    assert any("2 query heads" in note for note in keys.notes) == (form == "llama")
    back = pb.prove.path_patching(model, task, receivers=[truth["induction"]], way="denoising", mlps=mlps)
    assert str(back.top(1)[0]) == truth["previous_token"]
    assert float(back["share"].nan_to_num().max()) > 0.9


def direct_terms(model: pb.Model, task: pb.Task) -> Tensor:
    """Last logits when every attention's and MLP's write to the stream is replaced by the twin's, by adding the changes up."""
    writes = [Port(s, i) for i in range(model.n_layers) for s in ("attn.out", "mlp.out") if s in model.signals(i)]
    last = Port("resid_out", model.n_layers - 1)
    clean = pb.run(model, task, taps=[*writes, last])
    twins = pb.run(model, [list(ids) for ids in task.corrupted or ()], taps=writes)
    stream = clean[last] + sum(twins[port] - clean[port] for port in writes)
    with torch.no_grad():
        return model.unembed_logits(model.final_norm_module(stream)[:, -1])


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gemma2", "phi", "mixtral", "falcon", "gpt_neo", "bloom", "qwen3_next"]
)
def test_all_senders_with_frozen_mlps_are_the_sum_of_direct_terms(name: str) -> None:
    model = pb.load(twin(name))
    task = pairs(90, length=9)
    layers = [layer for layer in range(model.n_layers) if "attn.z" in model.signals(layer)]
    heads = [pb.Part(layer, "head", h) for layer in layers for h in range(model.n_heads(layer))]
    mixers = [pb.Part(layer, "attn") for layer in range(model.n_layers) if layer not in layers]
    mlps = [pb.Part(layer, "mlp") for layer in range(model.n_layers) if "mlp.out" in model.signals(layer)]
    result = pb.prove.path_patching(model, task, senders=[*heads, *mixers, *mlps], mlps="frozen")
    expected = task.score(direct_terms(model, task)) - task.score(pb.run(model, task).last_logits)
    assert close(float(result["joint"]), -float(expected.mean()), of=1.0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi", "mixtral", "stablelm parallel", "deepseek_v3"])
def test_clean_to_clean_is_zero(name: str) -> None:
    """To the last bit where the machine's matrix products give the same bits twice; never beyond rounding."""
    model = pb.load(twin(name))
    task = pairs(90)
    same = pb.Task("same", task.clean, task.right, task.wrong, task.clean)
    for options in ({}, {"mlps": "frozen"}, {"receivers": ["L1.H1"]}, {"receivers": ["L1.mlp", "L1.H0.q"]}):
        result = pb.prove.path_patching(model, same, **options)  # type: ignore[arg-type]
        assert close(result.values.nan_to_num(), 0.0, of=1.0)
        assert close(result["joint"], 0.0, of=1.0)
        assert result["p"].nan_to_num(1.0).min() == 1.0


def by_hand(
    model: pb.Model, task: pb.Task, sender: pb.Part, receiver: str, frozen: bool
) -> tuple[list[float], list[float]]:
    """Noising effect and relative change of p by hooks on Hugging Face's GPT-2, one prompt at a time, two runs by the paper."""
    blocks, d = model.hf.transformer.h, model.d_model // model.n_heads(0)
    effects, relative = [], []

    def forward(ids: Any, hooks: list[tuple[Any, Any, bool]]) -> Tensor:
        handles = [
            module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            for module, hook, before in hooks
        ]
        with torch.no_grad():
            out = model.hf(torch.tensor([list(ids)])).logits[0, -1].double()
        for handle in handles:
            handle.remove()
        return out

    def reading(store: dict[Any, Tensor]) -> list[tuple[Any, Any, bool]]:
        hooks: list[tuple[Any, Any, bool]] = []
        for i, block in enumerate(blocks):
            hooks.append((block.attn.c_proj, lambda _, args, i=i: store.__setitem__(("z", i), args[0].clone()), True))
            hooks.append((block.mlp, lambda _, __, out, i=i: store.__setitem__(("mlp", i), out.clone()), False))
        return hooks

    for n, (ids, other) in enumerate(zip(task.clean, task.corrupted or (), strict=True)):
        clean: dict[Any, Tensor] = {}
        twins: dict[Any, Tensor] = {}
        plain = forward(ids, reading(clean))
        forward(other, reading(twins))
        hooks: list[tuple[Any, Any, bool]] = []
        for i, block in enumerate(blocks):
            z, out = clean["z", i].clone(), clean["mlp", i]
            if sender.layer == i and sender.kind == "head":
                columns = slice((sender.index or 0) * d, (sender.index or 0) * d + d)
                z[..., columns] = twins["z", i][..., columns]
            hooks.append((block.attn.c_proj, lambda _, args, z=z: (z,), True))
            if sender == pb.Part(i, "mlp"):
                hooks.append((block.mlp, lambda _, __, out, other=twins["mlp", i]: other, False))
            elif frozen:
                hooks.append((block.mlp, lambda _, __, old, out=out: out, False))
        if receiver == "logits":
            patched = forward(ids, hooks)
        else:
            layer, head, which = model.part(receiver[:-2]).layer, model.part(receiver[:-2]).index or 0, receiver[-1]
            at = "qkv".index(which) * model.d_model + head * d
            attn, columns = blocks[layer].attn.c_attn, slice(at, at + d)
            heard: list[Tensor] = []

            def hear(_: Any, __: Any, out: Tensor, heard: list[Tensor] = heard, columns: slice = columns) -> None:
                heard.append(out[..., columns].clone())

            def replace(_: Any, __: Any, out: Tensor, heard: list[Tensor] = heard, columns: slice = columns) -> Tensor:
                new = out.clone()
                new[..., columns] = heard[0]
                return new

            forward(ids, [*hooks, (attn, hear, False)])
            patched = forward(ids, [(attn, replace, False)])
        difference = [float(x[task.right[n]] - x[list(task.wrong[n])].mean()) for x in (plain, patched)]
        p = [float(x.softmax(0)[task.right[n]]) for x in (plain, patched)]
        effects.append(difference[0] - difference[1])
        relative.append((p[1] - p[0]) / p[0])
    return effects, relative


@pytest.mark.parametrize(
    ("receiver", "mlps"), by_turns(["logits", "L2.H1.q", "L2.H3.k", "L1.H0.v"], ["recomputed", "frozen"], of=2)
)
def test_reference(receiver: str, mlps: Any) -> None:
    model = pb.load(twin("gpt2", n_layer=3))
    task = pairs(90)
    receivers = None if receiver == "logits" else [receiver]
    result = pb.prove.path_patching(model, task, receivers=receivers, mlps=mlps, batch_size=17)
    before = 3 if receiver == "logits" else model.part(receiver[:-2]).layer or 0
    for layer in range(before):
        for head in range(4):
            effects, relative = by_hand(model, task, pb.Part(layer, "head", head), receiver, mlps == "frozen")
            assert close(float(result["effect"][layer, head]), sum(effects) / 3, of=1.0)
            assert close(float(result["relative"][layer, head]), sum(relative) / 3, of=1.0)
        effects, _ = by_hand(model, task, pb.Part(layer, "mlp"), receiver, mlps == "frozen")
        assert close(float(result["mlp"][layer]), sum(effects) / 3, of=1.0)
    assert result.values[before:].isnan().all()
    gap = float(result["clean"] - result["corrupted"])
    assert close(result["share"][:before] * gap, result["effect"][:before], dtype=torch.float64)


def test_null() -> None:
    """Random weights, random answers: p values are uniform and no path survives adjustment."""
    ps = []
    for seed in range(8):
        built = planted.null(seed=seed)
        model = pb.load(built.model, built.tokenizer)
        result = pb.prove.path_patching(model, pairs(60, n=12, length=6, seed=seed))
        ps.append(result["p"].flatten())
        assert result["p_adjusted"].min() > 0.005
    p = torch.cat(ps)
    assert 0.33 < float(p.mean()) < 0.67
    assert float((p <= 0.05).double().mean()) < 0.15


def test_a_linear_path_is_the_same_frozen_or_not_where_no_mlp_is_between() -> None:
    model = pb.load(twin("gpt2"))
    task = pairs(90)
    loose, tight = (
        pb.prove.path_patching(model, task, receivers=["L1.H0.q"], mlps=mlps) for mlps in ("recomputed", "frozen")
    )  # type: ignore[arg-type]
    assert not torch.allclose(loose["effect"][0], tight["effect"][0], atol=1e-4)  # layer 0's MLP lies between
    assert close(float(loose["mlp"][0]), float(tight["mlp"][0]), of=1.0)  # nothing between it and layer 1


def test_receivers_by_name_and_by_view_agree() -> None:
    model = pb.load(twin("llama"))
    task = pairs(90)
    head = model.layers[1].heads[2]
    named = pb.prove.path_patching(model, task, receivers=["L1.H2"])
    ports = pb.prove.path_patching(model, task, receivers=[head.q, head.k, head.v])  # type: ignore[list-item]
    view = pb.prove.path_patching(model, task, receivers=[head])  # type: ignore[list-item]
    assert named.agrees(ports, rtol=0.0)
    assert named.agrees(view, rtol=0.0)
    few = pb.prove.path_patching(model, task, senders=["L0.H1", "L0.mlp", "L0.attn"], receivers=["L1.H2"])  # type: ignore[list-item]
    assert close(float(few.values[0]), float(named.values[0, 1]), of=1.0)
    assert pb.replay(named, model)
    mlp = pb.prove.path_patching(model, task, senders=["L1.H0", "L1.mlp"], receivers=["L1.mlp"])  # type: ignore[list-item]
    assert mlp.values.isnan().tolist() == [False, True]
    parallel = pb.load(twin("phi"))
    with pytest.raises(pb.PatchbayError, match="no path to patch"):
        pb.prove.path_patching(parallel, task, senders=["L1.H0"], receivers=["L1.mlp"])  # type: ignore[list-item]


def test_errors_name_what_is_possible() -> None:
    model, task = pb.load(twin("llama")), pairs(90)
    patch = pb.prove.path_patching
    with pytest.raises(pb.PatchbayError, match="possible are recomputed, frozen"):
        patch(model, task, mlps="thawed")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="no corrupted twins"):
        patch(model, pb.Task("bare", task.clean, task.right, task.wrong))
    with pytest.raises(pb.PatchbayError, match="a sender is a head, an MLP"):
        patch(model, task, senders=["L0.N3"])  # type: ignore[list-item]
    with pytest.raises(pb.PatchbayError, match="a receiver is a head"):
        patch(model, task, receivers=["L1"])
    with pytest.raises(pb.PatchbayError, match=r"L1\.H9.*has 4"):
        patch(model, task, receivers=["L1.H9"])
    with pytest.raises(pb.PatchbayError, match="the logits alone"):
        patch(model, task, receivers=["logits", "L1.H1"])
    with pytest.raises(pb.PatchbayError, match="no path to patch"):
        patch(model, task, receivers=["L0.H1"])
    mixed = pb.load(twin("lfm2"))  # its first layer is a convolution: MLPs alone come before the heads of the second
    with pytest.raises(pb.PatchbayError, match=r"no head comes before the receivers L1.*senders=\['L0.mlp'\]"):
        patch(mixed, task, receivers=["L1.H1"])
    assert patch(mixed, task, receivers=["L1.H1"], senders=["L0.mlp"]).values.isfinite().all()  # type: ignore[list-item]
