"""train.tuned_lens: a rotation is undone, the formula and its first step by plain loops, shuffled rows reach what frequencies give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import patchbay as pb
from tests import given
from tests.lenses import VOCAB, D, blocks, rotation, texts
from tests.tolerance import close


def test_planted(tmp_path: Path) -> None:
    """The last block turns the stream: the lens before it is that turn, and where the stream is final already it stays 0."""
    turn = rotation()
    model = blocks(torch.zeros(D, D), turn - torch.eye(D))
    found = pb.train.tuned_lens(model, texts(40), steps=250, rate=0.05, folder=str(tmp_path / "lens"))
    assert found.labels_of("layer") == ["embed", "L0"]
    assert (found["kl_logit_lens"] > 2).all()
    assert (found["kl"] < 0.05).all()
    assert (found["null"] > 1).all()
    kept = load_file(tmp_path / "lens" / "params.safetensors")
    for depth in range(2):
        map_ = torch.eye(D) + kept[f"{depth}.weight"]  # of rows h, written h A^T as torch's Linear does
        assert float(torch.nn.functional.cosine_similarity(map_.T.flatten(), turn.flatten(), dim=0)) > 0.95


def plain_kl(hf: Any, ids: list[int], depth: int, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    """KL of each token, one at a time, from Hugging Face's own hidden states."""
    out = hf(torch.tensor([ids]), output_hidden_states=True)
    found = []
    for place in range(len(ids)):
        h = out.hidden_states[depth][0, place].detach()
        p = out.logits[0, place].detach().log_softmax(-1)
        q = hf.lm_head(hf.transformer.ln_f(h + weight @ h + bias)).log_softmax(-1)
        found.append(sum(p[v].exp() * (p[v] - q[v]) for v in range(len(p))))
    return found


def test_reference(tmp_path: Path) -> None:
    """Adam's first step is the sign of the mean gradient of the divergence; what is told is of texts that were not trained on."""
    hf = given.gpt2(3, vocab_size=VOCAB)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    prompts = texts(3, 5)
    folder = tmp_path / "lens"
    found = pb.train.tuned_lens(pb.load(hf), prompts, steps=1, rate=0.01, batch_size=3, folder=str(folder), seed=4)
    kept = load_file(folder / "params.safetensors")
    nothing = torch.zeros(32, 32), torch.zeros(32)
    with torch.no_grad():
        plain = torch.tensor(
            [[float(sum(plain_kl(hf, ids, depth, *nothing))) / 5 for ids in prompts] for depth in (0, 1)]
        )
    held = int((plain[0] - found["kl_logit_lens"][0]).abs().argmin())  # one of three is held out
    assert close(found["kl_logit_lens"], plain[:, held])
    for depth in (0, 1):
        weight, bias = (x.requires_grad_() for x in nothing)
        terms = [x for i, ids in enumerate(prompts) if i != held for x in plain_kl(hf, ids, depth, weight, bias)]
        gradient = torch.autograd.grad(sum(terms) / len(terms), (weight, bias))  # type: ignore[arg-type]
        for name, expected in zip(("weight", "bias"), gradient, strict=True):
            step = kept[f"{depth}.{name}"]
            clear = expected.abs() > 0.05 * expected.abs().max()
            assert clear.double().mean() > 0.5
            assert close(step[clear], -0.01 * expected[clear].sign())
        with torch.no_grad():
            told = sum(plain_kl(hf, prompts[held], depth, kept[f"{depth}.weight"], kept[f"{depth}.bias"])) / 5
        assert close(float(found["kl"][depth]), float(told), of=1.0)


def test_null() -> None:
    """Where the stream says nothing of the model's answer (it forgets all tokens and reads places alone), no lens is better than shuffled rows."""
    forgets = -torch.eye(D)
    model = blocks(forgets, unembed=torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        model.hf.transformer.h[0].mlp.c_proj.bias.normal_(generator=torch.Generator().manual_seed(2))
    found = pb.train.tuned_lens(pb.load(model.hf), texts(20), steps=100, rate=0.03)
    assert close(found["kl"], found["null"])  # one answer for all tokens: shuffling changes nothing
    assert any("not below the lens of shuffled rows" in note for note in found.notes)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = given.lent("gpt2")
    (tmp_path / "there").mkdir()
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("two or more are needed", texts(1), {}),
        ("steps=0", texts(3), {"steps": 0}),
        ("a rate above 0", texts(3), {"rate": 0.0}),
        ("already there", texts(3), {"folder": str(tmp_path / "there")}),
    ]
    for message, prompts, options in cases:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.train.tuned_lens(model, prompts, **options)
