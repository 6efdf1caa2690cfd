"""Two turns of a chat on one cache: in each, positions count to that turn's end, as in one run over the finished text."""

import pytest
import torch

import patchbay as pb
from patchbay.jacks.arguments import cache_among, with_cache
from patchbay.tiny.twins import twin
from tests.tolerance import close

OPTIONS = {
    "max_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "bamba", "qwen3_next", "lfm2"])
def test_the_second_turn_is_edited_at_its_own_last_token(name: str) -> None:
    model = pb.load(twin(name).eval())
    ids = torch.randint(8, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    port = model.layers[0].resid_out
    value = (
        3
        * pb.run(model, ids, taps=[port])[port].std()
        * torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    )
    with model.edited(pb.add(port, value, positions="last")):
        first = model.hf.generate(ids[:, :8], attention_mask=torch.ones(1, 8, dtype=torch.long), **OPTIONS)
        text = torch.cat([first.sequences, ids[:, 8:]], 1)
        cache = with_cache(model.hf, cache_among((), first))
        second = model.hf.generate(text, attention_mask=torch.ones_like(text), **cache, **OPTIONS)
    places = [7, text.shape[1] - 1]
    whole = pb.run(model, second.sequences[:, :-1], edits=[pb.add(port, value, positions=places)]).logits
    assert close(torch.stack(second.logits, 1), whole[:, text.shape[1] - 1 :], noise=256)  # in other pieces
