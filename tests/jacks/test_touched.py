"""What an edit touched: positions by prompt, through masks, chunks, caches and generated tokens, against lists written by hand."""

import copy

import pytest
import torch

import patchbay as pb
from patchbay.tiny.twins import twin
from tests.tolerance import close

MODELS = {name: pb.load(twin(name).eval()) for name in ("llama", "gptj")}
IDS = torch.tensor([[5, 9, 40, 2, 11, 3], [7, 7, 9, 8, 30, 12]])
HERE = {  # positions -> which of six tokens and three more
    None: range(9), -1: [5], "last": [5], "generated": [6, 7, 8], "predicting": [5, 6, 7, 8], "-1:": [5, 6, 7, 8], "1:3": [1, 2],
    (0, 4): [0, 4],
}  # fmt: skip
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "more", [{}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_through_a_generation_of_padded_prompts(name: str, more: dict[str, object]) -> None:
    model = MODELS[name]
    signals = ("resid_out", "attn.z", "attn.v", "attn.pattern")
    edits = [
        pb.scale(pb.Port(signals[i % 4], i % 2), 1.1, positions=at, rows=None if i % 3 else 1)
        for i, at in enumerate(HERE)
    ]
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    with model.edited(*edits):
        model.hf.generate(padded, attention_mask=mask, **OPTIONS, **more)
        found = model.touched
    for i, at in enumerate(HERE):
        assert found[i] == [tuple(HERE[at]) if i % 3 else (), tuple(HERE[at])], edits[i]


def test_rows_of_different_lengths_chunks_and_enclosing_blocks() -> None:
    model, edit = MODELS["llama"], pb.scale(pb.Port("resid_out", 0), 1.1, positions=slice(-2, None))
    cut = pb.block(pb.Port("attn.pattern", 1), query=slice(2, None), key=slice(3, 4))
    assert model.touched == []
    with model.edited(edit, cut):
        pb.run(model, [[5, 9, 40, 2], [7, 8]])
        assert model.touched == [[(2, 3), (0, 1)], [(3,), ()]]
        model.generate([[5, 9, 40, 2]], 3)
        assert model.touched == [[(2, 3, 4, 5)], [(3, 4, 5)]]
    with torch.no_grad(), model.edited(edit, prompt_length=6):
        cache = model.hf(IDS[:, :3], use_cache=True).past_key_values
        assert model.touched == [[(), ()]]
        model.hf(IDS[:, 3:], past_key_values=cache)
        assert model.touched == [[(4, 5), (4, 5)]]
        model.hf(IDS[:1, :1].repeat(1, 6))
        assert model.touched == [[(4, 5)]]


def test_a_trace_says_the_same() -> None:
    model = MODELS["llama"]
    edits = [pb.scale(pb.Port("attn.out", 0), 1.1, positions=at) for at in HERE]
    trace = pb.run(model, IDS, edits=edits, max_new_tokens=3)
    assert trace.touched == [[tuple(places)] * 2 for places in HERE.values()]


@pytest.mark.parametrize("positions", ["generated", "predicting", "-1:", slice(4, None)], ids=str)
def test_left_padded_prompts_in_chunks_are_edited_as_alone(positions: object) -> None:
    model, edit = MODELS["llama"], pb.scale(pb.Port("resid_out", 0), -2.0, positions=positions)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    with model.edited(edit):
        found = model.hf.generate(padded, attention_mask=mask, prefill_chunk_size=2, output_logits=True,
                                  return_dict_in_generate=True, **OPTIONS)  # fmt: skip
    for row in range(2):
        alone = pb.run(model, IDS[row : row + 1], edits=[edit], max_new_tokens=4)
        assert found.sequences[row, 2:].tolist() == alone.ids[0].tolist()
        logits = torch.stack(found.logits, 1)[row]
        assert close(logits, alone.logits[0, 5:9], noise=256)  # in other pieces


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_caches_in_turns_keep_their_own(name: str) -> None:
    """What `touched` says is of the text of the latest call, whatever ran between two calls on its cache."""
    model = MODELS[name]
    edits = [pb.scale(pb.Port("resid_out", 0), 1.1, positions=slice(1, None, 2)), pb.scale(pb.Port("attn.v", 1), 1.1)]
    edits.append(pb.block(pb.Port("attn.pattern", 1), query=slice(2, 9), key=0))
    with model.edited(*edits, prompt_length=9):
        first = model.hf(IDS[:, :2], use_cache=True).past_key_values
        second = model.hf(IDS[:1], use_cache=True).past_key_values
        assert model.touched == [[(1, 3, 5)], [tuple(range(6))], [(2, 3, 4, 5)]]
        model.hf(IDS[:, 2:5], past_key_values=first)
        assert model.touched == [[(1, 3)] * 2, [tuple(range(5))] * 2, [(2, 3, 4)] * 2]
        model.hf(IDS[:1, :2], past_key_values=second)
        assert model.touched == [[(1, 3, 5, 7)], [tuple(range(8))], [tuple(range(2, 8))]]
        third = copy.deepcopy(first)
        model.hf(IDS[:, 5:], past_key_values=first)
        model.hf(IDS[:, :1], past_key_values=third)
        model.hf(IDS[:, :1], past_key_values=third)
        assert model.touched == [[(1, 3, 5)] * 2, [tuple(range(7))] * 2, [(2, 3, 4, 5, 6)] * 2]
    outside = model.hf(IDS[:, :4], use_cache=True).past_key_values
    with model.edited(edits[1], pb.scale(pb.Port("resid_out", 0), 1.1, positions=slice(4, None))):
        model.hf(IDS)
        model.hf(IDS[:, 4:], past_key_values=outside)
        assert model.touched[1] == [(4, 5)] * 2


@torch.no_grad()
def test_a_prefix_that_many_prompts_share() -> None:
    model, edit = MODELS["llama"], pb.scale(pb.Port("resid_out", 0), 1.1, positions=slice(1, None, 2))
    with model.edited(edit, prompt_length=6):
        cache = model.hf(IDS[:1, :4], use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        model.hf(IDS[:1, 4:].repeat(3, 1), past_key_values=cache)
        assert model.touched == [[(1, 3, 5)] * 3]
