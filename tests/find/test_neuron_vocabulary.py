"""Neuron vocabulary: planted names are read back, scores equal plain products, random weights have no names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.given import lent
from tests.shares import by_turns
from tests.tolerance import close


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean().sqrt()


@pytest.mark.parametrize(("side", "form"), by_turns(["in", "out"], ["gpt2", "llama"], of=2))
def test_planted(form: Any, side: Any) -> None:
    """Twenty neurons of a random model read (or write) a token's unembedding row and a tenth of noise: 20 of 20 are named."""
    built = planted.null(form=form, seed=5)
    hf, generator = built.model, torch.Generator().manual_seed(0)
    rows = hf.get_output_embeddings().weight.data
    neurons = torch.randperm(128, generator=generator)[:20].tolist()
    tokens = torch.randperm(len(rows), generator=generator)[:20].tolist()
    for neuron, token in zip(neurons, tokens, strict=True):
        noise = torch.randn(rows.shape[1], generator=generator)
        vector = rows[token] + 0.1 * noise * rows[token].norm() / noise.norm()
        if form == "gpt2":
            mlp = hf.transformer.h[1].mlp
            (mlp.c_fc.weight.data[:, neuron] if side == "in" else mlp.c_proj.weight.data[neuron]).copy_(vector)
        else:
            mlp = hf.model.layers[1].mlp
            (mlp.up_proj.weight.data[neuron] if side == "in" else mlp.down_proj.weight.data[:, neuron]).copy_(vector)
    result = pb.find.neuron_vocabulary(pb.load(hf, built.tokenizer), side=side)
    assert [int(result["tokens"][1, neuron, 0]) for neuron in neurons] == tokens
    assert {str(part) for part in result.top(20)} == {f"L1.N{neuron}" for neuron in neurons}
    assert float(result["p_adjusted"][1, neurons].max()) < 0.05
    assert float(result["share"][1]) >= 20 / 128
    first, best = result.tables["names"][0], result.top(1)[0]
    assert str(first["part"]) == str(best)
    assert first["tokens"][0] == built.tokenizer.decode([int(result["tokens"][1, best.index, 0])])  # type: ignore[index]


def fold(norm: Any, vectors: torch.Tensor, kind: str) -> torch.Tensor:
    """What multiplies a normalised stream, written as what multiplies the stream: gain, and centring in a LayerNorm."""
    gain = norm.weight.detach().double() + (1.0 if kind == "gemma2" else 0.0)
    vectors = vectors * gain
    return vectors - vectors.mean(-1, keepdim=True) if kind == "gpt2" else vectors


@pytest.mark.parametrize(("folded", "name"), by_turns([True, False], ["gpt2", "llama", "gemma2"], of=2))
def test_reference(name: str, folded: bool) -> None:
    """Scores of every token for every neuron as plain sums over the weights, sorted; gains and centring by hand."""
    model = lent(name)
    hf = model.hf
    kind = name
    for side in ("in", "out") if name == "gpt2" else ("in", "gate", "out"):
        result = pb.find.neuron_vocabulary(model, side=side, top=4, fold_norm=folded, draws=50)  # type: ignore[arg-type]
        for layer in range(2):
            if name == "gpt2":
                block = hf.transformer.h[layer]
                before, after, final = block.ln_2, None, hf.transformer.ln_f
                w = block.mlp.c_fc.weight.T if side == "in" else block.mlp.c_proj.weight
            else:
                block = hf.model.layers[layer]
                before, after, final = block.post_attention_layernorm, None, hf.model.norm
                if name == "gemma2":
                    before, after = block.pre_feedforward_layernorm, block.post_feedforward_layernorm
                w = {"in": block.mlp.up_proj.weight, "gate": block.mlp.gate_proj.weight}.get(side)
                w = block.mlp.down_proj.weight.T if w is None else w
            w = w.detach().double()
            if folded and side != "out":
                w = fold(before, w, kind)
            if folded and side == "out" and after is not None:
                w = w * (after.weight.detach().double() + 1.0)
            w_u = hf.lm_head.weight.detach().double()
            if folded:
                w_u = fold(final, w_u, kind)
                w = w - w.mean(-1, keepdim=True) if kind == "gpt2" else w
            for neuron in range(0, model.n_neurons(layer), 7):
                length = sum(float(x) ** 2 for x in w[neuron]) ** 0.5
                scores = [sum(float(a) * float(b) for a, b in zip(row, w[neuron], strict=True)) / length for row in w_u]
                order = sorted(range(len(scores)), key=lambda token: -scores[token])
                assert result["tokens"][layer, neuron].tolist() == order[:4]
                assert close(
                    result["scores"][layer, neuron].tolist(), [scores[i] for i in order[:4]], of=result["scores"]
                )
                margin = scores[order[0]] - scores[order[1]]
                assert close(float(result["margin"][layer, neuron]), margin, of=result["margin"])


def test_the_blocks_of_the_vocabulary_lose_no_token() -> None:
    """A vocabulary of 1,000 and top 10: equal to torch.topk over whole rows, ties and the last partial block included."""
    hf = twins.twin("llama", seed=3)
    hf.resize_token_embeddings(1000, mean_resizing=False)
    torch.nn.init.normal_(hf.lm_head.weight, generator=torch.Generator().manual_seed(0))
    model = pb.load(hf)
    weight = model.unembed.weight
    weight.data[999], weight.data[1] = weight.data[500] * 1.5, weight.data[500] * 1.5
    result = pb.find.neuron_vocabulary(model, side="out", fold_norm=False)
    for layer in range(2):
        w = model.layers[layer].mlp.weights().W_out.detach()
        expected = (w / w.norm(dim=1, keepdim=True) @ weight.detach().T).topk(10)
        assert close(result["scores"][layer], expected.values)
        mine = result["tokens"][layer].sort().values
        assert (mine == expected.indices.sort().values).float().mean() > 0.99


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_null(form: Any) -> None:
    """Random weights: a hundredth of the neurons is above the 99th percentile, and none after adjustment."""
    built = planted.null(form=form, seed=2, d_mlp=1024)
    model = pb.load(built.model, built.tokenizer)
    for side in ("in", "out"):
        result = pb.find.neuron_vocabulary(model, side=side, draws=5000)  # type: ignore[arg-type]
        assert float(result["share"].mean()) == pytest.approx(0.01, abs=0.007)
        assert int((result["p_adjusted"] < 0.05).sum()) == 0
        assert int((result["p_score_adjusted"] < 0.05).sum()) == 0
        assert float(result["p"].mean()) == pytest.approx(0.5, abs=0.03)


def test_agreement_of_two_models() -> None:
    """A slightly moved copy agrees, an independent model agrees no more than neurons paired at random."""
    built = planted.null(seed=1)
    model = pb.load(built.model, built.tokenizer)
    moved = copy.deepcopy(built.model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(
                0.02 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    near = pb.find.neuron_vocabulary(model, other=pb.load(moved, built.tokenizer), draws=200)
    assert near["agreement_all"] > 0.9
    assert near["agreement_low"] <= near["agreement_all"] <= near["agreement_high"]
    assert near["agreement_p"] < 0.01
    other = planted.null(seed=9)
    apart = pb.find.neuron_vocabulary(model, other=pb.load(other.model, other.tokenizer), draws=200)
    assert apart["agreement_p"] > 0.05
    assert float(apart["agreement_all"]) == pytest.approx(float(apart["agreement_null"].mean()), abs=0.03)
    assert float(apart["agreement_null"].mean()) == pytest.approx(1 / 64, abs=0.01)


def test_a_clamped_neuron_raises_the_token_that_it_is_named_after() -> None:
    """In the last layer of the trained model: of the ten neurons whose written name stands out most, eight raise it."""
    model = pb.load("tiny")
    result = pb.find.neuron_vocabulary(model, side="out")
    last = model.n_layers - 1
    best = result["margin"][last].argsort(descending=True)[:10].tolist()
    prompts = pb.tasks.successor(model, 8)
    plain = pb.run(model, prompts).last_logits.log_softmax(-1)
    raised = 0
    for neuron in best:
        token = int(result["tokens"][last, neuron, 0])
        clamp = pb.replace(model.layers[last].mlp.neurons[neuron].act, 3.0)
        clamped = pb.run(model, prompts, edits=[clamp]).last_logits.log_softmax(-1)
        raised += bool((clamped - plain)[:, token].mean() > 0)
    assert raised >= 8


def test_errors_say_what_is_possible() -> None:
    with pytest.raises(pb.PatchbayError, match=r"side='up'; possible are in, gate, out"):
        pb.find.neuron_vocabulary(lent("llama"), side="up")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="have no gate; possible are in, out"):
        pb.find.neuron_vocabulary(lent("gpt2"), side="gate")
    with pytest.raises(pb.PatchbayError, match="top=1: from 2"):
        pb.find.neuron_vocabulary(lent("gpt2"), top=1)
    with pytest.raises(pb.PatchbayError, match=r"moe model offers act; the neurons of its experts .* no port"):
        pb.find.neuron_vocabulary(lent("mixtral"))
    with pytest.raises(pb.PatchbayError, match=r"mamba model offers act; it has no MLP"):
        pb.find.neuron_vocabulary(lent("mamba2"))
    with pytest.raises(pb.PatchbayError, match="the same layers, neurons and vocabulary"):
        pb.find.neuron_vocabulary(lent("gpt2"), other=lent("llama"))
    with pytest.raises(pb.PatchbayError, match=r"other takes a Model from patchbay\.load"):
        pb.find.neuron_vocabulary(lent("gpt2"), other="tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", by_turns(twins.FAMILY_CONFIGS, of=6, start=1))
def test_every_family_is_read_or_refused(name: str) -> None:
    model = lent(name)
    if not any("mlp.act" in model.signals(i) for i in range(model.n_layers)):
        with pytest.raises(pb.PatchbayError, match=r"mlp\.act"):
            pb.find.neuron_vocabulary(model)
        return
    result = pb.find.neuron_vocabulary(model, side="out", draws=20)
    for layer in range(model.n_layers):
        n = model.n_neurons(layer)
        assert bool(result["margin"][layer, :n].isfinite().all())
        assert bool(result["margin"][layer, n:].isnan().all())
        assert n or f"{layer}" in " ".join(result.notes)
