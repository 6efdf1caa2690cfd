"""Two turns of a chat on one cache: in each, positions count to that turn's end, as in one run over the finished text."""

import copy

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


@pytest.mark.parametrize("cuts", [[6], [6, 7, 8, 9]], ids=str)
@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "lfm2", "qwen3_next"])
def test_a_prompt_in_pieces_on_states(name: str, cuts: list[int]) -> None:
    """A state does not say how many tokens went into it: what ran in the block is known, also of a copy."""
    if len(cuts) == 1 and name in ("mamba", "falcon_mamba"):
        pytest.skip("transformers' own numbers are others where several tokens come on a state")
    model = pb.load(twin(name).eval())
    ids = torch.randint(8, 96, (1, 10), generator=torch.Generator().manual_seed(0))
    value = 3 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    for positions in ("last", -4, (1, 7), slice(5, 9)):
        edit = pb.add(model.layers[0].resid_out, value, positions=positions)
        right, found, cache = pb.run(model, ids, edits=[edit]).logits, [], None
        with torch.no_grad(), model.edited(edit, prompt_length=10):
            for start, end in zip([0, *cuts], [*cuts, 10], strict=True):
                out = model.hf(ids[:, start:end], use_cache=True, **with_cache(model.hf, copy.deepcopy(cache)))
                cache = cache_among((), out)
                found.append(out.logits)
        assert close(torch.cat(found, 1), right, noise=256)  # in other pieces
