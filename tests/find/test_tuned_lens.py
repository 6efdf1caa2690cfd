"""find.tuned_lens: trained maps say the answer where the logit lens does not; no maps are the logit lens; what the model does not use is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import patchbay as pb
from patchbay.features import lens as lenses
from patchbay.features.lens import Lens
from tests import given
from tests.lenses import VOCAB, D, answers, blocks, rotation, texts
from tests.tolerance import close


def kept(model: pb.Model, folder: Path, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str:
    bias = torch.zeros(weight.shape[:2]) if bias is None else bias
    return lenses.save(Lens(weight, bias, adds=True, made=lenses.described(model)), folder)


def test_planted(tmp_path: Path) -> None:
    """A turn before the last block is undone; there the lens looks where the model looks."""
    model = blocks(torch.zeros(D, D), rotation() - torch.eye(D))
    folder = kept(model, tmp_path / "lens", (rotation().T - torch.eye(D)).expand(2, D, D))  # what training finds
    task = answers(model)
    found, plain = pb.find.tuned_lens(model, task, folder), pb.find.logit_lens(model, task)
    assert found.labels_of("layer") == ["embed", "L0", "L1"]
    assert (found["rank"][:2, -1] < 0.5).all()
    assert (plain["rank"][:2, -1] > 2).all()
    assert (found["kl"][:2, -1] < 0.1 * plain["kl"][:2, -1]).all()
    assert torch.equal(found["kl"][-1], plain["kl"][-1])
    assert (found["aligned"][:2] > 0.9).all()
    assert close(found["aligned"][2], 1.0)


def test_reference(tmp_path: Path) -> None:
    """h + A h + b of Hugging Face's hidden states through norm and unembedding, and the two gradients' cosine, prompt by prompt."""
    hf = given.gpt2(2, vocab_size=VOCAB)
    model, generator = pb.load(hf), torch.Generator().manual_seed(0)
    weight, bias = 0.3 * torch.randn(2, 32, 32, generator=generator), torch.randn(2, 32, generator=generator)
    task = pb.Task("own", texts(3, 6), [4, 5, 6], [[1]] * 3)
    found = pb.find.tuned_lens(model, task, kept(model, tmp_path / "lens", weight, bias), positions=2, batch_size=2)
    probability, cosine = torch.zeros(2, 2), torch.zeros(2)
    for ids, right in zip(task.clean, task.right, strict=True):
        for depth in (0, 1):
            seen: list[torch.Tensor] = []

            def keep(_: Any, args: Any, seen: list[torch.Tensor] = seen) -> tuple[torch.Tensor]:
                seen.append(args[0].detach().requires_grad_())
                return (seen[0],)

            hook = hf.transformer.h[depth].register_forward_pre_hook(keep)
            logits = hf(torch.tensor([list(ids)])).logits[0, -1]
            hook.remove()
            said = int(logits.argmax())
            own = torch.autograd.grad(logits.log_softmax(-1)[said], seen[0])[0][0, -1]
            for place in (-2, -1):
                h = seen[0][0, place].detach().requires_grad_()
                read = hf.lm_head(hf.transformer.ln_f(h + weight[depth] @ h + bias[depth])).log_softmax(-1)
                probability[depth, place] += float(read[right].detach().exp()) / 3
            theirs = torch.autograd.grad(read[said], h)[0]
            cosine[depth] += float(own @ theirs / own.norm() / theirs.norm()) / 3
    assert close(found.values[:2], probability)
    assert close(found["aligned"][:2], cosine, of=1.0)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "mamba2"])
def test_maps_of_nothing_are_the_logit_lens_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = given.lent(family)
    folder = kept(model, tmp_path / "lens", torch.zeros(model.n_layers, model.d_model, model.d_model))
    task = given.pairs()
    found, plain = pb.find.tuned_lens(model, task, folder), pb.find.logit_lens(model, task)
    for name in plain.variables:
        assert torch.equal(found[name], plain[name]), name


def test_null(tmp_path: Path) -> None:
    """Random maps say no answer, and look no more where the model looks than random directions do."""
    model = blocks(torch.zeros(D, D), rotation() - torch.eye(D))
    generator = torch.Generator().manual_seed(3)
    maps = torch.stack([torch.linalg.qr(torch.randn(D, D, generator=generator))[0] for _ in range(2)]) - torch.eye(D)
    found = pb.find.tuned_lens(model, answers(model, 40), kept(model, tmp_path / "lens", maps))
    assert (found["rank"][:2, -1] - (VOCAB - 1) / 2).abs().max() < 5
    assert (found["aligned"][:2].abs() < 2 / D**0.5).all()


def copy_that_is_not_used() -> pb.Model:
    """The answer's code stands turned in dimensions that the last block wipes, and is looked up by it in the others."""
    half, generator = D // 2, torch.Generator().manual_seed(7)
    key, code = (torch.nn.functional.normalize(torch.randn(VOCAB, half, generator=generator), dim=1) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(half, half, generator=generator))[0]
    read, write = torch.zeros(D, VOCAB + 2 * half), torch.zeros(VOCAB + 2 * half, D)
    sharp = 1 / (1 - (key @ key.T - 2 * torch.eye(VOCAB)).max())  # a neuron for each token, that is on for it alone
    read[:half, :VOCAB], write[:VOCAB, half:] = sharp * key.T, code
    for sign, at in ((1.0, VOCAB), (-1.0, VOCAB + half)):
        read[half:, at : at + half], write[at : at + half, half:] = sign * torch.eye(half), -sign * torch.eye(half)
    bias = torch.cat([torch.full((VOCAB,), float(1 - sharp)), torch.zeros(2 * half)])
    unembed = torch.cat([torch.zeros(VOCAB, half), 4 * code], 1)
    return blocks((read, write), act=nn.ReLU(), embed=torch.cat([key, code @ turn], 1), unembed=unembed, bias=bias)


def test_it_can_use_what_the_model_does_not_and_says_so(tmp_path: Path) -> None:
    """The lens reads a copy that the model wipes: it says the answer, and its gradient lies where the model's does not."""
    model = copy_that_is_not_used()
    task = answers(model, 20)
    with torch.no_grad():  # the model looks at the key alone
        model.hf.transformer.wte.weight[:, D // 2 :] *= -1
    assert pb.run(model, task).last_logits.argmax(-1).tolist() == list(task.right)
    with torch.no_grad():
        model.hf.transformer.wte.weight[:, D // 2 :] *= -1
    pb.train.tuned_lens(model, texts(40), steps=200, rate=0.05, folder=str(tmp_path / "lens"))
    found = pb.find.tuned_lens(model, task, str(tmp_path / "lens"))
    plain = pb.find.logit_lens(model, task)
    assert float(found["kl"][0, -1]) < 0.2 * float(plain["kl"][0, -1])
    assert float(found["aligned"][0]) < 0.5
    told = " ".join(found.notes)
    assert "looks" in told


def test_folders_of_others_are_refused_by_name(tmp_path: Path) -> None:
    model, other = given.lent("gpt2"), given.lent("llama")
    task = given.pairs()
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "params.pt").write_bytes(b"x")
    size = model.n_layers, model.d_model, model.d_model
    nan = kept(model, tmp_path / "nan", torch.full(size, torch.nan))
    narrow = kept(model, tmp_path / "narrow", torch.zeros(model.n_layers, 4, 4))
    whose = kept(other, tmp_path / "other", torch.zeros(other.n_layers, other.d_model, other.d_model))
    jacobian = lenses.save(Lens(torch.zeros(size), torch.zeros(size[:2]), adds=False), tmp_path / "jacobian")
    cases = [
        ("params.pt is a pickle, which runs code.*save_file", tmp_path / "pickled"),
        ("holds no lens", tmp_path / "empty"),
        ("NaN or infinite", nan),
        ("no lens of this model, which has 2 maps of 32 by 32", narrow),
        ("made for another model", whose),
        ("holds a jacobian_lens, and a linear_tuned_lens is asked for", jacobian),
    ]
    for message, folder in cases:
        with pytest.raises(pb.PatchbayError, match=f"(?s){message}"):
            pb.find.tuned_lens(model, task, str(folder))
