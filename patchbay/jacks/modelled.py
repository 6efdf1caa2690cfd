"""What the rooms below a Model know of it. `Model` is the one thing that is like this; nothing else needs to be told so."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.signal.port import Port


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
