"""Biases that an architecture can have and a model has not: a switch of its config, such as Llama's `attention_bias` or `mlp_bias`.

A vector that is added to what a module writes is its bias. Where the module has none, each switch of the config that speaks of a bias
is turned on a model without numbers (on the meta device), and the one that gives this module a bias, and changes nothing else than to
add biases, is turned on the copy: the biases that come with it are 0, which is what having none means.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from patchbay.model.placing import text_config


def give_bias(hf: Any, module: str) -> str | None:
    """Turn on the switch that gives `module` a bias, with all biases that come with it at 0; its name, or None without one."""
    for key, switched in _switched(hf):
        new = _biases(hf, switched)
        if new is None or f"{module}.bias" not in new:
            continue
        for name, size in new.items():
            owner = hf.get_submodule(name.rpartition(".")[0])
            owner.bias = nn.Parameter(torch.zeros(size, dtype=owner.weight.dtype, device=owner.weight.device), False)
        config = text_config(hf)
        setattr(config, key, not getattr(config, key))
        return key
    return None


def _switched(hf: Any) -> Iterator[tuple[str, Any]]:
    """Each switch that speaks of a bias, and the config with that one turned."""
    for key, value in vars(text_config(hf)).items():
        if "bias" in key and isinstance(value, bool):
            config = copy.deepcopy(hf.config)
            inner = config if text_config(hf) is hf.config else config.get_text_config(decoder=True)
            setattr(inner, key, not value)
            yield key, config


def _biases(hf: Any, config: Any) -> dict[str, torch.Size] | None:
    """Name and size of the biases that a model of this config has and `hf` has not; None where it differs in anything else."""
    try:
        with torch.device("meta"):
            other = type(hf)(config)
    except Exception:  # a switch that this class cannot be built with
        return None
    there = {name: weight.shape for name, weight in hf.named_parameters(remove_duplicate=False)}
    found = {name: weight.shape for name, weight in other.named_parameters(remove_duplicate=False)}
    new = {name: size for name, size in found.items() if name not in there}
    same = all(found.get(name) == size for name, size in there.items())
    linear = all(isinstance(other.get_submodule(name.rpartition(".")[0]), nn.Linear) for name in new)
    return new if same and linear and all(name.endswith(".bias") for name in new) else None
