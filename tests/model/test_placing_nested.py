"""Text models inside vision-language checkpoints, loaded as AutoModelForImageTextToText gives them: right with text prompts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
)

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.model.check import verify
from patchbay.model.rotary import turns
from patchbay.model.self_check import queries_and_keys
from patchbay.signal.port import Port
from tests.tolerance import close

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
TEXT: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, head_dim=8
) | dict(vocab_size=99, max_position_embeddings=64, pad_token_id=0)
EYES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
QWEN: dict[str, Any] = dict(
    depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=4
)
QWEN |= dict(window_size=8, fullatt_block_indexes=[0])
SLIDING: dict[str, Any] = dict(
    sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
)
TURNED: dict[str, Any] = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)


def config(name: str) -> Any:
    if name == "llava":
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**EYES, projection_dim=32),
            text_config=LlamaConfig(**TEXT),
            image_token_index=98,
        )
    if name == "gemma3":
        return Gemma3Config(
            text_config=TEXT | SLIDING | dict(model_type="gemma3_text"),
            vision_config=dict(EYES),
            mm_tokens_per_image=4,
            image_token_index=98,
        )
    if name == "paligemma":
        text = dict(TEXT, model_type="gemma")
        return PaliGemmaConfig(
            vision_config=dict(EYES, model_type="siglip_vision_model"),
            text_config=text,
            image_token_index=98,
            projection_dim=32,
        )
    places = dict(image_token_id=98, video_token_id=97, vision_start_token_id=96, vision_end_token_id=95)
    return Qwen2_5_VLConfig(text_config=dict(TEXT, rope_parameters=TURNED), vision_config=QWEN, **places)


def drawn(name: str) -> Any:
    torch.manual_seed(0)
    hf = AutoModelForImageTextToText.from_config(config(name)).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return hf


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_the_text_model_of_a_vision_language_checkpoint(name: str) -> None:
    hf = drawn(name)
    model = pb.load(hf)
    assert (model.n_layers, model.n_heads(0), model.d_model) == (2, 4, 32)
    with torch.no_grad():
        plain = hf(input_ids=IDS, use_cache=False).logits
        alone = hf(input_ids=IDS[1:, :5], use_cache=False).logits[0]
    assert torch.equal(pb.run(model, IDS).logits, plain)
    assert [str(row) for row in verify(model) if not row.passed] == []
    ragged = pb.run(model, [IDS[0].tolist(), IDS[1, :5].tolist()]).logits
    assert close(ragged[1, :5], alone)
    edit = pb.zero(model.layers[1].heads[1].z)

    def cut(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone()
        z[..., 8:16] = 0
        return (z, *args[1:])

    handle = model.modules[1].attn_proj.register_forward_pre_hook(cut)  # type: ignore[union-attr]
    with torch.no_grad():
        expected = hf(input_ids=IDS, use_cache=False).logits
        text = hf.generate(IDS, max_new_tokens=3, do_sample=False).tolist()
    handle.remove()
    assert not close(expected, plain)
    assert torch.equal(pb.run(model, IDS, edits=[edit]).logits, expected)
    assert model.generate(IDS.tolist(), 3, edits=[edit]) == text
    table = pb.sweep(model, IDS, [edit], metric=lambda logits, _: logits[:, 3])
    assert close(table["value"].flatten(), expected[:, -1, 3], of=expected)


def test_positions_that_begin_at_one() -> None:
    """PaliGemma counts positions from 1, so that its first query is turned already; weights by head are proved where it is not."""
    hf = drawn("paligemma")
    model = pb.load(hf)
    assert model.check.shifted
    assert not model.causal  # a prompt without an answer is one prefix, whose tokens all see each other
    with torch.no_grad():
        assert torch.equal(pb.run(model, IDS).logits, hf(input_ids=IDS, use_cache=False).logits)
        stream = hf.model.language_model.layers[0].input_layernorm(
            pb.run(model, IDS, taps=["L0.resid_in"])["L0.resid_in"]
        )
        still = queries_and_keys(model, IDS)
    w = model.layers[0].attn.weights()
    for port, weight in ((Port("attn.q", 0), w.W_Q), (Port("attn.k", 0), w.W_K)):
        first = torch.einsum("bd,hdr->bhr", stream[:, 0], weight)
        assert close(first, still[port][:, :, 0])
        assert not close(first, pb.run(model, IDS, taps=[port])[port][:, :, 0])
    turn = turns(model, range(4), {0: model.layers[0].attn.weights(fold_norm=True)})[0]
    assert turn.rotation is not None
    q = pb.run(model, IDS, taps=[Port("attn.q", 0)])[Port("attn.q", 0)]
    made = torch.einsum("bpd,hdr->bhpr", stream, w.W_Q)
    assert close(
        q[:, :, 1], (made[:, :, 1] @ turn.rotation[2].to(made))
    )  # position 1 is the second of them, counted from 1
    swapped = replace(model.family, name="mine", qkv_modules=("q_proj", "v_proj", "k_proj"))
    with pytest.raises(PatchbayError, match=r"weights of L0\.attn cannot be read"):
        pb.load(hf, family=swapped).layers[0].attn.weights()
