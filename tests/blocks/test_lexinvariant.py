"""Lexinvariant models: renamed tokens, a fixed table that is a tied model, tables that follow from prompts, and training without one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.blocks import lexinvariant
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins
from tests.blocks.given import IDS
from tests.tolerance import close


def made() -> Any:
    config = twins.twin("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return pb.blocks.build(config, lexinvariant=True)


def test_renamed_tokens_move_the_logits_with_them() -> None:
    hf, table = made(), torch.randn(96, 32) * 32**-0.5
    names = torch.randperm(96, generator=torch.Generator().manual_seed(1))  # token t is called names[t]
    moved = torch.empty_like(table)
    moved[names] = table
    with torch.no_grad():
        plain, renamed = lexinvariant.logits(hf, IDS, table), lexinvariant.logits(hf, names[IDS], moved)
    assert torch.equal(renamed[:, :, names], plain)


def test_a_fixed_table_is_an_ordinary_tied_model(tmp_path: Any) -> None:
    hf = made()
    weight = hf.get_input_embeddings().weight
    assert not weight.requires_grad
    assert abs(float(weight.norm(dim=1).mean()) - 1) < 0.05
    with torch.no_grad():
        assert close(hf(IDS).logits, lexinvariant.logits(hf, IDS, weight))
    model = pb.load(hf)
    assert model.family.name == "llama"
    hf.save_pretrained(tmp_path)
    again = pb.load(tmp_path).hf
    assert torch.equal(again.get_input_embeddings().weight, weight)
    before = weight.clone()
    lexinvariant.freeze(hf, seed=3)
    assert not torch.equal(weight, before)
    assert torch.equal(hf.get_output_embeddings().weight, weight)


def test_a_batch_equals_its_prompts() -> None:
    hf = made()
    tables = lexinvariant.tables(IDS, 96, 32)
    assert torch.equal(tables[1], lexinvariant.tables(IDS[1:], 96, 32)[0])
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables, lexinvariant.tables(IDS, 96, 32, seed=1))
    assert abs(float(tables.std()) * 32**0.5 - 1) < 0.05
    padded, mask = torch.nn.functional.pad(IDS, (2, 3)), torch.nn.functional.pad(torch.ones_like(IDS), (2, 3))
    assert torch.equal(lexinvariant.tables(padded, 96, 32, mask=mask), tables)
    with torch.no_grad():
        both = lexinvariant.logits(hf, IDS, tables)
        assert close(both[1:], lexinvariant.logits(hf, IDS[1:], tables[1:]))


def test_training_draws_a_table_for_each_text() -> None:
    """The loss of each step is another; the fixed table has no gradient, all else has; at the first token nothing is known."""
    hf = made().train()
    ids = IDS[:1].repeat(64, 1)
    out = hf(ids, labels=ids)
    out.loss.backward()
    assert float(out.logits.detach().std(0).mean()) > 0.01  # the same text under other tables
    for name, weight in hf.named_parameters():
        assert (weight.grad is None) == ("embed" in name or "lm_head" in name), name
    first = torch.nn.functional.cross_entropy(out.logits[:, 0], ids[:, 1])
    assert float(first.detach()) > math.log(95)  # no table tells the second token from any other
    hf.eval()
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, hf(IDS).logits)


def test_an_untied_config_is_refused() -> None:
    with pytest.raises(PatchbayError, match="lexinvariant=True: True, on a config with tie_word_embeddings=True"):
        pb.blocks.build(twins.twin("llama").config, lexinvariant=True)


def test_blocks_that_read_ids_are_refused_beside_it() -> None:
    config = twins.twin("llama").config
    config.tie_word_embeddings = True
    for blocks in ({"ngram": 1}, {"meta_tokens": {"id": 95, "layers": [1]}}):
        with pytest.raises(
            PatchbayError, match=f"lexinvariant beside {next(iter(blocks))}: a text trains on embeddings of its own"
        ):
            pb.blocks.build(config, lexinvariant=True, **blocks)
