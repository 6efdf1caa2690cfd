"""What an edit touched: positions by prompt, through masks, chunks, caches and generated tokens, against lists written by hand."""

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
