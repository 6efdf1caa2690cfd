"""Speculative decoding: the model's own text and law whatever the draft, by loops and by chi-square; who agrees is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chi2

import patchbay as pb
from patchbay.decode._loop import generators
from patchbay.decode._speculation import after, blocks, decided, proposed
from patchbay.decode.speculative import bytes_read
from patchbay.tiny.twins import twin
from tests.decode.shared_stories import FIVE, G512, digest, new_tokens, stories
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 12


def model_of(seed: int = 0, name: str = "llama") -> pb.Model:
    return pb.load(twin(name, seed=seed))


def greedy(model: pb.Model, n: int = NEW) -> list[list[list[int]]]:
    return [[list(row)] for row in model.generate(PROMPTS, n, new_only=True, eos_token_id=None)]


def chi_square(seen: torch.Tensor, law: torch.Tensor, n: int) -> float:
    """p of a chi-square of counts over cells of which ten or more are expected, and the rest as one."""
    counts = torch.bincount(seen, minlength=len(law)).double()
    cells = law * n >= 10
    pairs = [torch.cat([x[cells], x[~cells].sum()[None]]) for x in (counts, law * n)]
    pairs = [x[pairs[1] > 0] for x in pairs]
    return float(chi2.sf(float(((pairs[0] - pairs[1]) ** 2 / pairs[1]).sum()), len(pairs[0]) - 1))


def test_planted() -> None:
    """A draft that is the model itself agrees everywhere, five tokens a pass; one that lacks the right token agrees nowhere there."""
    model = model_of()
    found = pb.decode.speculative(model, model, PROMPTS, max_new_tokens=10)
    assert bool((found["agreed"] == 1).all())
    assert close(found["per_pass"][:, 0], [5.0] * 3)
    assert new_tokens(found) == greedy(model, 10)
    assert int(found["calls"]) == 2 * 2, "two lengths of prompts, two passes of each"
    lacks = [token for token in range(model.vocab_size) if token != new_tokens(found)[0][0][1]]
    trimmed = pb.decode.speculative(model, model, PROMPTS[:1], kept=lacks, max_new_tokens=10)
    right = [float(token != new_tokens(found)[0][0][1]) for token in new_tokens(found)[0][0]]
    assert trimmed["agreed"][0, 0].tolist() == right
    assert new_tokens(trimmed) == greedy(model, 10)[:1]


@pytest.mark.parametrize("chain", [None, (), ("temperature(0.7)", "top_k(30)")])
def test_reference(chain: tuple[str, ...] | None) -> None:
    """Block by block in loops over whole runs: propose four, keep while the coin says so, draw what is left."""
    model, draft, ahead = model_of(), model_of(1), 3
    found = pb.decode.speculative(model, draft, PROMPTS, ahead=ahead, chain=chain, seed=5, max_new_tokens=NEW)
    points = [torch.rand(NEW, 3, generator=one[0], dtype=torch.float64).tolist() for one in generators(5, PROMPTS)]

    def law(of: pb.Model, text: list[int]) -> list[float]:
        with torch.no_grad():
            logits = of.hf(torch.tensor([text]), use_cache=False).logits[0, -1].double()
        if chain is None:
            return [float(v == int(logits.argmax())) for v in range(len(logits))]
        if chain:
            logits = logits / 0.7
            logits[logits < logits.sort().values[-30]] = -torch.inf
        return logits.softmax(-1).tolist()

    def at(weights: list[float], point: float) -> int:
        left = point * sum(weights)
        for v, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return v
        raise AssertionError

    for i, prompt in enumerate(PROMPTS):
        text, agreed, passes = list(prompt), [], 0
        while len(text) < len(prompt) + NEW:
            passes += 1
            for step in range(min(ahead, len(prompt) + NEW - len(text) - 1) + 1):
                coin = points[i][len(text) - len(prompt)]
                p, q = law(model, text), law(draft, text)
                x = at(q, coin[0])
                if coin[1] < p[x] / q[x]:
                    text.append(x)
                    agreed.append(1.0)
                    continue
                text.append(at([max(a - b, 0.0) for a, b in zip(p, q, strict=True)], coin[2]))
                agreed.append(0.0)
                if step < ahead:
                    break
        assert new_tokens(found)[i][0] == text[len(prompt) :]
        assert found["agreed"][i, 0].tolist() == agreed
        assert int(found["passes"][i, 0]) == passes


def test_null() -> None:
    """A draft that may propose one token alone, which the model does not take, helps nowhere and changes nothing."""
    model = model_of()
    plain = greedy(model)
    never = next(token for token in range(model.vocab_size) if not any(token in row for [row] in plain))
    found = pb.decode.speculative(model, model_of(1), PROMPTS, kept=[never], max_new_tokens=NEW)
    assert new_tokens(found) == plain
    assert not found["agreed"].any()
    assert close(found["per_pass"], torch.ones(3, 1))
    assert float(found["speedup"]) < 1


def test_a_coupling_keeps_the_law_for_any_draft() -> None:
    """20,000 draws: the law is p, the share kept 1 - TVD; the same draws with p in place of (p - q)+ fail."""
    draw, n = torch.Generator().manual_seed(0), 20_000
    laws = torch.randn(2, 40, generator=draw, dtype=torch.float64).mul(1.5).softmax(-1)
    p, q = (row.expand(n, -1) for row in laws)
    points = torch.rand(n, 3, generator=draw, dtype=torch.float64)
    guess = proposed(q, points[:, 0])
    tokens, kept = decided(p, q, guess, points[:, 1:])
    assert chi_square(guess, laws[1], n) > 0.01
    assert chi_square(tokens, laws[0], n) > 0.01
    overlap = float(laws.amin(0).sum())
    assert abs(float(kept.double().mean()) - overlap) < 4 * (overlap * (1 - overlap) / n) ** 0.5
    wrong = torch.where(kept, guess, proposed(p, points[:, 2]))
    assert chi_square(wrong, laws[0], n) < 1e-6
    none, kept = decided(p, torch.zeros_like(p), torch.full((n,), -1), points[:, 1:])
    assert chi_square(none, laws[0], n) > 0.01
    assert not kept.any(), "where nothing is proposed"


def test_both_tokens_of_a_text_have_the_models_law() -> None:
    """n = 3,000 texts of two tokens from one prompt, a trimmed draft: the second token's law over all first ones, and the first one's."""
    model, n, prompt = model_of(), 3_000, [5, 9, 7, 11]
    sharp = [pb.scale("logits", 3.0)]
    with model.edited(*sharp):
        found = pb.decode.speculative(
            model, model_of(1), [prompt] * n, ahead=2, kept=list(range(60)), chain=(), max_new_tokens=2, batch_size=n
        )
        first = pb.run(model, [prompt]).last_logits[0].double().softmax(-1)
        second = pb.run(model, [[*prompt, v] for v in range(96)]).last_logits.double().softmax(-1)
    tokens = found["tokens"][:, 0]
    assert chi_square(tokens[:, 0], first, n) > 0.01
    assert chi_square(tokens[:, 1], first @ second, n) > 0.01


def test_text_and_agreement_depend_neither_on_how_far_ahead_nor_on_the_batch() -> None:
    model, draft = model_of(), model_of(1)
    options: dict[str, Any] = {"chain": (), "max_new_tokens": NEW, "seed": 2}
    one = pb.decode.speculative(model, draft, PROMPTS, ahead=1, **options)
    for ahead in (2, 5):
        other = pb.decode.speculative(model, draft, PROMPTS, ahead=ahead, batch_size=1, **options)
        assert torch.equal(other["tokens"], one["tokens"])
        assert torch.equal(other["agreed"], one["agreed"])
        assert int(other["calls"]) == int(other["passes"].sum()), "alone, what was run is what a text takes"


def test_blocks_are_what_passes_keep() -> None:
    assert blocks([1, 1, 0, 1, 1, 1, 1, 1, 0], 2, 9) == [2, 2, 2]
    assert blocks([0, float("nan"), 1], 4, 3) == [0, 0, 0], "the last position leaves no room"
    assert blocks([1, 1, 1], 4, 9) == [3], "a text that ended among its proposals"
    assert after([1, 2, 3, 9, 2, 3, 8, 2, 3], 3) == 8
    assert after([1, 2, 3, 4, 1, 2, 5, 2], 2) == 5
    assert after([1, 2, 3], 3) is None


def test_lookup_says_greedy_text_in_fewer_passes_where_it_repeats() -> None:
    model = model_of()
    found = pb.decode.speculative(model, "lookup(2)", PROMPTS, max_new_tokens=40)
    assert new_tokens(found) == greedy(model, 40)
    assert float(found["per_pass"].max()) > 1
    assert "other_calls" not in found
    assert bool(found["agreed"].isnan().any())


def test_greedy_text_is_that_of_transformers_assisted_generation() -> None:
    model, draft = model_of(), model_of(1)
    found = pb.decode.speculative(model, draft, PROMPTS, max_new_tokens=NEW)
    for i, prompt in enumerate(PROMPTS):
        own = model.hf.generate(
            torch.tensor([prompt]), assistant_model=draft.hf, max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert own[0, len(prompt) :].tolist() == new_tokens(found)[i][0]


def test_a_kept_vocabulary_is_counted_written_and_read(tmp_path: Path) -> None:
    """The file is as EAGLE-3 reads it: ids less their places."""
    model, file = model_of(), tmp_path / "kept.safetensors"
    texts = pb.decode.speculative(model, model, PROMPTS, max_new_tokens=NEW)
    kept = pb.decode.speculative.kept  # type: ignore[attr-defined]
    assert kept([[4, 4, 7, 9, 9, 9, 2]], 2) == [4, 9]
    assert kept([[4, 4, 7, 9, 9, 9]], 3, always=[1]) == [1, 4, 9]
    found = kept(texts, 5, always=[2], path=file)
    assert (len(found), found) == (5, sorted(found))
    assert (load_file(file)["d2t"] + torch.arange(5)).tolist() == found
    by_file, by_ids = (
        pb.decode.speculative(model, model_of(1), PROMPTS, kept=one, max_new_tokens=NEW) for one in (str(file), found)
    )
    assert torch.equal(by_file["agreed"], by_ids["agreed"])
    assert all(
        token in found for token, same in zip(by_ids["tokens"][0, 0], by_ids["agreed"][0, 0], strict=True) if same
    )


def test_what_is_gained_is_counted_in_bytes_of_weights() -> None:
    model, draft = model_of(), model_of(1, "gpt2")
    assert bytes_read(draft) == 4 * sum(one.numel() for one in draft.hf.parameters()), "its table is its head"
    table, head = model.hf.get_input_embeddings().weight.numel(), model.hf.get_output_embeddings().weight.numel()
    whole = 4 * (sum(one.numel() for one in model.hf.parameters()) - table)
    assert bytes_read(model) == whole
    assert bytes_read(model, 0.25) == whole - 3 * head
    found = pb.decode.speculative(model, draft, PROMPTS, ahead=3, kept=list(range(24)), max_new_tokens=NEW)
    tau = 3 * NEW / float(found["passes"].sum())
    assert close(found["speedup"], tau / (1 + 3 * bytes_read(draft, 0.25) / whole))


@pytest.mark.parametrize(
    ("draft", "options", "says"),
    [
        (None, {"ahead": 0}, "ahead=0: one or more"),
        (None, {"kept": [96]}, "kept: 96 is no token"),
        (None, {"kept": []}, "no token is kept"),
        (None, {"kept": "nowhere.safetensors"}, "no file nowhere.safetensors"),
        (None, {"chain": ["mirostat()"]}, "mirostat remembers what was drawn"),
        (None, {"chain": ["xtc()"]}, "xtc remembers what was drawn"),
        ("lookup", {"kept": [5]}, "has no vocabulary to trim"),
        ("lookup(0)", {}, "n one or more"),
        ("look", {}, "draft='look': a model, a knob"),
        (7, {}, "draft takes a Model"),
    ],
)
def test_refusals(draft: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.speculative(model_of(), model_of(1) if draft is None else draft, PROMPTS, **options)


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    model = model_of()
    config = type(model.hf.config)(**{**model.hf.config.to_dict(), "vocab_size": 80})
    with pytest.raises(pb.PatchbayError, match="two models of one vocabulary are needed: .* has 96 tokens, .* 80"):
        pb.decode.speculative(model, pb.load(type(model.hf)(config).eval()), PROMPTS)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"other": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(pb.PatchbayError, match="holds other, and no d2t"):
        pb.decode.speculative(model_of(), model_of(1), PROMPTS, kept=str(tmp_path / "a.safetensors"))
    with pytest.raises(pb.PatchbayError, match="n=1: one or more, and room for the 2"):
        pb.decode.speculative.kept([[3]], 1, always=[1, 2])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5_text"])
def test_states_that_cannot_be_wound_back_are_refused_by_their_layers(name: str) -> None:
    model = model_of(0, name)
    with pytest.raises(pb.PatchbayError, match="speculative: layers 0.* carry a state from token to token"):
        pb.decode.speculative(model, "lookup", PROMPTS)
    with pytest.raises(pb.PatchbayError, match="speculative, draft: layers 0"):
        pb.decode.speculative(model_of(), model, PROMPTS)


def test_a_cache_that_was_wound_back_wrong_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then every pass runs the whole text."""
    from transformers import DynamicCache

    from patchbay.decode._crops import crops

    monkeypatch.setattr(DynamicCache, "crop", lambda *_: None)
    model = model_of(3)
    assert not crops(model)
    found = pb.decode.speculative(model, model, PROMPTS, max_new_tokens=NEW)
    assert new_tokens(found) == greedy(model)


@pytest.mark.slow  # a pair of trained models, token by token
def test_trained_pair() -> None:
    """Greedy text of the trained pair is that of the target for whole and kept vocabularies, in 3.5 and 3.3 tokens a pass."""
    target, draft = stories(), stories(G512)
    with_ends = target.hf.generation_config.eos_token_id
    target.hf.generation_config.eos_token_id = None
    try:
        whole = pb.decode.speculative(target, draft, FIVE, max_new_tokens=60)
        texts = pb.decode.samplers(target, FIVE, chain=(), drafts=8, max_new_tokens=60, ends=[])
        kept = pb.decode.speculative.kept(texts, 128)  # type: ignore[attr-defined]
        trimmed = pb.decode.speculative(target, draft, FIVE, kept=kept, max_new_tokens=60)
    finally:
        target.hf.generation_config.eos_token_id = with_ends
    for found, least in ((whole, 3.0), (trimmed, 2.6)):
        assert digest([drafts[0] for drafts in new_tokens(found)]) == "50b8f30b8dde"
        assert float(found["per_pass"].mean()) > least
