"""What the rooms below a Model know of it. `Model` is the one thing that is like this; nothing else needs to be told so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.signal.port import Port


class Dictionary(Protocol):
    """Features of a signal: z = encode(x), and x is decode(z, x) plus an error. `reads` and `writes` name signals, which are the same but
    for transcoders: read in `sites`, layers in order of which `layer` is the last; written in `layer`, and by `onward` in `later` ones."""

    layer: int
    reads: str
    writes: str
    W_dec: Tensor  # [feature, d]
    later: tuple[int, ...]
    onward: Tensor | None  # [later, feature, d]

    @property
    def sites(self) -> tuple[int, ...]: ...

    @property
    def n_features(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def encode(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., feature], in float32 or more."""
        ...

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """[..., feature] -> [..., d] of what is written; `x` is what was read, for those that pass some of it on."""
        ...

    def factor(self, x: Tensor) -> Tensor | None:
        """By what a token's decoded features are multiplied, [..., 1], for those that normalise each token; None: by nothing."""
        ...


class Modelled(Protocol):
    """A Hugging Face causal LM whose layers, widths and ports are known."""

    hf: Any
    source: str
    family: Any
    modules: list[Any]
    around: list[Any]  # the model and what in it holds the layers, outermost first
    final_norm_module: Any
    residual_scale: float
    scaling: Any  # the config whose scale and soft cap of logits the model's head applies; None: it applies none
    check: Any  # what the self-check found
    _heads: dict[int, tuple[int, int, int]]
    dictionaries: Mapping[tuple[int, str], Dictionary]  # that are attached, by layer and home

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def longest_prompt(self) -> int | None: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def fingerprint(self) -> str: ...

    def _need_tokenizer(self) -> Any: ...

    def token_id(self, text: str) -> int: ...

    def roles_of(self, ids: Sequence[int], length: int | None = None) -> tuple[str | None, ...]: ...

    def n_heads(self, layer: int) -> int: ...

    def n_groups(self, layer: int) -> int: ...

    def d_head(self, layer: int) -> int: ...

    def n_neurons(self, layer: int) -> int: ...

    def n_experts(self, layer: int) -> int: ...

    def W_O(self, layer: int) -> Tensor: ...

    def signals(self, layer: int) -> tuple[str, ...]: ...

    def require(self, port: Port | str) -> None: ...

    def port(self, text: str) -> Port: ...

    def unembed_logits(self, normed: Tensor) -> Tensor: ...

    def active_edits(self, edits: Sequence[Edit] = ()) -> list[Edit]: ...

    def session(
        self, taps: Sequence[Port] = (), edits: Sequence[Edit] = (), **options: Any
    ) -> AbstractContextManager[Any]: ...
