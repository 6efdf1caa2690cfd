"""Positions are the prompt's, however its tokens arrive: against each prompt run whole, alone and without a cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import patchbay as pb
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin
from tests.shares import by_turns
from tests.tolerance import close

MODELS = {name: pb.load(twin(name).eval()) for name in ("llama", "gpt2")}
PROMPT = [5, 9, 40, 2, 11, 3, 8, 30]
NAMED = [0, -1, -3, (1, 3), "last", slice(1, 4), slice(-2, None), slice(1, -1), slice(2, None), "predicting", "-1:"]


def vector() -> Tensor:
    return torch.randn(MODELS["llama"].d_model, generator=torch.Generator().manual_seed(3)) * 3


def edit_of(model: pb.Model, positions: object) -> pb.Edit:
    value = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)) * 3
    return pb.add(pb.Port("resid_out", 0), value, positions=positions)


def whole(model: pb.Model, ids: list[int], edit: pb.Edit) -> Tensor:
    return pb.run(model, [ids], edits=[edit]).logits[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", NAMED, ids=str)
@settings(max_examples=6, deadline=None)
@given(left=st.integers(0, 3), right=st.integers(0, 3), short=st.integers(4, 8))
def test_padding_on_any_side(name: str, positions: object, left: int, right: int, short: int) -> None:
    model = MODELS[name]
    width = max(8, left + short + right)
    mask = torch.zeros(2, width, dtype=torch.long)
    ids = torch.full((2, width), 7)
    for row, (start, n) in enumerate(((width - 8, 8), (left, short))):
        ids[row, start : start + n], mask[row, start : start + n] = torch.tensor(PROMPT[:n]), 1
    place = (mask.cumsum(1) - 1).clamp(min=0)
    edit = edit_of(model, positions)
    with torch.no_grad(), model.edited(edit):
        found = model.hf(ids, attention_mask=mask, position_ids=place).logits
    for row in range(2):
        n = int(mask[row].sum())
        right_one = whole(model, PROMPT[:n], edit)
        assert close(found[row][mask[row].bool()], right_one)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, 7), positions=st.sampled_from([0, (1, 2), slice(0, 1), None, pb.Token(9)]))
def test_a_prompt_in_two_calls(name: str, cut: int, positions: object) -> None:
    model, edit = MODELS[name], edit_of(MODELS[name], positions)
    if isinstance(positions, tuple) and cut < 3:
        return
    ids = torch.tensor([PROMPT])
    with torch.no_grad(), model.edited(edit):
        first = model.hf(ids[:, :cut], use_cache=True)
        second = model.hf(ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
    found = torch.cat([first.logits, second.logits], 1)[0]
    assert close(found, whole(model, PROMPT, edit))


WAYS: list[dict[str, object]] = [{}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}]


@pytest.mark.parametrize(
    ("options", "positions", "name"), by_turns(WAYS, [*NAMED, "generated", 7], MODELS, of=2), ids=str
)
def test_generate_of_the_lent_model(name: str, positions: object, options: dict[str, object]) -> None:
    model, edit = MODELS[name], edit_of(MODELS[name], positions)
    ids = torch.tensor([PROMPT])
    more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), model.edited(edit):
        right = model.hf.generate(ids, use_cache=False, **more)
        found = model.hf.generate(ids, **more, **options)
    assert torch.equal(found, right)


def test_a_cache_filled_before_is_known_or_refused() -> None:
    model = MODELS["llama"]
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        cache = model.hf(ids[:, :5], use_cache=True).past_key_values
        with model.edited(edit_of(model, 2)), pytest.raises(PatchbayError, match="already holds 5 tokens"):
            model.hf(ids[:, 5:], past_key_values=cache)
        with model.edited(edit_of(model, "last")):
            found = model.hf(ids[:, 5:], past_key_values=cache).logits[0]
        assert close(found, whole(model, PROMPT, edit_of(model, "last"))[5:])


@pytest.mark.parametrize("cut", [5, len(PROMPT) - 1])
def test_a_prompt_whose_end_is_not_known_is_refused_and_said_it_is_right(cut: int) -> None:
    model, ids, edit = MODELS["llama"], torch.tensor([PROMPT]), edit_of(MODELS["llama"], "last")
    with torch.no_grad(), model.edited(edit):
        cache = model.hf(ids[:, :cut], use_cache=True).past_key_values
        with pytest.raises(PatchbayError, match=r"more come: .*prompt_length=n"):
            model.hf(ids[:, cut:], past_key_values=cache)
    with torch.no_grad(), model.edited(edit, prompt_length=len(PROMPT)):
        first = model.hf(ids[:, :cut], use_cache=True)
        second = model.hf(ids[:, cut:], past_key_values=first.past_key_values).logits
    found = torch.cat([first.logits, second], 1)[0]
    assert close(found, whole(model, PROMPT, edit))


def test_patterns_under_a_static_cache() -> None:
    model, ids = MODELS["llama"], torch.tensor([PROMPT])
    port = pb.Port("attn.pattern", 1)
    more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    more |= {"return_dict_in_generate": True, "cache_implementation": "static"}
    plain = torch.stack(model.hf.generate(ids, **more).logits)
    with model.session([port], [pb.scale(port, 1.0)]) as session:
        found = torch.stack(model.hf.generate(ids, **more).logits)
    assert close(found, plain)
    assert session.captured[port].shape[-1] == len(PROMPT) + 3
    assert close(session.captured[port].sum(-1), 1.0)
    cut = pb.block(port, query=slice(2, None), key=0)
    with torch.no_grad(), model.edited(cut):
        fixed = torch.stack(model.hf.generate(ids, **more).logits)
        right = torch.stack(model.hf.generate(ids, **(more | {"cache_implementation": None})).logits)
    assert close(fixed, right)
