"""Random-weight twins: the smallest model of every covered architecture, for proving that the view of it is right.

A twin has the family's own code, two to four layers, and weights drawn so that every mechanism matters: attention is
not uniform, biases are not zero, norm gains are not one, sinks and router corrections are on, grouped-query heads share
keys, and sliding windows are shorter than the prompts that tests use. Its text means nothing: a twin says whether taps
and edits are right on a family, not what a trained model of that family does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchbay.results.method import seeded
from patchbay.signal.port import PatchbayError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_VOCAB = 96
WINDOW = 6  # of families with sliding attention: shorter than the prompts that tests use

_DENSE: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MOE = _DENSE | dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_WIDE = _DENSE | dict(head_dim=12)  # heads together are wider than the stream
_SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
_FULL = _DENSE | dict(num_key_value_heads=4)
_SHARED = dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
_LATENT = _FULL | dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    n_shared_experts=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    head_dim=4,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=6,
    n_group=2,
    topk_group=1,
    num_local_experts=8,
)
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    num_hidden_layers=3,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    shared_expert_intermediate_size=24,
)
_YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, rope_theta=10000.0)
_GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)

# text models inside vision-language models, and what sees there
_TEXT: dict[str, Any] = _DENSE | dict(head_dim=8, vocab_size=N_VOCAB)
_EYES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
) | dict(depth=1, embed_dim=32, num_heads=2, out_hidden_size=32, projection_dim=32, num_channels=3)
_TURNED = dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0))


def _nested(text: dict[str, Any] | None = None, eyes: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return dict(text_config=_TEXT | (text or {}), vision_config=_EYES | (eyes or {})) | more


# name -> (model type, what its config sets). A name is a model type, or one with a variant after it.
FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gpt_neox": ("gpt_neox", _DENSE | dict(use_parallel_residual=True)),
    "gpt_neox sequential": ("gpt_neox", _DENSE | dict(use_parallel_residual=False)),
    "gpt_neo": (
        "gpt_neo",
        dict(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["local", "global"], 1]],
            window_size=WINDOW,
            intermediate_size=48,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gptj": ("gptj", _GPT | dict(rotary_dim=4)),
    "opt": ("opt", _DENSE | dict(ffn_dim=48, word_embed_proj_dim=32)),
    "bloom": ("bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
    "falcon": ("falcon", _DENSE | dict(multi_query=True, parallel_attn=True)),
    "falcon grouped": ("falcon", _DENSE | dict(new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    "falcon alibi": ("falcon", _DENSE | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "llama": ("llama", _DENSE),
    "llama biased": ("llama", _DENSE | dict(attention_bias=True, mlp_bias=True, head_dim=12)),
    "mistral": ("mistral", _DENSE | dict(sliding_window=WINDOW)),
    "mixtral": ("mixtral", _MOE),
    "qwen2": ("qwen2", _DENSE),
    "qwen3": ("qwen3", _WIDE),
    "qwen3_moe": ("qwen3_moe", _MOE | dict(head_dim=12)),
    "qwen3_next": ("qwen3_next", _MOE | _LINEAR | dict(head_dim=8)),
    "gemma": ("gemma", _WIDE),
    "gemma2": ("gemma2", _WIDE | _SLIDING | dict(query_pre_attn_scalar=8, attn_logit_softcapping=2.0)),
    "gemma3_text": ("gemma3_text", _WIDE | _SLIDING | dict(query_pre_attn_scalar=8)),
    "olmo2": ("olmo2", _DENSE),
    "olmoe": ("olmoe", _MOE),
    "phi": ("phi", _FULL),
    "phi3": ("phi3", _DENSE),
    "stablelm": ("stablelm", _DENSE | dict(use_qkv_bias=True)),
    "stablelm parallel": ("stablelm", _DENSE | dict(use_parallel_residual=True, qk_layernorm=True)),
    "starcoder2": ("starcoder2", _DENSE | dict(sliding_window=WINDOW)),
    "cohere": ("cohere", _DENSE | dict(logit_scale=0.5)),
    "cohere normed": ("cohere", _DENSE | dict(use_qk_norm=True, logit_scale=0.5)),
    "cohere2": ("cohere2", _DENSE | _SLIDING | dict(logit_scale=0.5)),
    "granite": (
        "granite",
        _DENSE | dict(residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=2.0, attention_multiplier=0.2),
    ),
    "gpt_oss": ("gpt_oss", _MOE | _SLIDING | dict(head_dim=12, rope_parameters=_YARN)),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "smollm3": ("smollm3", _DENSE | dict(no_rope_layers=[1, 0])),
    "falcon_h1": (
        "falcon_h1",
        _DENSE
        | dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
        | dict(ssm_out_multiplier=0.7, attention_out_multiplier=0.6, attention_in_multiplier=1.3, key_multiplier=0.8)
        | dict(embedding_multiplier=2.0, lm_head_multiplier=0.5),
    ),
    "nemotron_h": (
        "nemotron_h",
        _DENSE
        | dict(
            layers_block_type=["linear_attention", "full_attention", "moe", "mlp"],
            num_hidden_layers=4,
            head_dim=8,
            chunk_size=8,
        )
        | dict(
            mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, n_routed_experts=4, num_experts_per_tok=2
        )
        | dict(moe_intermediate_size=24, moe_shared_expert_intermediate_size=24, n_group=1, topk_group=1),
    ),
    "mamba2": (
        "mamba2",
        dict(hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    ),
    "lfm2": (
        "lfm2",
        _DENSE
        | dict(layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3)
        | dict(block_ff_dim=48, block_auto_adjust_ff_dim=False),
    ),
    "bamba": (
        "bamba",
        _DENSE
        | dict(attn_layer_indices=[1], num_hidden_layers=3, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8)
        | dict(mamba_n_groups=1, mamba_chunk_size=8),
    ),
    # further model types of the same rows
    "arcee": ("arcee", _DENSE),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "dots1": (
        "dots1",
        _MOE | dict(n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1),
    ),
    "exaone4": ("exaone4", _DENSE | _SLIDING),
    "flex_olmo": ("flex_olmo", _MOE),
    "glm": ("glm", _WIDE),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "helium": ("helium", _DENSE | dict(head_dim=8)),
    "mamba": ("mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=8)),
    "ministral": ("ministral", _WIDE | _SLIDING),
    "nemotron": ("nemotron", _DENSE),
    "olmo3": ("olmo3", _DENSE | _SLIDING),
    "phimoe": ("phimoe", _MOE),
    "qwen2_moe": ("qwen2_moe", _MOE | dict(shared_expert_intermediate_size=24)),
    "seed_oss": ("seed_oss", _DENSE),
    "vaultgemma": ("vaultgemma", _WIDE | _SLIDING | dict(query_pre_attn_scalar=8)),
    "apertus": ("apertus", _DENSE),
    "aria_text": ("aria_text", _MOE | dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)),
    "cohere2_moe": ("cohere2_moe", _MOE | dict(logit_scale=0.5)),
    "cwm": ("cwm", _DENSE | dict(head_dim=8)),
    "ernie4_5": ("ernie4_5", _DENSE | dict(head_dim=8)),
    "ernie4_5_moe": ("ernie4_5_moe", _MOE | dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1)),
    "exaone_moe": ("exaone_moe", _MOE | _SHARED),
    "falcon_mamba": ("falcon_mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=8)),
    "flint": ("flint", _DENSE | dict(head_dim=8)),
    "glm4": ("glm4", _WIDE),
    "glm4_moe": ("glm4_moe", _MOE | _SHARED | dict(head_dim=8)),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "granitemoe": ("granitemoe", _MOE | dict(residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=2.0)),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _DENSE | dict(head_dim=8)),
    "hy_v3": ("hy_v3", _MOE | _SHARED | dict(head_dim=8)),
    "jais2": ("jais2", _DENSE | dict(head_dim=8)),
    "llama4_text": (
        "llama4_text",
        _MOE | dict(head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=2, num_experts_per_tok=1),
    ),
    "mellum": ("mellum", _MOE | dict(head_dim=8)),
    "minimax_m2": ("minimax_m2", _MOE | dict(head_dim=8)),
    "ministral3": ("ministral3", _DENSE | dict(head_dim=8)),
    "mpt": ("mpt", dict(d_model=32, n_layers=2, n_heads=4, expansion_ratio=4, max_seq_len=64)),
    "olmo": ("olmo", _DENSE),
    "persimmon": ("persimmon", _FULL | dict(qk_layernorm=False)),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _MOE | _LINEAR | dict(head_dim=8)),
    "qwen3_5_text": ("qwen3_5_text", _DENSE | _LINEAR | dict(head_dim=8)),
    "solar_open": ("solar_open", _MOE | _SHARED | dict(head_dim=8)),
    "biogpt": ("biogpt", _FULL),
    "granite_swa": (
        "granite_swa",
        _DENSE | dict(residual_multiplier=0.5, attention_multiplier=0.3, sliding_window=WINDOW),
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        _MOE | dict(residual_multiplier=0.5, attention_multiplier=0.3, sliding_window=WINDOW),
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _MOE | dict(head_dim=8, moe_topk=2)),
    "hyperclovax": ("hyperclovax", _DENSE | dict(residual_multiplier=0.5, use_post_norm=True)),
    "jamba": (
        "jamba",
        _MOE | dict(num_hidden_layers=3, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
    ),
    "laguna": ("laguna", _MOE | dict(head_dim=8)),
    "lfm2_moe": (
        "lfm2_moe",
        _MOE | dict(layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3, num_dense_layers=1),
    ),
    "nanochat": ("nanochat", _FULL),
    # text models that lie in vision-language models
    "aria": ("aria", _nested(dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1))),
    "aya_vision": ("aya_vision", _nested(dict(logit_scale=0.5))),
    "deepseek_vl": ("deepseek_vl", _nested()),
    "fuyu": ("fuyu", _nested(_FULL)),
    "gemma3": (
        "gemma3",
        _nested(_SLIDING | dict(query_pre_attn_scalar=8), mm_tokens_per_image=4, image_token_index=95),
    ),
    "idefics2": ("idefics2", _nested()),
    "idefics3": ("idefics3", _nested()),
    "internvl": ("internvl", _nested()),
    "lfm2_vl": ("lfm2_vl", _nested(dict(layer_types=["conv", "full_attention"], block_ff_dim=48))),
    "llava": ("llava", _nested(image_token_index=95)),
    "llava_onevision": ("llava_onevision", _nested()),
    "mistral3": ("mistral3", _nested()),
    "paligemma": ("paligemma", _nested(dict(model_type="gemma"), image_token_index=95, projection_dim=32)),
    "qwen2_vl": ("qwen2_vl", _nested(_TURNED)),
    "qwen2_5_vl": ("qwen2_5_vl", _nested(_TURNED, dict(window_size=8, fullatt_block_indexes=[0], patch_size=4))),
    "qwen3_vl": ("qwen3_vl", _nested()),
    "qwen3_5": ("qwen3_5", _nested(_LINEAR)),
    "smolvlm": ("smolvlm", _nested()),
    "xglm": ("xglm", dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, max_position_embeddings=64)),
}


def twin(name: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """The twin of a family, in float32 and evaluation mode; the same seed gives the same weights. `config` overrides."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if name not in FAMILY_CONFIGS:
        known = list(FAMILY_CONFIGS)
        raise PatchbayError(f"no twin {name!r}; there are {', '.join(known)}" + suggest(name, known))
    model_type, settings = FAMILY_CONFIGS[name]
    nested = "text_config" in settings
    if nested:
        settings = settings | dict(text_config=settings["text_config"] | config)
    else:
        settings = settings | dict(vocab_size=N_VOCAB) | config
    made = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    with seeded(seed):
        hf = made.from_config(AutoConfig.for_model(model_type, **settings))
        _draw(hf)
    hf.generation_config.eos_token_id = None  # generation goes on for as long as it is asked to
    return hf.eval()


@torch.no_grad()
def _draw(hf: nn.Module) -> None:
    """Matrices that keep a vector's size and a little more, embeddings of size a half, all else moved off its default."""
    embeddings = {id(module.weight) for module in hf.modules() if isinstance(module, nn.Embedding)}
    corrections = [buffer for name, buffer in hf.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, weight in [*hf.named_parameters(), *(("correction", buffer) for buffer in corrections)]:
        if id(weight) in embeddings:
            weight.normal_(0.0, 0.5)
        elif weight.ndim < 2 or "norm" in name or name.endswith("A_log"):
            sharper = 0.6 if any(norm in name for norm in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")) else 0.0
            weight.add_(sharper + 0.3 * torch.randn_like(weight))  # norm gains (1 or 1 + 0), biases, sinks, decay rates
        else:
            weight.normal_(0.0, 1.4 / max(4, min(weight.shape[-2:])) ** 0.5)
