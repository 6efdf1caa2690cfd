"""Meta-tokens: without one the model is the same to the last bit; labels; who looks at whom; the formula that is no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.blocks import meta_tokens
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task
from tests.blocks.given import IDS, built
from tests.tolerance import close

META = 95


def with_meta() -> torch.Tensor:
    ids = IDS.clone()
    ids[:, [2, 5, 9]] = META
    return ids


def test_without_one_the_layer_adds_exactly_nothing() -> None:
    """The plain formula is no number on such rows; here they add 0, so that the layer could be left out."""
    hf = built(meta_tokens={"id": META, "layers": [1]})
    with torch.no_grad():
        stream = hf.model.layers[0](
            hf.model.embed_tokens(IDS), position_embeddings=hf.model.rotary_emb(IDS.float(), torch.arange(12)[None])
        )
        assert torch.equal(hf(IDS).logits, hf.lm_head(hf.model.norm(stream)))
        assert not close(hf(with_meta()).logits[:, 9:], hf.lm_head(hf.model.norm(stream))[:, 9:])
    closed = torch.full((3, 3), -torch.inf).softmax(-1)
    assert bool(closed.isnan().all())


def test_reference_places_of_it_look_at_earlier_ones() -> None:
    model = pb.load(built(meta_tokens={"id": META, "layers": [1]}))
    assert model.causal
    attn = model.layers[1].attn
    trace = pb.run(model, with_meta(), taps=[attn.pattern, attn.q, attn.k, attn.v, attn.z])
    expected = torch.zeros(2, 4, 12, 12)
    for b in range(2):
        for h in range(4):
            for i in (2, 5, 9):
                keys = [j for j in (2, 5, 9) if j <= i]
                scores = torch.stack([trace[attn.q][b, h, i] @ trace[attn.k][b, h // 2, j] for j in keys]) * 8**-0.5
                expected[b, h, i, keys] = scores.softmax(0)
    assert close(trace[attn.pattern], expected)
    assert close(torch.einsum("bhqk,bhkd->bqhd", expected, trace[attn.v].repeat_interleave(2, 1)), trace[attn.z])
    assert "mlp.act" not in model.signals(1)
    edits = [pb.zero(head.z) for head in model.layers[1].heads]
    table = pb.sweep(model, with_meta(), edits, metric=lambda logits, _: logits[:, 7])
    brute = torch.stack([pb.run(model, with_meta(), edits=[edit]).last_logits[:, 7] for edit in edits])
    assert close(table["value"], brute)


def test_unmasked_it_is_a_layer_of_attention_alone(tmp_path: Any) -> None:
    """The arm of equal compute: it looks everywhere, also without the token; both save and load."""
    for masked in (True, False):
        hf = built(meta_tokens={"id": META, "layers": [1], "masked": masked})
        hf.save_pretrained(tmp_path / str(masked))
        model = pb.load(tmp_path / str(masked))
        with torch.no_grad():
            assert torch.equal(model.hf(with_meta()).logits, hf(with_meta()).logits)
        port = model.layers[1].attn.pattern
        assert bool(close(pb.run(model, IDS, taps=[port])[port].sum(-1), torch.ones(2, 4, 12))) == (not masked)


def test_inserted_tokens_and_their_labels() -> None:
    """What follows the token is predicted at the token: its label stands there, and no label is the token."""
    rows = IDS.tolist()
    texts, labels = meta_tokens.insert(rows, META, share=0.25, seed=1)
    for row, text, label in zip(rows, texts, labels, strict=True):
        assert [token for token in text if token != META] == row
        assert text.count(META) == 3
        assert [-100 if token == META else token for token in text] == label
    assert meta_tokens.insert(rows, META, share=0.25, seed=2)[0] != texts
    assert meta_tokens.insert(rows[1:], META, share=0.0)[0] == rows[1:]
    with pytest.raises(PatchbayError, match="a token that no text holds yet"):
        meta_tokens.insert(rows, rows[0][0])


def test_what_meta_tokens_tell_is_knocked_out_of_their_layer_alone() -> None:
    """A task marks the token's place; without attention to it p changes where the last token is one too, and in the layer of meta-tokens nothing goes to other keys."""
    model = pb.load(built(meta_tokens={"id": META, "layers": [1]}))
    rows = [(*row[:3], META, *row[4:-1], META) for row in IDS.tolist()]
    task = Task("m", tuple(rows), (7, 8), metric="log_probability", marks={"meta": ((3,),) * 2})
    found = pb.prove.attention_knockout(model, task, keys=["meta"], window=1, draws=1)
    port = model.layers[1].attn.pattern
    cut = pb.run(model, rows, edits=[pb.block(port, key=3, query=11)])
    p = [torch.stack([t.last_logits[i].softmax(-1)[7 + i] for i in range(2)]) for t in (cut, pb.run(model, rows))]
    assert close(found["relative"][1, 0], ((p[0] - p[1]) / p[1]).mean())
    assert float(found["control"][1, 0]) == 0.0


def test_dropout_of_the_family_is_the_layers_too() -> None:
    """In training alone, and by its share: what is kept is scaled up, so that the mean is the plain z."""
    q, k, v = (torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    module, meta = torch.nn.Module(), torch.ones(1, 6, dtype=torch.bool)
    torch.manual_seed(0)
    draws = torch.stack([meta_tokens.attend(module, q, k, v, None, meta=meta, dropout=0.5) for _ in range(500)])
    plain = meta_tokens.attend(module.eval(), q, k, v, None, meta=meta, dropout=0.5)
    assert float(draws.std(0).max()) > 0.1
    assert float((draws.mean(0) - plain).abs().max()) < 0.3


def test_what_is_refused() -> None:
    with pytest.raises(PatchbayError, match="a table of the token's id, the layers"):
        built(meta_tokens={"id": META, "layers": [7]})
    with pytest.raises(PatchbayError, match="meta token 200: ids are 0 to 95"):
        built(meta_tokens={"id": 200, "layers": [1]})
    hf = built(meta_tokens={"id": META, "layers": [1]})
    with pytest.raises(PatchbayError, match="where the token stands is read off input_ids"):
        hf(inputs_embeds=hf.model.embed_tokens(IDS))
