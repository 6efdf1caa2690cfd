"""turn.remove_direction: nothing writes the direction any more; exported it is the orthogonalised weights; no direction, no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.tolerance import NOISE, close

FAMILIES = (
    "gpt2",
    "llama",
    "mixtral",
    "gpt_oss",
    "qwen2_moe",
    "deepseek_v3",
    "qwen3_next",
    "mamba2",
    "lfm2",
    "bamba",
)


def ids(n: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """Without the planted direction the word that reads it has no logit left; a random direction leaves it more than half."""
    built = planted.steering(form=form, seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    tokens, word = torch.tensor(truth["positive_ids"])[:, None], truth["token_id"]
    knob = pb.turn.remove_direction(model, truth["direction"])
    before, after = (pb.run(model, tokens, edits=edits).last_logits[:, word] for edits in ([], [knob]))
    assert before.mean() > 1.3
    assert after.abs().max() < 0.2
    random = pb.turn.remove_direction(model, torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)))
    assert pb.run(model, tokens, edits=[random]).last_logits[:, word].mean() > before.mean() / 2


def test_reference() -> None:
    """The weights orthogonalised by hand: W_E, c_proj of attention and MLP with their biases, less their part along d."""
    hf = twins.twin("gpt2", tie_word_embeddings=False)
    model = pb.load(hf)
    d = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    unit = d / d.norm()
    found = pb.run(model, ids(), edits=[pb.turn.remove_direction(model, d)]).logits
    plain = pb.run(model, ids()).logits
    with torch.no_grad():
        for table in (hf.transformer.wte.weight, hf.transformer.wpe.weight):
            table -= (table @ unit)[:, None] * unit
        for block in hf.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight -= (module.weight @ unit)[:, None] * unit
                module.bias -= (module.bias @ unit) * unit
        expected = hf(ids()).logits
    assert close(found, expected)
    assert float((found - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_never_holds_it_and_the_checkpoint_is_the_same(name: str, tmp_path: Path) -> None:
    model = pb.load(twins.twin(name))
    d = torch.randn(model.d_model, generator=torch.Generator().manual_seed(2))
    knob = pb.turn.remove_direction(model, d)
    ports = [model.layers[i].resid_out for i in range(model.n_layers)]
    seen = pb.run(model, ids(), taps=ports, edits=[knob])
    for port in ports:
        assert close(seen[port] @ (d / d.norm()), 0.0, of=seen[port])
    written = knob.export(model, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert close(back(ids()).logits, seen.logits, noise=4 * NOISE)  # every weight was rounded once more
    assert written.changed
    assert float((seen.logits - pb.run(model, ids()).logits).abs().max()) > 1e-3


def test_null() -> None:
    """At 0 nothing is edited; a direction that the stream never has changes nothing."""
    built = planted.steering(seed=0)
    model = pb.load(built.model, built.tokenizer)
    knob = pb.turn.remove_direction(model, torch.ones(model.d_model))  # GPT-2 form: all that is written is mean-free
    assert knob.at(0.0).edits_at() == []
    assert close(pb.run(model, ids(), edits=[knob]).logits, pb.run(model, ids()).logits)


def test_some_layers_and_what_is_refused() -> None:
    model = pb.load(twins.twin("llama"))
    d = torch.ones(model.d_model)
    assert [str(edit.port) for edit in pb.turn.remove_direction(model, d, layers=[1]).edits] == [
        "L1.attn.out",
        "L1.mlp.out",
    ]
    with pytest.raises(pb.PatchbayError, match=r"layers \[7\]: the model has layers 0\.\.1"):
        pb.turn.remove_direction(model, d, layers=[7])
    gemma = pb.load(twins.twin("gemma2"))
    with pytest.raises(pb.PatchbayError, match="a norm stands between the last linear map and the stream"):
        pb.turn.remove_direction(gemma, d).export(gemma, "never-written")
    with pytest.raises(pb.PatchbayError, match="31 numbers: the stream of this model has 32"):
        pb.turn.remove_direction(model, torch.ones(31))
