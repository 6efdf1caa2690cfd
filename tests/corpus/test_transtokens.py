"""Trans-tokens: identity to the bit, a permutation moves logits, rows by loops, the mean where nothing is aligned, tied tables, special ids."""

from __future__ import annotations

import random

import pytest
import torch

import patchbay as pb
from patchbay.corpus.transtokens import aligned, matrix, transferred
from patchbay.tiny import twins
from tests.given import lent
from tests.tolerance import close

IDS = [5, 9, 17, 3, 11]


def logits(model: pb.Model, ids: list[int]) -> torch.Tensor:
    return pb.run(model, [ids]).logits[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "opt", "gptj", "mamba"])
def test_identity_is_the_model_and_a_permutation_moves_its_logits(name: str) -> None:
    model = pb.load(twins.twin(name))
    n = model.hf.get_input_embeddings().weight.shape[0]
    same = transferred(model, {(i, i): 3.0 for i in range(n)}, n)
    assert torch.equal(logits(same, IDS), logits(model, IDS))
    new_of = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    moved = transferred(model, {(int(new), old): 1.0 for old, new in enumerate(new_of)}, n)
    there = logits(moved, [int(new_of[i]) for i in IDS])
    assert close(there[:, new_of][:, : model.vocab_size], logits(model, IDS))
    one, other = (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight for hf in (model.hf, moved.hf))
    assert one == other


def test_heads_survive_another_vocabulary() -> None:
    """What each head looks at, and how much each repeats, is as it was under the tokens' new numbers; rows of other tokens change both."""
    model = lent("llama")
    n = model.vocab_size
    new_of = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    moved = transferred(model, {(new, old): 1.0 for old, new in enumerate(new_of)}, n)
    wrong = transferred(model, {(new, (old + 1) % n): 1.0 for old, new in enumerate(new_of)}, n)
    asked = [list(ids) for ids in pb.tasks.repeated_tokens(model, n=4).clean]
    said = [[new_of[i] for i in ids] for ids in asked]
    own = pb.find.induction_heads(model, asked)["score"]
    assert close(pb.find.induction_heads(moved, said)["score"], own)
    assert not close(pb.find.induction_heads(wrong, said)["score"], own)
    port = model.layers[1].attn.pattern
    assert close(pb.run(moved, said[:1], taps=[port])[port], pb.run(model, asked[:1], taps=[port])[port])


def test_rows_by_loops_and_the_mean_where_nothing_is_aligned() -> None:
    model = lent("llama")
    before = model.fingerprint
    counts = {(0, 5): 2.0, (0, 7): 6.0, (1, 9): 1.0, (3, 9): 0.0}
    found = transferred(model, counts, 4)
    model._fingerprint = None
    assert model.fingerprint == before
    for one, own in ((found.hf.model.embed_tokens, model.hf.model.embed_tokens), (found.hf.lm_head, model.hf.lm_head)):
        rows = own.weight.detach()
        expected = torch.stack([0.25 * rows[5] + 0.75 * rows[7], rows[9], rows.mean(0), rows.mean(0)])
        assert close(one.weight, expected)
    body = {name: value for name, value in found.hf.state_dict().items() if value.shape[0] != 4}
    assert body
    assert all(torch.equal(value, model.hf.state_dict()[name]) for name, value in body.items())
    assert found.vocab_size == 4 == logits(found, [0, 1, 2]).shape[1]
    assert close(matrix(counts, 4, 10).to_dense().sum(1)[:2], torch.ones(2, dtype=torch.float64))


def test_special_tokens_are_mapped_or_taken_away() -> None:
    hf = twins.twin("gpt2")
    hf.config.bos_token_id, hf.config.eos_token_id, hf.config.pad_token_id = 1, 2, None
    model = pb.load(hf)
    found = transferred(model, {(i, i): 1.0 for i in range(10)}, 10, specials={7: 2})
    assert (found.hf.config.bos_token_id, found.hf.config.eos_token_id) == (None, 7)
    rows = model.hf.get_input_embeddings().weight
    assert torch.equal(found.hf.get_input_embeddings().weight[7], rows[2])


def test_alignment_finds_the_words_of_a_shuffled_language() -> None:
    """Texts in one vocabulary and, in another order of words, in another: every token finds its own; unrelated texts do not."""
    rng = random.Random(0)
    new_of = list(range(30))
    rng.shuffle(new_of)
    texts = [[rng.randrange(30) for _ in range(6)] for _ in range(300)]
    said = [rng.sample([new_of[t] for t in text], 6) for text in texts]

    def right(counts: dict[tuple[int, int], float]) -> int:
        best = [max((count, old) for (n, old), count in counts.items() if n == new)[1] for new in range(30)]
        return sum(new_of[old] == new for new, old in enumerate(best))

    assert right(aligned(zip(said, texts, strict=True))) == 30
    assert right(aligned(zip(said[1:] + said[:1], texts, strict=True))) < 6


def test_alignment_by_hand() -> None:
    """Two rounds: the second token of the first pair is known from the second pair."""
    counts = aligned([([0, 1], [0, 1]), ([0], [0])], rounds=1)
    assert counts == {(0, 0): 1.5, (1, 0): 0.5, (0, 1): 0.5, (1, 1): 0.5}
    again = aligned([([0, 1], [0, 1]), ([0], [0])], rounds=2)
    assert again[0, 0] == pytest.approx(1 + 0.75 / (0.75 + 0.5))


def test_refusals() -> None:
    model = lent("llama")
    for call, says in (
        (lambda: aligned([([], [1])]), "0 pairs of texts"),
        (lambda: transferred(model, {}, 3), "one or more of each"),
        (lambda: transferred(model, {(3, 0): 1.0}, 3), "there are 3 new"),
        (lambda: transferred(model, {(0, 0): -1.0}, 3), "below 0 or no number"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            call()
