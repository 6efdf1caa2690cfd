"""Models that are no causal language model are refused in one sentence that says which kind they are, whatever transformers has."""

import functools
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, LlamaConfig

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.model.stream import refuse_normed
from patchbay.tiny.twins import _draw, twin

SIZES: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
) | dict(
    head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0
)
SIZES |= dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, encoder_layers=1, decoder_layers=1
)
SIZES |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, ffn_dim=48)
SIZES |= dict(
    embedding_size=32, emb_dim=32, dim=32, hidden_dim=48, n_layers=1, n_heads=4, attention_window=4, type_vocab_size=2
)
SIZES |= dict(n_embd=32, n_layer=1, n_head=4, max_source_positions=32, max_target_positions=32, num_mel_bins=8)

ENCODERS = """albert bert camembert convbert deberta deberta-v2 distilbert electra ernie esm eurobert flaubert fnet gte ibert
jina_embeddings_v3 layoutlm longformer megatron-bert modernbert mpnet nomic_bert nystromformer rembert roberta
roberta-prelayernorm roformer squeezebert xlm-roberta xmod"""
TWO_STACKS = """bart blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus plbart
switch_transformers t5 umt5"""
DECODERS = "bart blenderbot marian mbart mvp pegasus plbart trocr whisper"
POST_NORM = "bert bert-generation camembert data2vec-text electra ernie openai-gpt roberta roformer xlm-roberta minimax"


@functools.cache
def made(auto: Any, kind: str) -> Any:
    config = AutoConfig.for_model(kind, **SIZES | (dict(is_decoder=True) if auto is AutoModelForCausalLM else {}))
    with torch.random.fork_rng():
        hf = auto.from_config(config)
        _draw(hf)
    return hf.eval()


def said(hf: Any) -> str:
    with pytest.raises(PatchbayError) as refused:
        pb.load(hf)
    text = str(refused.value)
    assert text.startswith(type(hf).__name__)
    assert ". " not in text  # one sentence
    return text


@pytest.mark.parametrize("kind", ENCODERS.split())
def test_encoders(kind: str) -> None:
    assert "is an encoder, which fills in masked tokens" in said(made(AutoModelForMaskedLM, kind))


@pytest.mark.parametrize("kind", TWO_STACKS.split())
def test_encoder_decoders(kind: str) -> None:
    assert "is an encoder-decoder: its tokens are written by a second stack" in said(made(AutoModelForSeq2SeqLM, kind))


@pytest.mark.parametrize("kind", DECODERS.split())
def test_decoders_that_are_made_to_read_an_encoder(kind: str) -> None:
    assert "is made to read a second stack" in said(made(AutoModelForCausalLM, kind))


@pytest.mark.parametrize("kind", POST_NORM.split())
def test_blocks_that_norm_the_stream(kind: str) -> None:
    """BERT as a decoder, GPT-1, MiniMax: y = norm(x + block(x)), or norm(x) kept in place of x."""
    hf = made(AutoModelForCausalLM, kind)
    assert "goes on from the norm of its stream, not from the stream" in said(hf)
    assert not hf.training
    assert not any(module._forward_hooks for module in hf.modules())


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "olmo2", "gpt2", "mamba", "falcon", "granite", "qwen3_next", "falcon_h1"]
)
def test_blocks_that_add_to_the_stream_are_not_taken_for_such(name: str) -> None:
    refuse_normed(twin(name))


def test_models_that_do_not_read_tokens_or_give_no_logits() -> None:
    speech = transformers.Wav2Vec2BertConfig(**{k: v for k, v in SIZES.items() if k in ("hidden_size", "intermediate_size")} | dict(
        num_hidden_layers=1, num_attention_heads=4, feature_projection_input_dim=8, vocab_size=96))  # fmt: skip
    assert "reads input_features, not tokens" in said(transformers.Wav2Vec2BertForCTC(speech))
    seen = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8)  # fmt: skip
    assert "reads pixel_values, not tokens" in said(transformers.ViTForImageClassification(seen))
    bare = transformers.LlamaModel(LlamaConfig(**SIZES))
    assert "gives no logits" in said(bare)
    classes = transformers.LlamaForSequenceClassification(LlamaConfig(**SIZES))
    assert "gives no logits" in said(classes)
