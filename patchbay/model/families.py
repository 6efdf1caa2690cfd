"""One row per model family: where embedding, layers, attention, MLP, experts, norms and unembedding live.

What varies between architectures is a row of `FAMILIES`, not a branch elsewhere. The row that
names a model's `config.model_type` is tried first, then every row all of whose paths exist. Either way nothing is believed
until the self-check of `model.py` has proved the identities on the model itself. An architecture that fits no row can be
described by hand: `pb.load(model, family=Family(...))`.

Paths are dotted attribute paths; those of a layer start at the decoder layer. An empty path means the layer has no such part;
of alternatives, written "a|b", the first that exists is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import nn

from patchbay.signal.port import PatchbayError


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
    overwrites: bool = False  # the layer adds in place into what attention or MLP returned: captures must be copies

    def is_parallel(self, config: Any) -> bool:
        if isinstance(self.parallel, bool):
            return self.parallel
        return any(getattr(config, flag, False) for flag in self.parallel)


_PLAIN: tuple[str, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma",
    "seed_oss",
    "ministral",
    "arcee",
    "helium",
    "cwm",
)
_PLAIN += ("olmo", "ernie4_5", "hunyuan_v1_dense", "jais2", "ministral3", "flint")
LLAMA = Family("llama", _PLAIN)
_MOE: tuple[str, ...] = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "hy_v3",
    "mellum",
)
_MOE += ("minimax_m2", "solar_open")
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
NESTED = (
    "model.language_model",
    "language_model.model",
    "model.text_model",
)  # where models of several kinds keep their text model
_LATENT = ("q_a_proj", "q_a_layernorm", "q_b_proj|q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
_NEOX: dict[str, Any] = dict(qkv="interleaved", qkv_modules=("query_key_value",), attn_proj="dense")
_NEOX |= dict(mlp_proj="dense_4h_to_h", mlp_up="dense_h_to_4h")

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, name="moe", model_types=_MOE),
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
        model_types=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        mixers=("linear_attn",),
        qkv="gated",
    ),
    replace(
        LLAMA,
        name="granite",
        model_types=("granite",),
        residual_scale="residual_multiplier",
    ),
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
        model_types=("granitemoe",),
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
        LLAMA,
        name="xglm",
        model_types=("xglm",),
        final_norm="model.layer_norm",
        attn_proj="out_proj",
        norm_attn="self_attn_layer_norm",
        norm_mlp="final_layer_norm",
        mid="final_layer_norm",
        mlp="fc1",
        mlp_proj="^fc2",
        mlp_up="^fc1",
        mlp_gate="",
        mlp_added="fc2",
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
    replace(
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
    ),
    replace(
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
    ),
    replace(
        LLAMA,
        name="bamba",
        model_types=("bamba",),
        final_norm="model.final_layernorm",
        mixers=("mamba",),
        mlp="feed_forward",
        norm_mlp="pre_ff_layernorm",
        mid="pre_ff_layernorm",
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
)


@dataclass(frozen=True, eq=False)
class LayerModules:
    """The modules of one decoder layer, resolved. None where the layer has no such part."""

    layer: nn.Module
    attn: nn.Module | None  # attention with heads
    attn_proj: nn.Module | None
    attn_added: nn.Module | None  # its output is what enters the stream (attention, or a hybrid's mixer)
    norm_attn: nn.Module | None
    mid: nn.Module | None  # its input is the stream between attention and MLP; None in parallel blocks
    mlp: nn.Module | None
    mlp_proj: nn.Module | None
    mlp_up: nn.Module | None
    mlp_gate: nn.Module | None
    mlp_added: nn.Module | None
    norm_mlp: nn.Module | None
    router: nn.Module | None
    experts: nn.Module | None


def text_config(hf: nn.Module) -> Any:
    """The config of the text model: its own part where several models are nested in one, as vision-language models do."""
    config: Any = hf.config
    read = getattr(config, "get_text_config", None)
    return config if read is None else read(decoder=True)


def follow(root: Any, path: str) -> Any | None:
    """The object at a dotted path, or None where a step is missing or the path is empty."""
    if "|" in path:
        return next((found for one in path.split("|") if (found := follow(root, one)) is not None), None)
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
        if root is None:
            return None
    return root if path else None


def layer_modules(family: Family, layer: nn.Module, config: Any) -> LayerModules:
    """Resolve the row's paths on one decoder layer."""
    attn, mlp = follow(layer, family.attn), follow(layer, family.mlp)
    mixer = next((m for m in (follow(layer, path) for path in family.mixers) if m is not None), None)

    def inside(owner: nn.Module | None, path: str) -> Any | None:  # "^name" starts at the layer
        return follow(layer, path[1:]) if path.startswith("^") else follow(owner, path)

    router, experts = follow(layer, family.router), follow(layer, family.experts)
    experts = experts if isinstance(experts, nn.Module) and any(p.ndim == 3 for p in experts.parameters()) else None
    return LayerModules(
        layer=layer,
        attn=attn,
        attn_proj=inside(attn, family.attn_proj),
        attn_added=(follow(layer, family.attn_added) if attn is not None else None)
        or (follow(layer, family.attn) if attn is not None else mixer),
        norm_attn=follow(layer, family.norm_attn),
        mid=None if family.is_parallel(config) else follow(layer, family.mid),
        mlp=mlp,
        mlp_proj=inside(mlp, family.mlp_proj),
        mlp_up=inside(mlp, family.mlp_up),
        mlp_gate=inside(mlp, family.mlp_gate),
        mlp_added=follow(layer, family.mlp_added) or mlp,
        norm_mlp=follow(layer, family.norm_mlp),
        router=router if experts is not None else None,
        experts=experts,
    )


def missing(family: Family, hf: nn.Module) -> list[str]:
    """The row's paths that this model lacks: empty when the row fits."""
    lacking = [path for path in (family.layers, family.final_norm) if follow(hf, path) is None]
    layers = follow(hf, family.layers)
    if layers is None or not len(layers):
        return lacking or [family.layers]
    for i, layer in enumerate(layers):
        found = layer_modules(family, layer, text_config(hf))
        if found.attn_added is None:
            lacking.append(f"{family.layers}.{i}.{family.attn}" + "".join(f" or .{m}" for m in family.mixers))
        elif found.attn is not None and found.attn_proj is None:
            lacking.append(f"{family.layers}.{i}.{family.attn}.{family.attn_proj}")
        if family.mlp and found.mlp is None:
            lacking.append(f"{family.layers}.{i}.{family.mlp}")
        elif found.mlp is not None and found.mlp_proj is None and found.experts is None and not family.opaque:
            lacking.append(f"{family.layers}.{i}.{family.mlp}.{family.mlp_proj}")
    return lacking


def _nested(family: Family, hf: nn.Module) -> list[Family]:
    """The row, and where a text model stands inside another model, the row with its paths there."""
    inside = next((path for path in NESTED if follow(hf, path) is not None), None)
    if inside is None or not family.layers.startswith("model."):
        return [family]
    layers, norm = (inside + path.removeprefix("model") for path in (family.layers, family.final_norm))
    return [replace(family, layers=layers, final_norm=norm)]


def _unplaced(family: Family, hf: nn.Module) -> int:
    """How many norms, streams and routers the row names that this model's layers lack: the fewer, the nearer."""
    count = 0
    for layer in follow(hf, family.layers) or ():
        found = layer_modules(family, layer, text_config(hf))
        count += bool(family.norm_attn) and found.norm_attn is None
        count += bool(family.norm_mlp) and found.norm_mlp is None
        count += bool(family.mid) and found.mid is None and not family.is_parallel(text_config(hf))
        count += found.experts is not None and found.router is None
    return count


def _fitting(hf: nn.Module, *some: Sequence[Family]) -> Iterator[Family]:
    """Of each list the rows that fit, the nearest first; a list is looked at only when those before it are used up."""
    for rows in some:
        fitting = [family for family in rows if not missing(family, hf)]
        yield from sorted(fitting, key=lambda family: _unplaced(family, hf)) if len(fitting) > 1 else fitting


def candidates(hf: nn.Module, rows: Sequence[Family] = FAMILIES) -> Iterator[Family]:
    """Rows whose paths this model has, that of its type first, then the nearest. Refuses with what was found."""
    model_type = getattr(text_config(hf), "model_type", "")
    rows = [family for row in rows for family in _nested(row, hf)]
    named = [family for family in rows if model_type in family.model_types]
    others = [family for family in rows if family not in named]
    fitting = _fitting(hf, named, others)
    if (best := next(fitting, None)) is not None:
        return chain([best], fitting)
    nearest = min(named or rows, key=lambda family: len(missing(family, hf)))
    children = ", ".join(name for name, _ in hf.named_children())
    raise PatchbayError(
        f"{type(hf).__name__} (model type {model_type!r}) fits no known family. Nearest row is {nearest.name!r}, which also "
        f"needs {', '.join(missing(nearest, hf)[:4])}; the model has children {children}. "
        "Describe it: pb.load(model, family=patchbay.Family('name', layers='path.to.layers', final_norm='path', attn='name', "
        "attn_proj='name', mlp='name', mlp_proj='name', norm_attn='name', norm_mlp='name', mid='name'))"
    )
