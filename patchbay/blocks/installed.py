"""Installed: blocks put into the modules of a model whose family is known, layer by layer.

Where attention, MLP and their maps lie is the row of `families.py` of the model's type. What a family cannot hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from patchbay.blocks import abs_topk, kinds, lexinvariant, monet, ngram, structured, welore
from patchbay.blocks.convolved import Convolved, check_width
from patchbay.blocks.gate import BIAS, GatedLayer
from patchbay.blocks.gla import GatedLinearAttention
from patchbay.blocks.host import Asked, Host, by_layer
from patchbay.blocks.meta_tokens import MetaLayer
from patchbay.blocks.state_space import H3, LSSL
from patchbay.blocks.turned import Turned, TurnedKeys
from patchbay.errors import PatchbayError
from patchbay.model.families import FAMILIES
from patchbay.model.linear import width_out
from patchbay.model.placing import follow
from patchbay.signal.port import suggest


def install(hf: Any, base_type: str, blocks: dict[str, Any], *, kept: bool) -> Asked:
    """Put the blocks into the model, in place."""
    family = next((row for row in FAMILIES if base_type in row.model_types), None)
    layers = None if family is None else follow(hf, family.layers)
    if family is None or layers is None:
        hosts = sorted({one for row in FAMILIES for one in row.model_types})
        raise PatchbayError(
            f"blocks go into families that are known by type, not {base_type!r}; known are {', '.join(hosts)}"
        )
    host, asked = Host(hf, family, layers, kept), Asked()
    for name, put in BLOCKS.items():
        if name in blocks:
            put(host, blocks[name], asked)
    found = (follow(layer, family.attn) for layer in layers) if asked.dispatched else ()
    asked.plain = [i for i, one in enumerate(found) if one is not None and not _own_kind(one)]
    return asked


def _own_kind(attention: nn.Module) -> bool:
    return hasattr(attention, "attention_kind") or isinstance(attention, H3 | LSSL)


def _attention(host: Host, value: Any, asked: Asked) -> None:
    for i, given in enumerate(by_layer(host, "attention", value)):
        kind, names = given["kind"], ["softmax", *kinds.KINDS]
        if kind not in names:
            raise PatchbayError(f"no attention {kind!r}; kinds are {', '.join(names)}" + suggest(str(kind), names))
        if extra := set(given) - {"kind", *(["bias"] if "sigmoid" in kind else [])}:
            raise PatchbayError(
                f"attention {kind!r} has no {', '.join(sorted(extra))}; only the sigmoids have bias=, a number added to every score"
            )
        if kind == "softmax":
            continue
        if host.family.attention != "interface":
            raise host.refuse(
                "attention",
                "computes its attention itself, where no function can stand; possible: llama, mistral, qwen2, gpt2",
            )
        module = host.attention(i)
        if hasattr(module, "attention_kind"):
            raise PatchbayError(
                f"attention {kind!r} and a mixer are both asked for layer {i}: give a list by layer with 'softmax' there"
            )
        module.attention_kind = kind
        if "sigmoid" in kind:
            module.sigmoid_bias = kinds.finite(given.get("bias", 0.0), f"attention {kind!r}: bias")
        for name in ("null_key", "null_value")[: {"k_bias": 1, "kv_bias": 2}.get(kind, 0)]:
            groups, width = _heads(host, module)
            module.register_parameter(name, nn.Parameter(0.02 * torch.randn(groups, width)))
        if kind == "kv_bias":
            module.beside_pattern = "value"
        asked.dispatched = True


def _heads(host: Host, module: Any) -> tuple[int, int]:
    """Groups of keys and their width, of the maps as they are: configs carry fields that a family does not read."""
    config, names = host.hf.config.get_text_config(), host.family.qkv_modules
    if host.family.qkv == "latent":
        raise host.refuse("a learned key", "makes keys of a latent; possible: softmax1, or llama, mistral, qwen2, gpt2")
    n = int(config.num_attention_heads)
    d = next((one for name in ("head_dim", "head_size") if (one := getattr(module, name, None))), None)
    d = int(d or config.hidden_size // n)
    if len(names) == 1:  # queries, keys and values in one map
        return (width_out(follow(module, names[0])) // d - n) // 2, d
    return width_out(follow(module, names[1])) // d, d


def _convolution(host: Host, value: Any, asked: Asked) -> None:
    check_width(value, getattr(host.hf.config.get_text_config(), "max_position_embeddings", None))
    if host.family.qkv == "latent":
        raise host.refuse(
            "convolution",
            "makes keys and values of a latent that is normed on the way; possible: llama, mistral, qwen2, gpt2",
        )
    for i in range(len(host.layers)):
        attn = host.attention(i)
        for name in host.family.qkv_modules:
            inner = follow(attn, name)
            if inner is None or "." in name or "|" in name:
                raise host.refuse("convolution", f"has no {name} in {type(attn).__name__}")
            module = Convolved(inner, width_out(inner), value)
            if host.kept:
                module.silence()
            setattr(attn, name, module)
    asked.need_whole("convolution")


def _mixer(host: Host, value: Any, asked: Asked) -> None:
    for i, given in enumerate(by_layer(host, "mixer", value)):
        options = {name: setting for name, setting in given.items() if name != "kind"}
        if given["kind"] == "attention" and not options:
            continue
        if given["kind"] not in ("attention", *MIXERS):
            raise PatchbayError(
                f"no mixer {given['kind']!r}; mixers are attention, {', '.join(MIXERS)}"
                + suggest(str(given["kind"]), list(MIXERS))
            )
        if options and (given["kind"] != "gla" or set(options) != {"decay"} or not isinstance(options["decay"], bool)):
            raise PatchbayError(
                f"mixer {given}: only gla takes more than its kind, which is decay, True or False (linear attention)"
            )
        if (
            host.family.qkv != "separate"
            or host.family.attention != "interface"
            or host.family.mixers
            or host.family.attn_added
        ):
            raise host.refuse(
                "mixer",
                "does not keep queries, keys and values in three maps of one attention; possible: llama, mistral, qwen2, opt",
            )
        MIXERS[given["kind"]](host, i, asked, **options)


def _gla(host: Host, i: int, asked: Asked, *, decay: bool = True) -> None:
    config = host.hf.config.get_text_config()
    if config.hidden_size % config.num_attention_heads:
        raise host.refuse("mixer", "has a width here that its heads do not share alike")
    names = (*host.family.qkv_modules, host.family.attn_proj)
    made = GatedLinearAttention(host.hf.config, i, config.num_attention_heads, names, decay=decay)
    setattr(host.layers[i], host.family.attn, made)
    asked.dispatched = asked.mixes = True
    asked.need_whole("gla")


def _state_space(made: type[H3] | type[LSSL], host: Host, i: int, asked: Asked) -> None:
    if host.family.name not in ("llama", "moe"):
        raise host.refuse("mixer", "names its layers' parts in another way than llama, mistral, qwen2, mixtral")
    asked.mixes = True
    host.layers[i].self_attn = made(host.hf.config.get_text_config())
    asked.need_whole(made.__name__.lower())


def _meta_tokens(host: Host, value: Any, asked: Asked) -> None:
    given = dict(value) if isinstance(value, dict) else {}
    token, layers, masked = given.pop("id", None), given.pop("layers", None), given.pop("masked", True)
    if (
        given
        or not isinstance(token, int)
        or not isinstance(layers, list | tuple)
        or not all(isinstance(i, int) and 0 <= i < len(host.layers) for i in layers)
    ):
        raise PatchbayError(
            f"meta_tokens={value!r}: a table of the token's id, the layers (of 0 to {len(host.layers) - 1}) that become meta layers, and masked, True or False"
        )
    if host.hf.config.model_type.removeprefix("blocks_") not in ("llama", "mistral"):
        raise host.refuse(
            "meta_tokens", "builds its layers in another way than norm, attention, sum; possible: llama, mistral"
        )
    if not 0 <= token < host.hf.config.vocab_size:
        raise PatchbayError(f"meta token {token}: ids are 0 to {host.hf.config.vocab_size - 1}")
    for i in layers:
        host.layers[i] = MetaLayer(host.layers[i])
        if masked:
            host.layers[i].self_attn.attention_kind = "meta"
    if masked:
        asked.meta, asked.dispatched = token, True
        asked.need_whole("meta_tokens")


def _lexinvariant(host: Host, value: Any, asked: Asked) -> None:
    config = host.hf.config
    if value is not True or not config.tie_word_embeddings or host.hf.get_output_embeddings() is None:
        raise PatchbayError(
            f"lexinvariant={value!r}: True, on a config with tie_word_embeddings=True, since the table that embeds is the one that reads"
        )
    if not host.kept and not host.hf.get_input_embeddings().weight.is_meta:
        lexinvariant.freeze(host.hf)
    host.hf.get_input_embeddings().weight.requires_grad_(False)
    asked.drawn = True


def _turned(host: Host, value: Any, asked: Asked) -> None:
    config = host.hf.config
    bend = value.get("bend") if isinstance(value, dict) and set(value) == {"bend"} else value
    if not isinstance(bend, bool):
        raise PatchbayError(f'turned={value!r}: True, or {{"bend": False}} for phases b alone, D being 1 for good')
    if config.model_type.removeprefix("blocks_") not in ("llama", "mistral", "qwen2"):
        raise host.refuse(
            "turned",
            "does not turn the first half of a head's channels with the second, right behind the maps; possible: llama, mistral, qwen2",
        )
    if config.num_key_value_heads != config.num_attention_heads:
        raise host.refuse(
            "turned",
            "shares keys among heads in this config, while every head turns its own: num_key_value_heads=num_attention_heads",
        )
    for i in range(len(host.layers)):
        attn = host.attention(i)
        attn.q_proj = Turned(attn.q_proj, config.num_attention_heads, _heads(host, attn)[1], bend=bend)
        attn.k_proj = TurnedKeys(attn.k_proj, attn.q_proj)


def _feedforward(host: Host, value: Any, asked: Asked) -> None:
    std = float(getattr(host.hf.config.get_text_config(), "initializer_range", 0.02) or 0.02)
    for i, given in enumerate(by_layer(host, "feedforward", value)):
        sizes = {key: size for key, size in given.items() if key != "kind"}
        if given["kind"] == "dense":
            if sizes:
                raise PatchbayError(f"feedforward 'dense' has no {', '.join(sorted(sizes))}: it is the family's own")
            continue
        mlp = follow(host.layers[i], host.family.mlp)
        names = [name for name in (host.family.mlp_gate, host.family.mlp_up, host.family.mlp_proj) if name]
        if any("^" in name or not isinstance(follow(mlp, name), nn.Linear) for name in names):
            raise host.refuse(
                "feedforward",
                f"has no linear layers {', '.join(names)} in its MLP; possible: llama, mistral, qwen2, gpt_neox",
            )
        for name in names:
            made = structured.of(getattr(mlp, name), given["kind"], **sizes)
            made.reset(std)
            setattr(mlp, name, made)


def _ranks(host: Host, value: Any, asked: Asked) -> None:
    maps = dict(welore.matrices(host.hf))
    if not isinstance(value, dict) or (unknown := [name for name in value if name not in maps]):
        some = list(maps)[:4]
        raise PatchbayError(
            f"ranks takes a table of matrices and their ranks, as blocks.welore.ranks(model, keep) makes it; matrices are {', '.join(some)}, ..."
            + (f" and not {unknown[0]!r}" if isinstance(value, dict) else "")
        )
    for name, rank in value.items():
        linear = maps[name]
        if not isinstance(rank, int) or not 0 < rank <= min(linear.weight.shape):
            raise PatchbayError(f"rank {rank!r} of {name}: from 1 to {min(linear.weight.shape)}")
        left, right = (None, None) if linear.weight.is_meta else welore.factors(linear.weight, rank)
        if not welore.pays(tuple(linear.weight.shape), rank):
            if left is not None and right is not None:
                linear.weight.data.copy_(left @ right)
            continue
        made = structured.LowRank(linear.in_features, linear.out_features, rank, bias=linear.bias is not None)
        if left is not None and right is not None:
            made.V.data.copy_(left)
            made.U.data.copy_(right)
            if linear.bias is not None and made.bias is not None:
                made.bias.data.copy_(linear.bias)
        owner, _, last = name.rpartition(".")
        setattr(host.hf.get_submodule(owner), last, made)


def _gate(host: Host, value: Any, asked: Asked) -> None:
    bias = BIAS if value is True else value
    if not isinstance(bias, int | float):
        raise PatchbayError(f"gate={value!r}: True, or the number that keeps the gates shut at the start ({BIAS:g})")
    if host.hf.config.model_type.removeprefix("blocks_") not in ("llama", "mistral"):
        raise host.refuse(
            "gate", "builds its layers in another way than norm, block, sum, twice; possible: llama, mistral"
        )
    for i, layer in enumerate(host.layers):
        host.layers[i] = GatedLayer(layer, host.hf.config.hidden_size, kinds.finite(bias, "gate"))


def _abs_topk(host: Host, value: Any, asked: Asked) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PatchbayError(f"abs_topk={value!r}: how many neurons may write at a token, 1 or more")
    for i, layer in enumerate(host.layers):
        mlp = follow(layer, host.family.mlp)
        name = next((one for one in ACTIVATIONS if callable(getattr(mlp, one, None))), None)
        proj = None if mlp is None or host.family.mlp_proj is None else follow(mlp, host.family.mlp_proj)
        if name is None or proj is None or not isinstance(getattr(proj, "weight", None), torch.Tensor):
            raise host.refuse(
                "abs_topk",
                f"has no activation function of its own in the MLP of layer {i}; possible: llama, mistral, qwen2, gpt2",
            )
        width = proj.weight.numel() // width_out(proj)
        if value > width:
            raise PatchbayError(f"abs_topk={value}: layer {i} has {width} neurons")
        setattr(mlp, name, abs_topk.AbsTopK(getattr(mlp, name), value))


ACTIVATIONS = ("act_fn", "act", "activation_fn")
MIXERS: dict[str, Callable[..., None]] = {
    "gla": _gla,
    "h3": partial(_state_space, H3),
    "lssl": partial(_state_space, LSSL),
}


def _monet(host: Host, value: Any, asked: Asked) -> None:
    if not isinstance(value, dict):
        raise PatchbayError(f"monet={value!r}: a table of experts, heads, keep, width, form; {{}} takes the defaults")
    d = int(host.hf.config.get_text_config().hidden_size)
    for i, one in enumerate(host.layers):
        if "." in host.family.mlp or not isinstance(getattr(one, host.family.mlp, None), nn.Module):
            raise host.refuse("monet", f"has no one module for the MLP of layer {i}")
        setattr(one, host.family.mlp, monet.layer(d, value))


def _ngram(host: Host, value: Any, asked: Asked) -> None:
    orders = list(value) if isinstance(value, list | tuple) else [value]
    if not orders or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in orders):
        raise PatchbayError(
            f"ngram={value!r}: how many last tokens must have come before, 1 or more, or a list of these for several layers"
        )
    table = host.hf.get_input_embeddings()
    if type(table) is not nn.Embedding or table.weight.shape[1] != host.hf.config.get_text_config().hidden_size:
        raise host.refuse(
            "ngram",
            f"embeds by {type(table).__name__}, not by one plain table as wide as the stream; possible: llama, mistral, qwen2, gpt2",
        )
    host.hf.set_input_embeddings(ngram.Embedding(table, orders))
    asked.ids.append("ngram")
    asked.need_whole("ngram")


BLOCKS: dict[str, Callable[[Host, Any, Asked], None]] = {
    "meta_tokens": _meta_tokens,
    "mixer": _mixer,
    "attention": _attention,
    "turned": _turned,
    "convolution": _convolution,
    "monet": _monet,
    "feedforward": _feedforward,
    "abs_topk": _abs_topk,
    "ranks": _ranks,
    "gate": _gate,
    "lexinvariant": _lexinvariant,
    "ngram": _ngram,
}
"""A block's name -> what puts it into a model, in the order in which they are put."""
