"""Host: a model that takes blocks, and what was asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from patchbay.errors import PatchbayError
from patchbay.model.families import Family
from patchbay.model.placing import follow


@dataclass
class Asked:
    """What was installed: whether attention goes through `dispatch`, and the blocks that need their text whole."""

    dispatched: bool = False
    plain: list[int] = field(default_factory=list)  # layers that attend by the family's softmax beside others
    mixes: bool = False  # whether tokens are mixed by what asks no mask
    whole: list[str] = field(default_factory=list)
    meta: int | None = None  # the meta-token, whose places attention is told
    ids: list[str] = field(default_factory=list)  # blocks that read the text's ids
    drawn: bool = False  # a table of embeddings for each text in training

    def need_whole(self, block: str) -> None:
        """Note a block that needs its text whole."""
        if block not in self.whole:
            self.whole.append(block)


@dataclass(frozen=True)
class Host:
    """A model that takes blocks: its row and its layers."""

    hf: Any
    family: Family
    layers: Any
    kept: bool  # whether its weights are those of a model that was given

    def attention(self, layer: int) -> Any:
        found = follow(self.layers[layer], self.family.attn)
        if found is None:
            raise PatchbayError(
                f"layer {layer} of this {self.hf.config.model_type.removeprefix('blocks_')} has no attention to put blocks into (a hybrid, or a family of states)"
            )
        return found

    def refuse(self, block: str, why: str) -> PatchbayError:
        return PatchbayError(
            f"{block} cannot be put into {self.hf.config.model_type.removeprefix('blocks_')}, which {why}"
        )


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
