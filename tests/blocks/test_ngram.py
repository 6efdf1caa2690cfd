"""N-gram layers: the mean as loops, nothing changed at the start, saving, what they cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchbay as pb
from patchbay.blocks import ngram
from patchbay.find._attention import after_earlier
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins
from tests.blocks.given import IDS, built
from tests.tolerance import close

TEXT = torch.randint(0, 4, (3, 14), generator=torch.Generator().manual_seed(1))


def test_reference_the_mean_of_what_followed() -> None:
    """As loops over places, and the same places as those at which `find.ngram_heads` looks."""
    for order in (1, 2, 3):
        layer = ngram.NGram(5, order)
        with torch.no_grad():
            layer.A.normal_()
            layer.B.normal_()
        h = torch.randn(3, 14, 5, generator=torch.Generator().manual_seed(order))
        expected = torch.zeros(3, 14, 5)
        for b, ids in enumerate(TEXT.tolist()):
            for i in range(14):
                before = ids[i - order + 1 : i + 1]
                keys = [j for j in range(order, i) if i + 1 >= order and ids[j - order : j] == before]
                mean = torch.stack([h[b, j] for j in keys]).mean(0) if keys else torch.zeros(5)
                expected[b, i] = layer.A @ mean + layer.B @ h[b, i]
            assert torch.equal(ngram.followers(TEXT, order)[b], after_earlier(ids, order))
        assert close(layer(h, TEXT), expected)


def test_planted_it_says_what_followed_last_time() -> None:
    """A table of unit vectors, A the identity and B zero: out comes the share of each token among those that followed."""
    layer = ngram.NGram(4, 2)
    with torch.no_grad():
        layer.A.copy_(torch.eye(4))
        layer.B.zero_()
        ids = torch.tensor([[0, 1, 2, 0, 1, 3, 0, 1]])
        said = layer(torch.eye(4)[ids], ids)[0]
    assert said[-1].tolist() == [0.0, 0.0, 0.5, 0.5]
    assert said[4].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert not bool(said[:4].any())


def test_null_at_the_start_nothing_changes_and_a_new_text_never_does() -> None:
    plain = twins.twin("llama")
    hf = pb.blocks.build(plain, ngram=[1, 2])
    assert torch.equal(hf(TEXT).logits, plain(TEXT).logits)
    with torch.no_grad():
        for layer in hf.get_input_embeddings().ngrams:
            layer.A.normal_()
    new = torch.arange(3, 15)[None]
    assert torch.equal(hf(new).logits, plain(new).logits)
    assert not close(hf(TEXT).logits, plain(TEXT).logits)


def test_it_is_a_model_with_parts_that_saves_and_loads(tmp_path: Any) -> None:
    hf = built(ngram=2)
    with torch.no_grad():
        hf.get_input_embeddings().ngrams[0].A.normal_()
    model = pb.load(hf)
    table = hf.get_input_embeddings().weight
    trace = pb.run(model, TEXT, taps=[model.embed.out, model.layers[0].resid_in])
    layer = hf.get_input_embeddings().ngrams[0]
    assert close(trace[model.embed.out], layer(table[TEXT], TEXT))
    assert torch.equal(trace[model.layers[0].resid_in], trace[model.embed.out])
    hf.save_pretrained(tmp_path / "model")
    again = pb.load(tmp_path / "model")
    assert torch.equal(pb.run(again, TEXT).logits, trace.logits)
    said = hf.generate(TEXT[:1] + 3, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(said[0, -1], hf(said[:, :-1]).logits[0, -1].argmax())


def test_what_cannot_be_is_refused() -> None:
    for given in (0, [], True, "2", [1, 0]):
        with pytest.raises(PatchbayError, match="how many last tokens must have come before"):
            built(ngram=given)
    hf = built(ngram=1)
    with pytest.raises(PatchbayError, match="what came before is read off input_ids"):
        hf(inputs_embeds=hf.get_input_embeddings()(IDS))
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 12, 8), torch.zeros(2, 2, 12, 8), 0)
    with pytest.raises(PatchbayError, match="which a cache does not hold"):
        hf(IDS[:, -1:], past_key_values=cache)
