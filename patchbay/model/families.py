"""One row per model family: where embedding, layers, attention, MLP, experts, norms and unembedding live.

What varies between architectures is a row of `FAMILIES`, not a branch elsewhere; `placing.py` says which row a model is. An
architecture that fits no row can be described by hand: `pb.load(model, family=Family(...))`.

Paths are dotted attribute paths; those of a layer start at the decoder layer. An empty path means the layer has no such part;
of alternatives, written "a|b", the first that exists is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """Paths of one architecture. `parallel` is True, or names config flags of which one set means attention beside MLP."""

    name: str
    model_types: tuple[str, ...] = ()
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attn: str = "self_attn"
    attn_proj: str = "o_proj"  # from attn: the output projection, whose input is z of all heads
    attn_added: str = ""  # from the layer: the module whose output is added to the stream, when it is not attn itself
    mixers: tuple[str, ...] = ()  # token mixers without heads that a hybrid has in place of attention
    beside: tuple[
        tuple[str, str], ...
    ] = ()  # mixers that add together, each times a config attribute, in the order of their calls
    norm_attn: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_proj: str = "down_proj"  # from mlp: the projection whose input is the neurons' activation
    mlp_up: str = "up_proj"
    mlp_gate: str = "gate_proj"
    mlp_added: str = ""
    norm_mlp: str = "post_attention_layernorm"
    mid: str = "post_attention_layernorm"  # from the layer: the module whose input is the stream after attention
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    parallel: bool | tuple[str, ...] = False
    qkv: str = "separate"  # layout of the query, key and value weights: see weights.py
    qkv_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention: str = (
        "interface"  # how attention is reached: transformers' AttentionInterface, or the operators it calls
    )
    residual_scale: str = ""  # config attribute that multiplies what attention and MLP add
    opaque: bool = False  # an MLP may hold no projection of its own: its input and output are all that it offers
    sparse: bool = False  # some layers have no MLP
    overwrites: bool = False  # the layer adds in place into what attention or MLP returned: captures must be copies

    def is_parallel(self, config: Any) -> bool:
        if isinstance(self.parallel, bool):
            return self.parallel
        return any(getattr(config, flag, False) for flag in self.parallel)


_PLAIN = (
    "llama mistral qwen2 qwen3 smollm3 gemma seed_oss ministral arcee helium cwm qwen2_vl_text qwen2_5_vl_text qwen3_vl_text "
    "olmo ernie4_5 hunyuan_v1_dense jais2 ministral3 flint"
)
LLAMA = Family("llama", tuple(_PLAIN.split()))
_MOE = "mixtral qwen2_moe qwen3_moe olmoe dots1 ernie4_5_moe exaone_moe glm4_moe hy_v3 mellum minimax_m2 solar_open hunyuan_v1_moe"
GPT = replace(
    LLAMA,
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attn="attn",
    norm_attn="ln_1",
    norm_mlp="ln_2",
    mid="ln_2",
    mlp_gate="",
)
_LATENT = ("q_a_proj", "q_a_layernorm", "q_b_proj|q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
_NEOX: dict[str, Any] = dict(qkv="interleaved", qkv_modules=("query_key_value",), attn_proj="dense")
_NONE: dict[str, Any] = dict.fromkeys(["attn", "norm_attn", "norm_mlp", "mlp_proj", "mlp_up", "mlp_gate", "router", "experts"], "")  # fmt: skip
_NEOX |= dict(mlp_proj="dense_4h_to_h", mlp_up="dense_h_to_4h")
OPT = replace(
    LLAMA,
    name="opt",
    model_types=("opt",),
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    attn_proj="out_proj",
    norm_attn="self_attn_layer_norm",
    norm_mlp="final_layer_norm",
    mid="final_layer_norm",
    mlp="fc1",
    mlp_proj="^fc2",
    mlp_up="^fc1",
    mlp_gate="",
    mlp_added="fc2",
)
LFM2 = replace(
    LLAMA,
    name="lfm2",
    model_types=("lfm2",),
    final_norm="model.embedding_norm",
    attn_proj="out_proj",
    mixers=("conv",),
    norm_attn="operator_norm",
    norm_mlp="ffn_norm",
    mid="ffn_norm",
    mlp="feed_forward",
    mlp_proj="w2",
    mlp_up="w3",
    mlp_gate="w1",
)
BAMBA = replace(
    LLAMA,
    name="bamba",
    model_types=("bamba",),
    final_norm="model.final_layernorm",
    mixers=("mamba",),
    mlp="feed_forward",
    norm_mlp="pre_ff_layernorm",
    mid="pre_ff_layernorm",
)

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, name="moe", model_types=tuple(_MOE.split())),
    replace(LLAMA, name="gpt_oss", model_types=("gpt_oss", "phimoe", "aria_text"), router="mlp.router"),
    replace(
        LLAMA,
        name="deepseek",
        model_types=("deepseek_v3", "deepseek_v2", "glm4_moe_lite"),
        qkv="latent",
        qkv_modules=_LATENT,
    ),
    replace(
        LLAMA,
        name="qwen3_next",
        model_types=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "laguna"),
        mixers=("linear_attn",),
        qkv="gated",
    ),
    replace(LLAMA, name="granite", model_types=("granite", "granite_swa"), residual_scale="residual_multiplier"),
    replace(
        LLAMA,
        name="phi3",
        model_types=("phi3",),
        qkv="packed",
        qkv_modules=("qkv_proj",),
        mlp_up="gate_up_proj",
        mlp_gate="",
    ),
    replace(
        LLAMA,
        name="apertus",
        model_types=("apertus",),
        norm_attn="attention_layernorm",
        norm_mlp="feedforward_layernorm",
        mid="feedforward_layernorm",
        mlp_gate="",
    ),
    replace(
        LLAMA,
        name="glm4",
        model_types=("glm4",),
        attn_added="post_self_attn_layernorm",
        mlp_added="post_mlp_layernorm",
        mlp_up="gate_up_proj",
        mlp_gate="",
    ),
    replace(
        LLAMA,
        name="granitemoe",
        model_types=("granitemoe", "granitemoe_swa"),
        mlp="block_sparse_moe",
        router="block_sparse_moe.router",
        experts="block_sparse_moe.experts",
        residual_scale="residual_multiplier",
    ),
    replace(  # its experts are called with tokens that are weighed already: they have no ports
        LLAMA, name="llama4", model_types=("llama4_text",), mlp="feed_forward", router="", experts="", opaque=True
    ),
    replace(
        LLAMA,
        name="persimmon",
        model_types=("persimmon",),
        final_norm="model.final_layernorm",
        mlp_gate="",
        **_NEOX,
    ),
    replace(
        OPT,
        name="xglm",
        model_types=("xglm",),
        layers="model.layers",
        final_norm="model.layer_norm",
        attention="operators",
    ),
    replace(
        GPT,
        name="mpt",
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        model_types=("mpt",),
        attn_proj="out_proj",
        norm_attn="norm_1",
        norm_mlp="norm_2",
        mid="norm_2",
        mlp="ffn",
        mlp_added="ffn.down_proj",
        qkv="packed",
        qkv_modules=("Wqkv",),
        attention="operators",
    ),
    replace(LLAMA, name="glm", model_types=("glm",), mlp_up="gate_up_proj", mlp_gate=""),
    replace(LLAMA, name="starcoder2", model_types=("starcoder2",), mlp_proj="c_proj", mlp_up="c_fc", mlp_gate=""),
    replace(LLAMA, name="nanochat", model_types=("nanochat",), mlp_proj="fc2", mlp_up="fc1", mlp_gate=""),
    replace(
        LLAMA,
        name="hyperclovax",
        model_types=("hyperclovax",),
        attn_added="post_norm1",
        mlp_added="post_norm2",
        residual_scale="residual_multiplier",
    ),
    replace(LLAMA, name="nemotron", model_types=("nemotron",), mlp_gate=""),
    replace(
        LLAMA,
        name="stablelm",
        model_types=("stablelm",),
        norm_mlp="post_attention_layernorm|input_layernorm",
        parallel=("use_parallel_residual",),
    ),
    replace(
        LLAMA,
        name="gemma2",
        model_types=("gemma2", "gemma3_text", "vaultgemma"),
        attn_added="post_attention_layernorm",
        mlp_added="post_feedforward_layernorm",
        norm_mlp="pre_feedforward_layernorm",
        mid="pre_feedforward_layernorm",
    ),
    replace(
        LLAMA,
        name="olmo2",
        model_types=("olmo2", "olmo3", "exaone4", "flex_olmo"),
        attn_added="post_attention_layernorm",
        mlp_added="post_feedforward_layernorm",
        norm_attn="",
        norm_mlp="",
        mid="mlp",
    ),
    replace(
        LLAMA,
        name="cohere",
        model_types=("cohere", "cohere2", "cohere2_moe"),
        parallel=True,
        norm_mlp="input_layernorm",
    ),
    replace(
        LLAMA,
        name="phi",
        model_types=("phi",),
        parallel=True,
        final_norm="model.final_layernorm",
        attn_proj="dense",
        norm_mlp="input_layernorm",
        mlp_proj="fc2",
        mlp_up="fc1",
        mlp_gate="",
    ),
    OPT,
    replace(OPT, name="biogpt", model_types=("biogpt",), layers="biogpt.layers", final_norm="biogpt.layer_norm"),
    LFM2,
    replace(
        LFM2,
        name="lfm2_moe",
        model_types=("lfm2_moe",),
        router="feed_forward.gate",
        experts="feed_forward.experts",
    ),
    BAMBA,
    replace(BAMBA, name="jamba", model_types=("jamba",), router="feed_forward.router", experts="feed_forward.experts"),
    replace(  # attention stands beside a state space in every layer: what is added is the sum, and heads are a part of it
        BAMBA,
        name="falcon_h1",
        model_types=("falcon_h1",),
        attn="",
        mixers=(),
        beside=(("mamba", "ssm_out_multiplier"), ("self_attn", "attention_out_multiplier")),
    ),
    replace(  # one block a layer: a state space, attention, an MLP or experts, each the layer's mixer
        LLAMA,
        name="nemotron_h",
        model_types=("nemotron_h",),
        final_norm="model.norm_f",
        attn="mixer",
        mixers=("mixer",),
        norm_attn="norm",
        norm_mlp="",
        mid="",
        mlp="",
        mlp_gate="",
        router="",
        experts="",
    ),
    replace(
        LLAMA,
        name="mamba",
        model_types=("mamba2", "mamba", "falcon_mamba"),
        layers="backbone.layers",
        final_norm="backbone.norm_f",
        mixers=("mixer",),
        norm_attn="norm",
        norm_mlp="",
        mid="",
        mlp="",
        mlp_gate="",
    ),
    replace(
        GPT,
        name="gpt2",
        model_types=("gpt2", "gpt_bigcode"),
        attn_proj="c_proj",
        mlp_proj="c_proj",
        mlp_up="c_fc",
        qkv="packed",
        qkv_modules=("c_attn",),
    ),
    replace(
        GPT,
        name="gpt_neo",
        model_types=("gpt_neo",),
        attn="attn.attention",
        attn_proj="out_proj",
        mlp_proj="c_proj",
        mlp_up="c_fc",
        attention="operators",
    ),
    replace(
        GPT,
        name="gptj",
        model_types=("gptj",),
        attn_proj="out_proj",
        mlp_proj="fc_out",
        mlp_up="fc_in",
        norm_mlp="ln_1",
        parallel=True,
        attention="operators",
    ),
    replace(
        GPT,
        name="bloom",
        model_types=("bloom",),
        attn="self_attention",
        norm_attn="input_layernorm",
        norm_mlp="post_attention_layernorm",
        mid="post_attention_layernorm",
        attn_added="self_attention.dense",
        mlp_added="mlp.dense_4h_to_h",
        attention="operators",
        **_NEOX,
    ),
    replace(
        GPT,
        name="falcon",
        model_types=("falcon",),
        attn="self_attention",
        norm_attn="ln_attn|input_layernorm",
        norm_mlp="ln_mlp|post_attention_layernorm|input_layernorm",
        mid="post_attention_layernorm",
        parallel=("parallel_attn", "new_decoder_architecture"),
        attention="operators",
        overwrites=True,
        **(_NEOX | dict(qkv="falcon")),
    ),
    replace(
        GPT,
        name="gpt_neox",
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attn="attention",
        norm_attn="input_layernorm",
        norm_mlp="post_attention_layernorm",
        mid="post_attention_layernorm",
        parallel=("use_parallel_residual",),
        **_NEOX,
    ),
    replace(  # gates behind blocks (`blocks/gate.py`): what they add is no sum of heads or neurons
        LLAMA,
        name="gated",
        model_types=(),
        mixers=("gated_attn",),
        mid="gated_mlp",
        mlp="gated_mlp",
        opaque=True,
        **_NONE,
    ),
    replace(
        LLAMA, name="mixed", model_types=(), mixers=("self_attn",), sparse=True
    ),  # mixers without heads, layers without MLP
)
