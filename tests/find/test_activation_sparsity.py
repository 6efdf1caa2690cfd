"""Activation sparsity: silent neurons counted exactly, errors and perplexities as loops and hooks, nothing where all matter."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay import maths
from patchbay.find.activation_sparsity import Cut, Measured, Text, bracketed
from patchbay.tiny import text, twins
from tests.given import gpt2
from tests.shares import by_turns
from tests.tolerance import close


@functools.cache
def trained(name: str) -> tuple[pb.Model, list[list[int]]]:
    """A shipped model and sixteen documents that it was not trained on."""
    model = pb.load(name)
    documents = text.documents(5, held_out=True)
    assert model.tokenizer is not None
    return model, [model.tokenizer(next(documents).text)["input_ids"][:48] for _ in range(16)]


def ids(n: int, vocab: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (6 + i % 5,), generator=generator).tolist() for i in range(n)]


def small(seed: int = 0) -> Any:
    return gpt2(seed)


@pytest.mark.parametrize("how", ["dead", "unread"])
def test_planted_silent_neurons_are_counted_exactly(how: str) -> None:
    """37 neurons of layer 0 and 5 of layer 1 that never fire, or that write nothing: at CETT 0 they are what is left out."""
    hf = small()
    for layer, n in ((0, 37), (1, 5)):
        mlp = hf.transformer.h[layer].mlp
        if how == "dead":
            mlp.c_fc.bias.data[:n] = -1e4  # gelu gives 0
        else:
            mlp.c_proj.weight.data[:n] = 0.0
    model = pb.load(hf)
    prompts = ids(8, 40)
    result = pb.find.activation_sparsity(model, prompts, baselines=False)
    assert close(float(result["curve_sparsity"][0]), 42 / 256, of=result["curve_sparsity"])
    assert float(result["curve_ratio"][0]) == 1.0
    whole = Text(model, prompts, [0, 1], 4)
    nothing = whole.measure(Cut("c", {0: 0.0, 1: 0.0}))
    assert close([nothing.sparsity[0], nothing.sparsity[1]], [37 / 128, 5 / 128])
    assert torch.equal(whole.loss(Cut("c", {0: 0.0, 1: 0.0}))[0].nats, whole.whole.nats)


def test_planted() -> None:
    """Nine tenths of the trained model's neurons made to write a ten-thousandth: PPL-1 % leaves out at least these."""
    model = pb.load("tiny")
    generator = torch.Generator().manual_seed(0)
    for block in model.hf.transformer.h:
        faint = torch.randperm(512, generator=generator)[:460]
        block.mlp.c_proj.weight.data[faint] *= 1e-4
    result = pb.find.activation_sparsity(model, trained("tiny")[1], baselines=False)
    assert bool((result.values > 0.89).all())
    assert float(result["ratio"]) <= 1.01


@pytest.mark.parametrize("name", by_turns(["tiny", "tiny-llama"], of=2, start=1))
def test_reference(name: str) -> None:
    """Thresholds, errors, sparsity and both ratios, with hooks on the plain model and sums over neurons."""
    model, prompts = trained(name)
    result = pb.find.activation_sparsity(model, prompts, percent=2.0, batch_size=5)
    hf = model.hf
    if name == "tiny":
        blocks = [(b.mlp.c_proj, b.mlp.c_proj.weight.detach()) for b in hf.transformer.h]
    else:
        blocks = [(b.mlp.down_proj, b.mlp.down_proj.weight.detach().T) for b in hf.model.layers]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    half = sorted(order[: (len(prompts) + 1) // 2])
    sides = {"": [prompts[i] for i in half], "_held_out": [prompts[i] for i in range(16) if i not in half]}
    thresholds = result["threshold"].tolist()

    def loss(side: list[list[int]], cut: bool) -> tuple[float, list[list[float]], list[list[float]]]:
        errors: list[list[float]] = [[] for _ in blocks]
        left_out: list[list[float]] = [[] for _ in blocks]
        hooks = []
        for layer, (module, w) in enumerate(blocks):
            length = (w**2).sum(1) ** 0.5

            def hook(_: Any, args: Any, layer: int = layer, w: Any = w, length: Any = length) -> Any:
                act = args[0].clone()
                for token in act[0]:
                    size = token.abs() * length
                    faint = size < thresholds[layer]
                    whole = (token @ w).norm()
                    errors[layer].append(float((token[faint] @ w[faint]).norm() / whole))
                    left_out[layer].append(float((faint | (size == 0)).double().mean()))
                    if cut:
                        token[faint] = 0.0
                return (act,)

            hooks.append(module.register_forward_pre_hook(hook))
        nats = n = 0.0
        for row in side:
            with torch.no_grad():
                logits = hf(torch.tensor([row])).logits[0].log_softmax(-1)
            nats -= sum(float(logits[i, row[i + 1]]) for i in range(len(row) - 1))
            n += len(row) - 1
        for hook in hooks:
            hook.remove()
        return nats / n, errors, left_out

    for end, side in sides.items():
        plain, errors, _ = loss(side, cut=False)
        under, _, left_out = loss(side, cut=True)
        assert close(float(result[f"ratio{end}"]), math.exp(under - plain), of=1.0)
        overall = sum(sum(row) / len(row) for row in left_out) / len(left_out)
        assert close(float(result["overall" if not end else "sparsity_held_out"]), overall, of=1.0)
        if not end:
            assert close(float(result["perplexity"]), math.exp(plain))
            for layer, row in enumerate(errors):  # all tokens of the half are stored: there are fewer than 512
                assert close(float(result["cett_layer"][layer]), sum(row) / len(row), of=result["cett_layer"])
                assert close(float(result.values[layer]), sum(left_out[layer]) / len(row), of=result.values)
    assert bool((result["cett_layer"] <= float(result["cett"]) + 1e-6).all())
    assert 1.02 - 1e-3 <= float(result["ratio"]) <= 1.02
    assert result["ratio_low"] <= result["ratio_held_out"] <= result["ratio_high"]


def test_baselines_keep_what_they_say() -> None:
    """Top-k keeps k neurons at every token, those of largest c; FAT those of largest activation; same bound for all."""
    model, prompts = trained("tiny")
    here = Text(model, prompts[:4], [0, 1, 2], 4)
    act, norms = torch.randn(2, 3, 512), here.norms[0]
    keep = Cut("top_k", {0: 100.0}).keep(0, act, norms)
    assert keep.sum(-1).tolist() == [[100] * 3] * 2
    size = act.abs() * norms
    assert float(size[0, 0][keep[0, 0]].min()) >= float(size[0, 0][~keep[0, 0]].max())
    fat = Cut("fat", {0: 0.5}).keep(0, act, norms)
    assert torch.equal(fat, act.abs() >= 0.5)
    result = pb.find.activation_sparsity(model, prompts, percent=5.0)
    assert result.labels_of("condition") == ["cett", "top_k", "fat"]
    assert bool((result["ratio_reached"] <= 1.05).all())
    assert bool((result["ratio_reached"] > 1.04).all())
    assert bool((result["at_equal_ratio"] > 0.1).all())


def test_the_search_comes_from_above() -> None:
    """Where the ratio falls below 1 first and rises then, the larger of the points that keep the bound is taken."""
    tried: list[float] = []

    def ratio(x: float) -> Measured:
        tried.append(x)
        return Measured(1.0 + 0.4 * (x - 0.1) * (x - 0.5) * (x - 0.05) * 20, {}, x)

    best, found = bracketed(ratio, (0.0, 0.07, 0.2, 0.4, 0.6, 0.9), 1.01)
    assert 0.5 < best < 0.6
    assert 1.01 - 1e-3 <= found.ratio <= 1.01
    assert tried[:2] == [0.9, 0.6]
    always, _ = bracketed(lambda x: Measured(1.0, {}, x), (0.0, 0.5), 1.01)
    assert always == 0.5


def test_null() -> None:
    """All neurons write the same share of what the text needs: none can be left out."""
    hf = small(3)
    favoured = hf.lm_head.weight.data[5:9].sum(0)
    for block in hf.transformer.h:
        block.mlp.c_fc.weight.data.zero_()
        block.mlp.c_fc.bias.data.fill_(1.0)
        block.mlp.c_proj.weight.data.copy_((40.0 * favoured / 128)[None].expand(128, -1))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 9, (12,), generator=generator).tolist() for _ in range(8)]
    result = pb.find.activation_sparsity(pb.load(hf), prompts)
    assert result.values.tolist() == [0.0, 0.0]
    assert float(result["ratio"]) == 1.0
    assert float(result["at_equal_ratio"][2]) == 0.0  # equal activations, too


def test_batches_do_not_matter() -> None:
    model, prompts = trained("tiny-llama")
    one = pb.find.activation_sparsity(model, prompts[:6], baselines=False, batch_size=1)
    assert pb.find.activation_sparsity(model, prompts[:6], baselines=False, batch_size=16).agrees(one, 2e-3)


def test_edits_that_are_on_stay_on() -> None:
    """Under an edit that silences half of a layer, these neurons are left out at CETT 0."""
    model = pb.load(small())
    keep = torch.ones(128)
    keep[:64] = 0.0
    with model.edited(pb.scale(model.layers[1].mlp.act, keep)):
        result = pb.find.activation_sparsity(model, ids(8, 40), baselines=False)
    assert close(float(result["curve_sparsity"][0]), 64 / 256, of=result["curve_sparsity"])


@pytest.mark.parametrize("name", ["opt", "gemma2", "phi3", "falcon", "bloom", "deepseek_v3", "lfm2"])
def test_families(name: str) -> None:
    model = pb.load(twins.twin(name))
    result = pb.find.activation_sparsity(model, ids(6, 90), baselines=False)
    for layer in range(model.n_layers):
        assert bool(result.values[layer].isfinite()) == ("mlp.act" in model.signals(layer))
    assert float(result["curve_ratio"][0]) == 1.0


def test_bad_input() -> None:
    find, model = pb.find.activation_sparsity, pb.load(small())
    with pytest.raises(pb.PatchbayError, match="percent=-1.0: by how many"):
        find(model, ids(4, 40), percent=-1.0)
    with pytest.raises(pb.PatchbayError, match=r"needs two of two tokens or more, got 1"):
        find(model, [[5, 6, 7], [8]])
    with pytest.raises(pb.PatchbayError, match=r"no layer of this moe model offers act"):
        find(pb.load(twins.twin("mixtral")), ids(4, 40))


def test_the_interval_of_a_ratio_draws_prompts_anew() -> None:
    """Nats and tokens of a prompt are drawn together; ends at 2.5 and 97.5 %."""
    generator = torch.Generator().manual_seed(0)
    plain, rise = torch.rand(20, generator=generator).double(), torch.rand(20, generator=generator).double()
    tokens = torch.randint(3, 9, (20,), generator=generator)
    seen: Any = SimpleNamespace(
        prompts=[[0]] * 20,
        whole=SimpleNamespace(nats=plain),
        loss=lambda cut: (SimpleNamespace(nats=plain + rise, tokens=tokens), None),
    )
    found = Text.interval(seen, {}, 0)  # type: ignore[arg-type]
    assert close(
        torch.tensor(found).double(), torch.stack(maths.intervals(rise[:, None], tokens)[1:])[:, 0].exp(), of=1.0
    )
