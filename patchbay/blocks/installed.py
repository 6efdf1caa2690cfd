"""Installed: blocks put into the modules of a model whose family is known, layer by layer.

Where attention, MLP and their maps lie is the row of `families.py` of the model's type. What a family cannot hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchbay.blocks import kinds
from patchbay.blocks.convolved import Convolved
from patchbay.errors import PatchbayError
from patchbay.model.families import FAMILIES, Family
from patchbay.model.linear import width_out
from patchbay.model.placing import follow
from patchbay.signal.port import suggest


@dataclass
class Asked:
    """What was installed: whether attention goes through `dispatch`, and the blocks that need their text whole."""

    dispatched: bool = False
    whole: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Host:
    """A model that takes blocks: its row and its layers."""

    hf: Any
    family: Family
    layers: Any
    kept: bool  # whether its weights are those of a model that was given

    def attention(self, layer: int) -> Any:
        found = follow(self.layers[layer], self.family.attn)
        assert found is not None
        return found

    def refuse(self, block: str, why: str) -> PatchbayError:
        return PatchbayError(
            f"{block} cannot be put into {self.hf.config.model_type.removeprefix('blocks_')}, which {why}"
        )


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
    return asked


def by_layer(host: Host, block: str, value: Any) -> list[dict[str, Any]]:
    """One table of settings for each layer, of a name, a table, or a list of these."""
    values = value if isinstance(value, list | tuple) else [value] * len(host.layers)
    if len(values) != len(host.layers):
        raise PatchbayError(f"{block}: {len(values)} given for {len(host.layers)} layers")
    made = []
    for one in values:
        table = {"kind": one} if isinstance(one, str) else dict(one) if isinstance(one, dict) else None
        if table is None or "kind" not in table:
            raise PatchbayError(f"{block} takes a name, a table with a kind, or a list of these by layer; got {one!r}")
        made.append(table)
    return made


def _attention(host: Host, value: Any, asked: Asked) -> None:
    for i, given in enumerate(by_layer(host, "attention", value)):
        kind = given["kind"]
        if kind == "softmax":
            continue
        if kind not in kinds.KINDS:
            names = ["softmax", *kinds.KINDS]
            raise PatchbayError(f"no attention {kind!r}; kinds are {', '.join(names)}" + suggest(str(kind), names))
        if extra := set(given) - {"kind", *(["bias"] if "sigmoid" in kind else [])}:
            raise PatchbayError(
                f"attention {kind!r} has no {', '.join(sorted(extra))}; only the sigmoids have bias=, a number added to every score"
            )
        if host.family.attention != "interface":
            raise host.refuse(
                "attention",
                "computes its attention itself, where no function can stand; possible: llama, mistral, qwen2, gpt2",
            )
        module = host.attention(i)
        module.attention_kind = kind
        if "sigmoid" in kind:
            module.sigmoid_bias = float(given.get("bias", 0.0))
        groups, width = _heads(host, module)
        for name in ("null_key", "null_value")[: {"k_bias": 1, "kv_bias": 2}.get(kind, 0)]:
            module.register_parameter(name, nn.Parameter(0.02 * torch.randn(groups, width)))
        if kind == "kv_bias":
            module.beside_pattern = "value"
        asked.dispatched = True


def _heads(host: Host, module: Any) -> tuple[int, int]:
    """Groups of keys and their width."""
    config = host.hf.config.get_text_config()
    width = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads), int(width)


def _convolution(host: Host, value: Any, asked: Asked) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise PatchbayError(f"convolution={value!r}: the width, 2 tokens or more (1 is a scale)")
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
    asked.whole.append("convolution")


BLOCKS: dict[str, Callable[[Host, Any, Asked], None]] = {"attention": _attention, "convolution": _convolution}
"""A block's name -> what puts it into a model, in the order in which they are put."""
