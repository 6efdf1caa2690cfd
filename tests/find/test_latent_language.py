"""Latent language: the planted layer is where one language gives way to the other; masses, entropy, energy and kl by loops."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, planted_depth, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.latent_language")
latent_language: Any = module.latent_language


@pytest.mark.parametrize(("layer", "form"), [(2, "gpt2"), (3, "llama")])
def test_planted(layer: int, form: Any) -> None:
    """Cues are answered in A by layer 0 and turned into B at the planted layer: the lens says so, layer by layer."""
    built = planted_depth.pivot(layer=layer, form=form)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    prompts = [[52 if cue != 52 else 53, cue] for cue in truth["cues"]]
    blocks = latent_language(model, prompts, {"A": truth["first"], "B": truth["second"]}, draws=20)
    said = blocks.values  # [layer, group]
    assert said[1 : layer + 1, 0].min() > 0.9
    assert said[layer + 1 :, 1].min() > 0.7
    assert said[0].max() < 0.1
    assert said[1 : layer + 1, 1].max() < 0.05
    groups = [row["group"] for row in blocks.tables["leading"]]
    assert groups[1:] == ["A"] * layer + ["B"] * (model.n_layers - layer)
    assert all(row["p"] < 0.05 for row in blocks.tables["leading"][1:])
    assert f"A (L0 to L{layer - 1})" in blocks.notes[0]
    assert (said[1:].amax(1) > blocks["null_high"][1:].amax(1)).all()
    answers = {name: [[token] for token in truth[key]] for name, key in (("A", "first"), ("B", "second"))}
    each = latent_language(model, prompts, answers, draws=20)  # only the cue's own answer
    assert each.values[layer, 0] > 0.9
    assert each.values[-1, 1] > 0.7


def test_reference() -> None:
    """A twin with a bias in its norm: every reading of two prompts written out; the last layer is the model itself."""
    hf = twins.twin("gpt2")
    prompts, groups = [[5, 6, 7], [8, 9]], {"a": [3, 4, 5, 6], "b": [6, 50, 51]}
    result = latent_language(pb.load(hf), prompts, groups, draws=3, batch_size=1)
    own = {"a": [3, 4, 5], "b": [50, 51]}
    unit = torch.nn.functional.normalize(hf.lm_head.weight.detach().double(), dim=1)
    pairs = [float(u @ w) ** 2 for u in unit for w in unit]
    scale = math.sqrt(sum(pairs) / len(pairs))
    sums = {key: [0.0] * 3 for key in ("a", "b", "entropy", "energy", "kl")}
    for ids in prompts:
        with torch.no_grad():
            out = hf(torch.tensor([ids]), output_hidden_states=True)
            last = out.logits[0, -1].double().softmax(-1)
            for layer in range(3):
                hidden = out.hidden_states[layer][0, -1]
                normed = hidden if layer == 2 else hf.transformer.ln_f(hidden)
                p = hf.lm_head(normed).double().softmax(-1)
                for name, tokens in own.items():
                    sums[name][layer] += sum(float(p[t]) for t in tokens) / 2
                sums["entropy"][layer] -= sum(float(x) * math.log(float(x)) for x in p) / 2
                h = normed.double() / normed.double().norm()
                sums["energy"][layer] += math.sqrt(sum(float(u @ h) ** 2 for u in unit) / len(unit)) / scale / 2
                sums["kl"][layer] += (
                    sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(last, p, strict=True)) / 2
                )
    for n, name in enumerate(own):
        assert close(result.values[:, n].tolist(), sums[name], of=result.values)
    for name in ("entropy", "energy", "kl"):
        assert close(result[name].tolist(), sums[name], of=1.0), name
    assert close(result["kl"][-1], 0.0, of=1.0)
    assert any("1 tokens that groups share were taken out" in note for note in result.notes)


def test_energy_of_an_orthonormal_unembedding_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    states = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    assert close(module._energy(states, rows.T @ rows / 12), torch.ones(5).double())


def test_null() -> None:
    """In a random model the halves of the vocabulary share the lens evenly, no group leads, and neither passes random tokens."""
    built = planted.null(seed=3)
    model = pb.load(built.model, built.tokenizer)
    prompts = torch.randint(3, 64, (40, 5), generator=torch.Generator().manual_seed(0)).tolist()
    result = latent_language(model, prompts, {"a": range(16), "b": range(16, 32)}, draws=40)
    assert (result.values - 0.25).abs().max() < 0.08
    assert (result.values <= result["null_high"] + 0.03).all()
    assert (result["null_mean"] - 0.25).abs().max() < 0.05, "sixteen random tokens of 64"
    whole = latent_language(model, prompts[:4], {"a": range(32), "b": range(32, 64)}, draws=3)
    assert close(whole.values.sum(1), torch.ones(3).double(), dtype=torch.float64)


def test_bad_input_and_state_space_models() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="two names or more"):
        latent_language(model, [[5, 6]], {"a": [5]})
    with pytest.raises(pb.PatchbayError, match="group 'a' shares all its tokens"):
        latent_language(model, [[5, 6]], {"a": [5], "b": [5, 6]})
    with pytest.raises(pb.PatchbayError, match="group 'a' has 1 lists of tokens for 2 prompts"):
        latent_language(model, [[5, 6], [7, 8]], {"a": [[5]], "b": [6]})
    with pytest.raises(pb.PatchbayError, match=r"group 'b': token ids \[64\] are outside 0..63"):
        latent_language(model, [[5, 6]], {"a": [5], "b": [64]})
    mamba = pb.load(twins.twin("mamba2"))
    said = latent_language(mamba, [[5, 6, 7], [8, 9]], {"a": range(40), "b": range(40, 96)}, draws=3)
    assert close(said.values.sum(1), torch.ones(mamba.n_layers + 1).double(), dtype=torch.float64)
    assert close(said["kl"][-1], 0.0, of=1.0)
