"""What a call of the model says of its tokens, in every form that it can be said in: edited at the prompt's own positions, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.jacks.arguments import cache_among, with_cache
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin
from tests.tolerance import close

MODEL, PLAIN = pb.load(twin("llama")), pb.load(twin("llama"))
PROMPT = [5, 9, 40, 2, 11, 3, 8, 30]
IDS = torch.tensor([PROMPT])
OPTIONS = {
    "max_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def edit_of(positions: object, **more: Any) -> pb.Edit:
    value = 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    return pb.add(pb.Port("resid_out", 0), value, positions=positions, **more)


def whole(edit: pb.Edit, ids: Tensor = IDS) -> Tensor:
    return pb.run(PLAIN, ids, edits=[edit]).logits[0]


def in_calls(model: pb.Model, cuts: list[int], **more: Any) -> Tensor:
    """Logits of the prompt run in pieces on one cache."""
    found, cache = [], None
    for start, end in zip([0, *cuts], [*cuts, len(PROMPT)], strict=True):
        out = model.hf(IDS[:, start:end], use_cache=True, **with_cache(model.hf, cache), **more)
        cache = cache_among((), out)
        found.append(out.logits[0])
    return torch.cat(found)


# --- what masks and places say ---


def test_a_mask_given_by_place() -> None:
    padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    edit = edit_of("last")
    with torch.no_grad(), MODEL.edited(edit):
        assert close(MODEL.hf(padded, mask).logits[0, :8], whole(edit))
        assert MODEL.touched == [[(7,)]]
        assert close(MODEL.hf.model(padded, mask).last_hidden_state[0, :8] @ MODEL.hf.lm_head.weight.T, whole(edit))


def test_masks_that_do_not_tell_padding_are_refused() -> None:
    open_to_all = torch.zeros(1, 1, 8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), torch.finfo(torch.float32).min)
    with torch.no_grad(), MODEL.edited(edit_of("last")):
        for mask in (open_to_all, {"full_attention": open_to_all}):
            with pytest.raises(PatchbayError, match="does not say which columns are padding"):
                MODEL.hf(IDS, attention_mask=mask)
    with torch.no_grad(), MODEL.edited(edit_of(None)):  # everywhere is everywhere
        assert close(MODEL.hf(IDS, attention_mask=open_to_all).logits[0], whole(edit_of(None)))


def test_prompts_packed_into_one_row_are_refused() -> None:
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with (
        torch.no_grad(),
        MODEL.edited(edit_of(4)),
        pytest.raises(PatchbayError, match="position_ids go back inside a row"),
    ):
        MODEL.hf(IDS, position_ids=places)
    with torch.no_grad(), MODEL.edited(edit_of(4)):
        assert close(MODEL.hf(IDS, position_ids=torch.arange(8)[None]).logits[0], whole(edit_of(4)))


def test_embedded_prompts_have_positions_and_no_tokens() -> None:
    embeds = MODEL.hf.get_input_embeddings()(IDS).detach()
    with torch.no_grad(), MODEL.edited(edit_of(-2)):
        assert close(MODEL.hf(inputs_embeds=embeds).logits[0], whole(edit_of(-2)))
        for cached in (True, False):
            grown = MODEL.hf.generate(
                inputs_embeds=embeds, attention_mask=torch.ones_like(IDS), **OPTIONS, use_cache=cached
            )
            right = pb.run(PLAIN, IDS, edits=[edit_of(-2)], max_new_tokens=3)
            assert grown.sequences[0].tolist() == right.new_ids[0]
    for edit in (edit_of(pb.Token(9)), pb.block(pb.Port("attn.pattern", 0), query=slice(3, None), key=pb.Token(9))):
        with torch.no_grad(), MODEL.edited(edit), pytest.raises(PatchbayError, match="do not say which tokens"):
            MODEL.hf(inputs_embeds=embeds)
    with (
        torch.no_grad(),
        MODEL.edited(edit_of(1)),
        pytest.raises(PatchbayError, match="neither input_ids nor inputs_embeds"),
    ):
        MODEL.hf()


def test_logits_that_are_kept_by_a_list_of_places() -> None:
    edit = pb.scale(pb.Port("logits"), 2.0, positions=-1)
    with torch.no_grad(), MODEL.edited(edit):
        assert close(MODEL.hf(IDS, logits_to_keep=2).logits[0], whole(edit)[-2:])
        with pytest.raises(PatchbayError, match="logits_to_keep as a tensor"):
            MODEL.hf(IDS, logits_to_keep=torch.tensor([2, 5]))


# --- several calls ---


@pytest.mark.parametrize("cuts", [[7], [5, 6, 7], list(range(1, 8)), [3]], ids=str)
@pytest.mark.parametrize(
    "positions",
    [slice(2, 6), slice(5, 8), slice(0, None, 2), slice(3, None), slice(-3, None), "predicting", (1, 6)],
    ids=str,
)
def test_pieces_of_one_token_are_of_the_prompt_or_refused(cuts: list[int], positions: object) -> None:
    """A single token after the first call may be the prompt's or a generated one: where an edit means another thing then, it is refused,
    and right where somebody says how long the prompt is."""
    edit = edit_of(positions)
    with torch.no_grad(), MODEL.edited(edit, prompt_length=8):
        assert close(in_calls(MODEL, cuts), whole(edit), noise=256)  # in other pieces
    refused = ""
    with torch.no_grad(), MODEL.edited(edit):
        MODEL.hf(IDS)
        try:
            found = in_calls(MODEL, cuts)
        except PatchbayError as error:
            refused = str(error)
    if refused:
        assert "prompt_length=n" in refused or "is outside prompt 0" in refused
    else:
        assert close(found, whole(edit), noise=256)


def test_a_bounded_slice_that_ends_in_a_later_piece_is_not_dropped() -> None:
    with (
        torch.no_grad(),
        MODEL.edited(edit_of(slice(5, 8))),
        pytest.raises(PatchbayError, match=r"hang on the prompt's end.*after token 7"),
    ):
        in_calls(MODEL, [7])


@pytest.mark.parametrize("kind", ["copied", "the same", "copied twice"])
def test_a_prefix_whose_cache_is_copied_for_every_question(kind: str) -> None:
    """Filled in the block, where its end was taken for the prompt's: refused for what counts from there, right for all else."""
    questions = [IDS[:, 5:], IDS[:, 5:] + 1]
    for positions, refused in (
        ("last", True),
        (-2, True),
        (slice(-2, None), True),
        (2, False),
        (slice(0, 3), False),
        (None, False),
    ):
        edit = edit_of(positions)
        with torch.no_grad(), MODEL.edited(edit):
            prefix = MODEL.hf(IDS[:, :5], use_cache=True).past_key_values
            for question in questions[: 1 if kind == "the same" else 2]:
                cache = prefix if kind == "the same" else copy.deepcopy(prefix)
                cache = copy.deepcopy(cache) if kind == "copied twice" else cache
                text = torch.cat([IDS[:, :5], question], 1)
                if refused:
                    with pytest.raises(PatchbayError, match="prompt_length=n"):
                        MODEL.hf(question, past_key_values=cache)
                    with pytest.raises(PatchbayError, match="prompt_length=n"):
                        MODEL.hf.generate(text, attention_mask=torch.ones_like(text), past_key_values=cache, **OPTIONS)
                else:
                    assert close(MODEL.hf(question, past_key_values=cache).logits[0], whole(edit, text)[5:], noise=256)


def test_a_prefix_filled_outside_and_copied_is_edited_at_the_question() -> None:
    with torch.no_grad():
        prefix = MODEL.hf(IDS[:, :5], use_cache=True).past_key_values
        for edit in (edit_of("last"), edit_of(-3), edit_of(slice(6, None))):
            with MODEL.edited(edit):
                cache = copy.deepcopy(prefix)
                grown = MODEL.hf.generate(IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, **OPTIONS)
            right = pb.run(MODEL, IDS, edits=[edit], max_new_tokens=3)
            assert grown.sequences[0].tolist() == right.ids[0].tolist()
            assert close(torch.stack(grown.logits, 1)[0], right.logits[0, 7:10], noise=256)
        with MODEL.edited(edit_of(2)), pytest.raises(PatchbayError, match="already holds 5 tokens"):
            MODEL.hf(IDS[:, 5:], past_key_values=copy.deepcopy(prefix))
        with MODEL.edited(edit_of(pb.Token(9))):
            with pytest.raises(PatchbayError, match="which they are is not known"):
                MODEL.hf(IDS[:, 5:], past_key_values=copy.deepcopy(prefix))


def test_a_block_inside_a_block_goes_on_with_its_cache() -> None:
    """Edits that the cache was filled under are made there; one that came later and names a place in it is refused."""
    outer, inner = edit_of(2), pb.scale(pb.Port("attn.out", 1), 0.5, positions=6)
    right = pb.run(MODEL, IDS, edits=[outer, inner]).logits[0]
    with torch.no_grad(), MODEL.edited(outer):
        first = MODEL.hf(IDS[:, :5], use_cache=True)
        with MODEL.edited(inner):
            second = MODEL.hf(IDS[:, 5:], past_key_values=copy.deepcopy(first.past_key_values))
        assert close(torch.cat([first.logits, second.logits], 1)[0], right, noise=256)
        with MODEL.edited(edit_of(3)), pytest.raises(PatchbayError, match="already holds 5 tokens"):
            MODEL.hf(IDS[:, 5:], past_key_values=first.past_key_values)


def test_a_cache_whose_rows_were_repeated() -> None:
    with torch.no_grad(), MODEL.edited(edit_of(2)):
        cache = MODEL.hf(IDS[:, :5], use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        found = MODEL.hf(IDS[:, 5:].repeat(3, 1), past_key_values=cache).logits
        assert close(found, whole(edit_of(2))[None, 5:].expand(3, -1, -1), noise=256)
        cache = MODEL.hf(IDS[:, :5].repeat(2, 1), use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(PatchbayError, match="filled with 2 rows and now runs 4"):
            MODEL.hf(IDS[:, 5:].repeat(4, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba"])
def test_a_state_that_was_filled_before_the_block(name: str) -> None:
    """A cache of states alone does not say how many tokens it holds: the mask does, or what needs to know is refused."""
    model = pb.load(twin(name))
    with torch.no_grad():
        cache = cache_among((), model.hf(IDS[:, :7], use_cache=True))
        plain, said = copy.deepcopy(cache), copy.deepcopy(cache)
        with (
            model.edited(edit_of(2)),
            pytest.raises(PatchbayError, match="(does not say how many|already holds 7 tokens)"),
        ):
            model.hf(IDS[:, 7:], use_cache=True, **with_cache(model.hf, cache))
        with model.edited(edit_of(None)):
            model.hf(IDS[:, 7:], use_cache=True, **with_cache(model.hf, plain))
        with model.edited(edit_of(7)):
            model.hf(
                IDS[:, 7:],
                attention_mask=torch.ones(1, 8, dtype=torch.long),
                use_cache=True,
                **with_cache(model.hf, said),
            )
            assert model.touched == [[(7,)]]


def test_a_turn_by_generate_goes_on_by_hand() -> None:
    """Its end is known: single tokens after it are generated ones, several are a new turn."""
    edit = edit_of("last")
    with torch.no_grad(), MODEL.edited(edit):
        grown = MODEL.hf.generate(IDS, attention_mask=torch.ones_like(IDS), **OPTIONS | {"max_new_tokens": 1})
        cache, found = grown.past_key_values, []
        for token in (grown.sequences[:, -1:], IDS[:, :1], IDS[:, 1:2], IDS[:, 2:5]):
            found.append(MODEL.hf(token, past_key_values=cache).logits[0])
        assert MODEL.touched == [[(7, 13)]]
        with pytest.raises(PatchbayError, match="prompt_length=n"):
            MODEL.hf(IDS[:, 5:6], past_key_values=cache)
    text = torch.cat([grown.sequences, IDS[:, :5]], 1)
    assert close(torch.cat(found), whole(edit_of((7, 13)), text)[8:], noise=256)


# --- generate ---


@pytest.mark.parametrize("positions", ["last", None])
def test_rows_that_are_not_those_of_the_prompts_are_refused(positions: object) -> None:
    two = IDS.repeat(2, 1)
    mask = torch.ones_like(two)
    more = {"max_new_tokens": 2, "pad_token_id": 0, "attention_mask": mask}
    with MODEL.edited(edit_of(positions, rows=1)):
        with pytest.raises(PatchbayError, match="num_return_sequences=2 repeats the prompts"):
            MODEL.hf.generate(two, do_sample=True, num_return_sequences=2, **more)
        with pytest.raises(PatchbayError, match="beam search reorders"):
            MODEL.hf.generate(two, do_sample=False, num_beams=2, **more)
        MODEL.hf.generation_config.num_beams = 2
        try:
            with pytest.raises(PatchbayError, match="beam search reorders"):
                MODEL.hf.generate(two, do_sample=False, **more)
        finally:
            MODEL.hf.generation_config.num_beams = 1
        MODEL.hf(two)
    with MODEL.edited(edit_of("last")):
        with pytest.raises(PatchbayError, match="guidance_scale runs a second prompt"):
            MODEL.hf.generate(two, do_sample=False, guidance_scale=1.5, **more)
        MODEL.hf(two)


@pytest.mark.parametrize("positions", ["last", "generated", "predicting", slice(-2, None), 3, pb.Token(9)], ids=str)
@pytest.mark.parametrize("draft", ["another", "itself", "prompt lookup"])
def test_assisted_decoding_is_edited_as_plain(positions: object, draft: str) -> None:
    """Drafts that are not taken leave nothing behind, neither in the text nor in what was touched."""
    edit, ids = edit_of(positions), torch.tensor([[5, 9, 40, 5, 9, 40, 5, 9]])
    assistant = {"another": twin("llama", seed=1), "itself": MODEL.hf}
    more = {"prompt_lookup_num_tokens": 3} if draft == "prompt lookup" else {"assistant_model": assistant[draft]}
    with MODEL.edited(edit):
        right = MODEL.hf.generate(
            ids, attention_mask=torch.ones_like(ids), **OPTIONS | {"max_new_tokens": 8}, use_cache=False
        )
        touched = MODEL.touched
        found = MODEL.hf.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS | {"max_new_tokens": 8}, **more)
        assert found.sequences.tolist() == right.sequences.tolist()
        assert MODEL.touched == touched
    assert close(torch.stack(found.logits, 1), torch.stack(right.logits, 1), noise=256)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("n_first", [1, 3])
def test_three_turns_on_a_static_cache(name: str, n_first: int) -> None:
    """In each turn the edit is at that turn's end, also after a turn of one token, which the cache does not hold yet."""
    model, edit = pb.load(twin(name)), edit_of("last")
    text, ends, cache = IDS, [], {}
    options = OPTIONS | {"max_new_tokens": n_first}
    with model.edited(edit):
        for more in (4, 0, 2):
            ends.append(text.shape[1] - 1)
            static = {} if cache else {"cache_implementation": "static", "max_cache_len": 40}
            grown = model.hf.generate(text, attention_mask=torch.ones_like(text), **options, **cache, **static)
            cache = with_cache(model.hf, cache_among((), grown))
            whole_text = grown.sequences
            text = torch.cat([whole_text, IDS[:, : more + 1] + 1], 1)
    right = pb.run(model, whole_text[:, :-1], edits=[edit_of(tuple(ends))]).logits
    assert close(torch.stack(grown.logits, 1), right[:, ends[-1] :], noise=256)
