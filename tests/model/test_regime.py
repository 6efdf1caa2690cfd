"""regime: positions beyond the trained length, scaled in every way that transformers has, and mixers that keep no state in the cache:
what is run, edited, swept and generated is plain Hugging Face's."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.signal.port import Port
from patchbay.tiny.twins import twin
from tests.tolerance import close

TRAINED, LONG = 32, 40
SCALED: dict[str, dict[str, Any]] = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "longrope": dict(original_max_position_embeddings=16, long_factor=[4.0] * 4, short_factor=[1.0] * 4),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
}
IDS = torch.randint(3, 90, (2, LONG), generator=torch.Generator().manual_seed(3))


@functools.cache
def scaled(kind: str) -> Any:
    rope = dict(rope_type=kind, rope_theta=10000.0) | SCALED[kind]
    return twin("llama", max_position_embeddings=TRAINED, rope_parameters=rope)


def cut(model: pb.Model, ids: Tensor, **how: Any) -> Any:
    """What the model's own code makes of ids with L1.H2's slice of z set to 0 from position 5 on by a hook of plain torch."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[:, 5 if z.shape[1] > 1 else 0 :, 16:24] = 0
        return (z, *args[1:])

    handle = model.modules[1].attn_proj.register_forward_pre_hook(hook)  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            return model.hf.generate(ids, **how) if how else model.hf(ids, use_cache=False).logits
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", SCALED)
def test_prompts_beyond_the_trained_length(kind: str) -> None:
    model = pb.load(scaled(kind))
    with torch.no_grad():
        plain = model.hf(IDS, use_cache=False).logits
        short = model.hf(IDS[1:, :12], use_cache=False).logits[0]
    assert torch.equal(pb.run(model, IDS).logits, plain)
    edit = pb.zero(model.layers[1].heads[2].z, positions=slice(5, None))
    expected = cut(model, IDS)
    assert not close(expected, plain)
    assert close(pb.run(model, IDS, edits=[edit]).logits, expected)
    ragged = pb.run(model, [IDS[0].tolist(), IDS[1, :12].tolist()])
    assert close(ragged.logits[0], plain[0])
    assert close(ragged.logits[1, :12], short)
    edits = [pb.zero(head.z, positions=p) for head in model.layers[0].heads for p in (7, LONG - 2)]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])["value"]
    for e, one in enumerate(edits):
        logits = pb.run(model, IDS, edits=[one]).last_logits
        assert close(table[e], logits[:, 7], of=logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", SCALED)
def test_generation_across_the_trained_length(kind: str) -> None:
    """From below it to beyond it, under an edit: transformers' own tokens with the hook."""
    model, ids = pb.load(scaled(kind)), IDS[:1, : TRAINED - 3]
    edit = pb.zero(model.layers[1].heads[2].z, positions=slice(5, None))
    found = model.generate(ids.tolist(), 8, edits=[edit])
    assert found == cut(model, ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()


def test_positions_that_nothing_scales_end_where_they_were_trained() -> None:
    model = pb.load(twin("llama", max_position_embeddings=TRAINED))
    with pytest.raises(PatchbayError, match=f"has {LONG} tokens, the model takes {TRAINED}"):
        pb.run(model, IDS)


class Forgetful(Lfm2ShortConv):
    """A convolution that writes no state: each step of generation sees its own token alone."""

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, cache: Any = None, **given: Any) -> Tensor:
        return super().forward(hidden_states, None, **given)


def test_a_mixer_that_writes_no_cache() -> None:
    hf = twin("lfm2")
    for layer in hf.model.layers:
        if hasattr(layer, "conv"):
            layer.conv.__class__ = Forgetful
    model, ids = pb.load(hf), IDS[:, :9]
    with torch.no_grad():
        assert torch.equal(pb.run(model, ids).logits, hf(ids, use_cache=False).logits)
        own = hf.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    assert model.generate(ids.tolist(), 4) == own  # the model's own steps, whatever they are
    edits = [pb.zero(head.z, positions=4) for head in model.layers[1].heads]
    table = pb.sweep(model, ids, edits, metric=lambda logits, _: logits[:, 7])
    assert any("carry a state" in note for note in table.notes)
    for e, edit in enumerate(edits):
        logits = pb.run(model, ids, edits=[edit]).last_logits
        assert close(table["value"][e], logits[:, 7], of=logits)
    with pytest.raises(PatchbayError, match="with its cache this model computes something else"):
        pb.run(model, ids, taps=[Port("resid_out", 0)], max_new_tokens=4)
