"""turn.set_prompt: options without an order. Every order gives one answer; mask and positions equal plain loops; one option is none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, twins
from patchbay.turn._sets import layout, plain_layout
from tests.given import lent
from tests.shares import by_turns
from tests.tolerance import close

PROMPT = [[5, 6, 7], [[11, 12], [13, 14, 15], [16], [17, 18]], [8, 9, 10]]
OTHER = [[5], [[21, 22, 23], [24], [25, 26, 27]], [8, 9, 3, 4]]
STATE = ("mamba2", "mamba", "falcon_mamba", "bamba", "lfm2", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
ALIBI = ("bloom", "falcon alibi", "mpt")


def in_order(order: Any, prompt: Any = PROMPT) -> Any:
    return [prompt[0], [prompt[1][i] for i in order], prompt[2]]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The planted induction head reads the option that it needs, wherever it stands; the ordinary prompt's logits move."""
    built = planted.induction(form=form, seed=1)
    model = pb.load(built.model, built.tokenizer)
    options = [[20, 21], [30, 31], [40, 41], [44, 45]]
    for asked in (20, 40):
        prompts = [[[10, 11], [options[i] for i in order], [12, asked]] for order in itertools.permutations(range(4))]
        result = pb.turn.set_prompt(model, prompts, orders=0)
        assert bool((result.values.argmax(1) == asked + 1).all())
        assert close(result.values, result.values[:1].expand_as(result.values))
    plain = pb.turn.set_prompt(model, prompts[:1], orders=23)
    assert plain["spread"][0] < 5e-5 < 1e-3 < plain["plain_spread"][0]


def test_reference() -> None:
    """Mask and position ids written as plain loops and given to Hugging Face's model; every option sees prefix and itself alone."""
    for name in ("gpt2", "llama"):
        model = lent(name)
        prefix, options, suffix = PROMPT
        ids, positions, owner = list(prefix), list(range(len(prefix))), [-1] * len(prefix)  # type: ignore[call-overload, var-annotated, arg-type]
        for number, option in enumerate(options):
            for i, token in enumerate(option):  # type: ignore[arg-type, var-annotated]
                ids.append(token)
                positions.append(len(prefix) + i)
                owner.append(number)
        for i, token in enumerate(suffix):
            ids.append(token)  # type: ignore[arg-type]
            positions.append(len(prefix) + max(len(o) for o in options) + i)  # type: ignore[arg-type]
            owner.append(-1)
        mask = torch.full((1, 1, len(ids), len(ids)), torch.finfo(torch.float32).min)
        for q in range(len(ids)):
            for k in range(q + 1):
                if owner[q] == -1 or owner[k] == -1 or owner[q] == owner[k]:
                    mask[0, 0, q, k] = 0.0
        with torch.no_grad():
            out = model.hf(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                attention_mask=mask,
                use_cache=False,
                output_hidden_states=True,
            )
        found = pb.turn.set_prompt(model, [PROMPT], orders=0).values[0]
        assert close(found, out.logits[0, -1].log_softmax(-1))
        beside = pb.turn.set_prompt(model, [PROMPT, [*PROMPT[:2], [*PROMPT[2], 11, 12]]], orders=0).values
        assert close(beside[0], found)  # read at its own last token, not at its longer neighbour's
        assert not close(beside[1], found)
        at = len(prefix)
        for option in options:
            alone = model.hf(torch.tensor([prefix + option]), output_hidden_states=True).hidden_states[-2]  # type: ignore[operator]
            held = out.hidden_states[-2][0, at : at + len(option)]  # type: ignore[arg-type]
            assert close(held, alone[0, len(prefix) :])  # type: ignore[arg-type]
            at += len(option)  # type: ignore[arg-type]


def test_null() -> None:
    """A set of one option is the ordinary prompt; nothing depends on its order, and its distribution is the model's own."""
    for name in ("gpt2", "llama", "gemma2"):
        model = lent(name)
        prompt = [PROMPT[0], [[11, 12, 13]], PROMPT[2]]
        result = pb.turn.set_prompt(model, [prompt])
        own = pb.run(model, [[5, 6, 7, 11, 12, 13, 8, 9, 10]]).last_logits[0].log_softmax(-1)
        assert close(result.values[0], own)
        assert float(result["spread"]) == float(result["plain_spread"]) == 0.0
        assert "ordinary prompts" in result.notes[0]


# --- order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", by_turns([name for name in twins.FAMILY_CONFIGS if name not in (*STATE, *ALIBI, "gpt_neo")], of=3)
)
def test_every_family_that_follows_mask_and_positions_is_free_of_order(name: str) -> None:
    """All 24 orders, in float32; windows of sliding layers are shorter than the prompt."""
    model = lent(name)
    if any("attn.pattern" not in model.signals(layer) for layer in range(model.n_layers)):
        with pytest.raises(pb.PatchbayError, match="carry a state from token to token"):
            pb.turn.set_prompt(model, [PROMPT, OTHER])
        return
    if not model.causal:  # a prompt's tokens see those after them
        with pytest.raises(pb.PatchbayError, match="it does not honour them"):
            pb.turn.set_prompt(model, [PROMPT, OTHER])
        return
    result = pb.turn.set_prompt(model, [PROMPT, OTHER], orders=23)
    assert float(result["spread"].max()) < 5e-5
    assert float(result["plain_spread"].min()) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3_text", "phi"])
def test_in_float64_only_rounding_is_left(name: str) -> None:
    model = pb.load(twins.twin(name).double())
    assert model.config._attn_implementation == "sdpa"
    assert float(pb.turn.set_prompt(model, [PROMPT, OTHER], orders=23)["spread"].max()) < 1e-13


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_canonical_is_equal_to_the_last_bit(name: str) -> None:
    model = lent(name)
    first = pb.turn.set_prompt(model, [PROMPT], canonical=True, orders=23)
    for order in itertools.permutations(range(4)):
        again = pb.turn.set_prompt(model, [in_order(order)], canonical=True, orders=0)
        assert torch.equal(again.values, first.values)
    assert float(first["spread"]) == 0.0 < float(first["plain_spread"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "gptj"])
def test_cached_generation_equals_recomputation_and_has_no_order(name: str) -> None:
    """Each new token by one uncached run over prompt and tokens so far; also in a batch with a shorter prompt."""
    model = lent(name)
    result = pb.turn.set_prompt(model, [PROMPT, OTHER], max_new_tokens=6, orders=0)
    for prompt, row in zip((PROMPT, OTHER), result.tables["generated"], strict=True):
        grown: list[int] = []
        for _ in range(6):
            longer = [*prompt[:2], prompt[2] + grown]  # type: ignore[operator]
            grown.append(int(pb.turn.set_prompt(model, [longer], orders=0).values.argmax()))
        assert row["ids"] == grown
    for order in list(itertools.permutations(range(4)))[1::5]:
        turned = pb.turn.set_prompt(model, [in_order(order)], max_new_tokens=6, orders=0)
        assert turned.tables["generated"][0]["ids"] == result.tables["generated"][0]["ids"]


def test_edits_of_an_enclosing_block_hold() -> None:
    model = lent("llama")
    edits = [pb.zero(model.layers[0].heads[1].z, positions="last"), pb.add(model.layers[1].resid_out, torch.ones(32))]
    plain = pb.turn.set_prompt(model, [PROMPT, OTHER], max_new_tokens=3)
    with model.edited(*edits):
        both = pb.turn.set_prompt(model, [PROMPT, OTHER], max_new_tokens=3)
        alone = pb.turn.set_prompt(model, [OTHER], max_new_tokens=3)
    assert (both.values - plain.values).abs().max() > 0.1
    assert close(both.values[1], alone.values[0])
    assert both.tables["generated"][1]["ids"] == alone.tables["generated"][0]["ids"]
    assert both["spread"].max() < 5e-5


def test_several_sets_and_a_window_by_position() -> None:
    """Two sets in one prompt; tokens after a set stand behind its longest option."""
    prompt = [[5], [[11, 12], [13]], [7], [[21], [22, 23, 24]], [9]]
    placed = layout(prompt)
    assert placed.positions == [0, 1, 2, 1, 3, 4, 4, 5, 6, 7]
    assert plain_layout(prompt).positions == list(range(10))
    assert pb.turn.set_prompt(lent("mistral"), [prompt], orders=3)["spread"].max() < 5e-5


# --- prompts ------------------------------------------------------------------------------------------


def test_texts_ids_and_tasks_say_the_same() -> None:
    """Options are tokenised alone; a Task names their spans; and a Task is scored both ways."""
    model = pb.load("tiny")
    text = "One is<|set|> red<|or|> blue ball<|or|> the<|end|> and"
    pieces = [model.tokenizer(piece)["input_ids"] for piece in ("One is", " red", " blue ball", " the", " and")]  # type: ignore[misc]
    by_text = pb.turn.set_prompt(model, text)
    by_ids = pb.turn.set_prompt(model, [[pieces[0], pieces[1:4], pieces[4]]])
    assert by_text.agrees(by_ids, rtol=0.0)
    clean = [token for piece in pieces for token in piece]
    ends = [len(pieces[0]), len(pieces[0]) + 1, len(pieces[0]) + 3, len(pieces[0]) + 4]
    spans = [[list(pair) for pair in itertools.pairwise(ends)]]
    task = pb.Task("own", [clean], [pieces[1][0]], [[pieces[2][0]]], labels={"options": spans})  # type: ignore[arg-type]
    by_task = pb.turn.set_prompt(model, task)
    assert torch.equal(by_task.values, by_ids.values)
    assert close(float(by_task["score"]), float(task.score(by_ids.values)), of=1.0)
    assert close(float(by_task["plain_score"]), float(task.score(pb.run(model, task).last_logits)), of=1.0)


def test_it_prints_and_says_what_was_not_tried() -> None:
    result = pb.turn.set_prompt(lent("llama"), [PROMPT, OTHER], orders=0)
    assert "no other order was tried" in str(result)
    assert "spread" not in result


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATE)
def test_layers_that_carry_a_state_are_refused(name: str) -> None:
    with pytest.raises(pb.PatchbayError, match=r"carry a state from token to token"):
        pb.turn.set_prompt(lent(name), [PROMPT])


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_is_refused(name: str) -> None:
    with pytest.raises(pb.PatchbayError, match="ALiBi lowers attention by distance in tokens"):
        pb.turn.set_prompt(lent(name), [PROMPT])


def test_windows_counted_in_tokens_are_refused_where_they_matter() -> None:
    with pytest.raises(pb.PatchbayError, match=r"gpt_neo: its local layers see 6 tokens back.*use at most 6"):
        pb.turn.set_prompt(lent("gpt_neo"), [PROMPT])
    wide = pb.load(twins.twin("gpt_neo", window_size=32))
    assert pb.turn.set_prompt(wide, [PROMPT], orders=5)["spread"].max() < 5e-5


def test_a_model_that_ignores_position_ids_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it does, whatever it is called: position ids dropped, then masks dropped, on the way in."""
    model = pb.load(twins.twin("gpt2"))
    own = model.hf.forward
    monkeypatch.setattr(model.hf, "forward", lambda *a, position_ids=None, **k: own(*a, **k))
    with pytest.raises(pb.PatchbayError, match="reversing the options still moves the logits"):
        pb.turn.set_prompt(model, [PROMPT])
    monkeypatch.setattr(model.hf, "forward", lambda *a, attention_mask=None, **k: own(*a, **k))
    with pytest.raises(pb.PatchbayError, match="the mask is not followed"):
        pb.turn.set_prompt(model, [PROMPT])

    def doubled(*a: Any, position_ids: Any = None, **k: Any) -> Any:
        return own(*a, position_ids=None if position_ids is None else 2 * position_ids, **k)

    monkeypatch.setattr(model.hf, "forward", doubled)
    with pytest.raises(pb.PatchbayError, match="differs from its plain run by"):
        pb.turn.set_prompt(model, [PROMPT])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[[5, 6], [7]]], "has no set"),
        ([[[5, 6], [[7], [8]]]], "ends with its options"),
        ([[[5], [[7], []], [8]]], "empty segment or option"),
        ([[[5], [["x"]], [8]]], "segments are lists of ids"),
        ([[[5], [[7], [200]], [8]]], "the vocabulary is 0..95"),
        ([], "prompts with sets are texts"),
        (7, "prompts with sets are texts"),
    ],
)
def test_prompts_that_are_none(prompts: Any, said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.turn.set_prompt(lent("llama"), prompts)


@pytest.mark.parametrize(
    "text", ["a<|set|>b", "a<|or|>b<|end|>c", "<|set|>a<|set|>b<|end|>c", "plain", "x<|set|>a<|or|><|end|> c"]
)
def test_texts_with_wrong_marks(text: str) -> None:
    with pytest.raises(pb.PatchbayError, match="sets are written|has no set|empty option"):
        pb.turn.set_prompt(pb.load("tiny"), text)


def test_options_out_of_range() -> None:
    model = lent("llama")
    with pytest.raises(pb.PatchbayError, match="the model takes 64 in all"):
        pb.turn.set_prompt(model, [PROMPT], max_new_tokens=60)
    with pytest.raises(pb.PatchbayError, match="batch_size=0"):
        pb.turn.set_prompt(model, [PROMPT], batch_size=0)
    task = pb.tasks.repeated_tokens(model, 2)
    with pytest.raises(pb.PatchbayError, match="lack 'options'"):
        pb.turn.set_prompt(model, task)
    wrong = pb.Task("own", [[5, 6, 7]], [3], [[4]], labels={"options": [[[1, 5]]]})
    with pytest.raises(pb.PatchbayError, match="not ordered spans of 3 tokens"):
        pb.turn.set_prompt(model, wrong)
