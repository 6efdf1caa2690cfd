"""What attention finders share: one run for several equals each alone, long corpora, and the first token left out."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.find import _attention
from patchbay.find.attention_sinks import finder as sinks
from patchbay.find.duplicate_token_heads import finder as duplicates
from patchbay.find.induction_heads import finder as induction
from patchbay.find.ngram_heads import finder as ngrams
from patchbay.find.previous_token_heads import finder as previous
from patchbay.tiny import planted, twins
from tests.given import llama
from tests.tolerance import close


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neo"])
def test_one_run_for_all_equals_each_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twins.twin(name))
    encoded = model.encode(pb.tasks.repeated_tokens(model, 5, max_period=6, max_offset=4))
    calls, real = [], _attention.run
    monkeypatch.setattr(_attention, "run", lambda *a, **o: calls.append(1) or real(*a, **o))
    finders = [make(model, encoded) for make in (previous, induction, duplicates, ngrams, sinks)]
    shared = _attention.together(model, encoded, finders)
    assert len(calls) == 1
    alone = [
        method(model, encoded)
        for method in (
            pb.find.previous_token_heads,
            pb.find.induction_heads,
            pb.find.duplicate_token_heads,
            pb.find.ngram_heads,
            pb.find.attention_sinks,
        )
    ]
    for ours, theirs in zip(shared, alone, strict=True):
        assert not ours.differences(theirs, rtol=1e-5)


def test_a_long_corpus_takes_no_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring prompts share a row; the means are those of the prompts where all rows hold as many."""
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 24)
    whole = [
        pb.find.ngram_heads(model, task),
        pb.find.duplicate_token_heads(model, task),
        pb.find.attention_sinks(model, task),
    ]
    monkeypatch.setattr(_attention, "BLOCKS", 8)
    seen: list[int] = []
    values = _attention.Kept.values
    monkeypatch.setattr(_attention.Kept, "values", lambda self: seen.append(self.n_rows) or values(self))
    few = [
        pb.find.ngram_heads(model, task),
        pb.find.duplicate_token_heads(model, task),
        pb.find.attention_sinks(model, task),
    ]
    assert seen == [8, 8, 8]
    for a, b in zip(whole, few, strict=True):
        assert close(a.values, b.values)


def test_batches_hold_no_more_patterns_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twins.twin("gpt2"))
    encoded = [[5, 6, 7, 8] * size for size in (2, 3, 1, 4, 2)]
    n_heads = sum(map(model.n_heads, range(model.n_layers)))
    monkeypatch.setattr(_attention, "ROOM", 2 * n_heads * 12 * 12 * 4)
    batches = list(_attention._batches(model, encoded, list(range(model.n_layers)), 16))
    assert [len(batch.ids) for batch in batches] == [2, 1, 1, 1]
    assert [ids for batch in batches for ids in batch.ids] == encoded
    assert [batch.start for batch in batches] == [0, 2, 3, 4]


def test_targets_by_hand() -> None:
    ids = [4, 5, 6, 4, 5, 4, 4]
    assert _attention.earlier(ids).nonzero().tolist() == [[3, 0], [4, 1], [5, 0], [5, 3], [6, 0], [6, 3], [6, 5]]
    assert _attention.after_earlier(ids).nonzero().tolist() == [[3, 1], [4, 2], [5, 1], [5, 4], [6, 1], [6, 4]]
    assert _attention.after_earlier(ids, 2).nonzero().tolist() == [[4, 2]]
    assert not _attention.after_earlier([4, 5], 3).any()
    target = _attention.after_earlier(ids)
    right, left = ([[3, 2], [4, 3], [5, 2], [5, 5], [6, 2], [6, 5]], [[3, 0], [5, 0], [5, 3], [6, 0], [6, 3]])
    left.insert(1, [4, 1])
    both = [moved.nonzero().tolist() for moved in _attention.moved(target, 1)]
    assert right in both
    assert left in both
    assert _attention.moved(target, 9).shape == (18, 7, 7)  # further than there are keys
    for tokens in (ids, [1, 2, 3], [1, 1], [1, 1, 1], [1, 2, 1, 2], [7]):
        for n in (1, 2, 3):
            assert _attention.repeats(tokens, n) == bool(_attention.after_earlier(tokens, n).any())


def test_even_attention_by_hand() -> None:
    """The four numbers of one prompt under even attention: paid and even are one, also without the first token."""
    ids = [4, 5, 6, 4, 5, 4, 4]
    score = _attention.looks(lambda _, row: _attention.after_earlier(row)[None])(
        _attention.Batch(0, [ids], torch.device("cpu"))
    )
    pattern = (torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None])[None, None]
    trace = pb.run(pb.load(twins.twin("gpt2")), [ids])
    paid, bare, even, even_bare = _attention.parts_of(score(_attention.Layer(0, pattern, trace)))
    assert close([float(paid), float(even)], [(1 / 4 + 1 / 5 + 2 / 6 + 2 / 7) / 4] * 2)
    assert close([float(bare), float(even_bare)], [(1 / 3 + 1 / 4 + 2 / 5 + 2 / 6) / 4] * 2)


def test_no_prompt_at_a_time_is_refused() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="batch_size=0"):
        pb.find.previous_token_heads(model, [[5, 6, 7]], batch_size=0)


def test_rows_that_do_not_sum_to_1_and_negative_weights() -> None:
    """Weights that are half, or minus, a softmax's: the share without the first token is what it was, the row mass is theirs, and signs are said."""
    model = pb.load(llama(0, sharpness=60))
    prompts = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()

    def both() -> tuple[pb.Result, pb.Result]:
        return pb.find.previous_token_heads(model, prompts), pb.find.attention_sinks(model, prompts, epsilon=0.25)

    looks, sinks = both()
    for factor in (0.5, -1.0):
        with model.edited(*(pb.scale(layer.attn.pattern, factor) for layer in model.layers)):
            first = [layer.attn.pattern for layer in model.layers[:1]]
            rows = pb.run(model, prompts, taps=first)[first[0]].sum(-1)
            assert close(rows, torch.full_like(rows, factor))
            found, sunk = both()
        assert close(found["without_first"][0], looks["without_first"][0])
        assert close(found["score"][0], looks["score"][0] * abs(factor))
        assert close(sunk["mass"], torch.full_like(sunk["mass"], abs(factor)))
        assert torch.equal(sunk["without_first"][0], sinks["without_first"][0])
        assert any("negative weights" in note for note in found.notes) == (factor < 0)
    assert 0 < float(sinks["without_first"][0].mean()) < 1
