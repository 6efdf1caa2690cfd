"""A plain torch module as a model: `pb.load(module, family=pb.Family(...), vocab=...)`. See docs/any-module.md.

The module takes token ids [prompt, position] and gives logits [prompt, position, vocab], alone or first in what it returns. It is
wrapped and never changed; what a Hugging Face model says of itself (the table of its tokens, its head, widths, the number of heads)
is found here, or refused with what to say. All else is as for any model: the family row says where parts are, the self-check proves it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from patchbay.errors import PatchbayError
from patchbay.model.families import Family
from patchbay.model.placing import follow

HEADS = (
    "n_heads",
    "n_head",
    "num_heads",
    "num_attention_heads",
    "heads",
)  # what attention modules call their number of heads

Vocab = int | tuple[str, str]


class PlainModel(nn.Module):
    """A module with what Patchbay asks of a model; attributes that it lacks are the module's own, so that paths start there."""

    def __init__(self, module: nn.Module, family: Family, vocab: Vocab) -> None:
        super().__init__()
        self.module = module
        tokens, head = _ends(module, vocab)
        self.ends = (tokens, head)
        owner: Any = module.get_submodule(tokens)
        layers = follow(module, family.layers) or []
        counts = [
            int(n)
            for layer in layers
            for key in HEADS
            if isinstance(n := getattr(follow(layer, family.attn), key, None), int)
        ]
        self.config = PretrainedConfig(
            hidden_size=owner.embedding_dim, vocab_size=owner.num_embeddings, num_attention_heads=max(counts, default=1)
        )
        self.config.model_type = "plain module"
        self.config.max_position_embeddings = _positions(module, family, owner)
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def get_input_embeddings(self) -> nn.Module:
        return self.module.get_submodule(self.ends[0])

    def get_output_embeddings(self) -> nn.Module:
        return self.module.get_submodule(self.ends[1])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> CausalLMOutput:
        """Logits of ids; `options` such as a cache mean nothing to a plain module, which sees its whole prompt each time."""
        if attention_mask is not None and not bool(torch.as_tensor(attention_mask).all()):
            raise PatchbayError("a plain module is given no attention mask: pad on the right, as pb.run does by itself")
        try:
            found = self.module(input_ids)
        except IndexError as error:
            raise PatchbayError(
                f"{type(self.module).__name__} raises IndexError at {input_ids.shape[1]} positions: {error}; a prompt that is longer than "
                "its table of positions, or an embedding that is not the one of tokens"
            ) from error
        for key in ("logits", 0):
            if not isinstance(found, Tensor):
                found = getattr(found, str(key), None) if hasattr(found, str(key)) else _item(found, key)
        if not isinstance(found, Tensor) or found.shape[:2] != input_ids.shape or found.ndim != 3:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise PatchbayError(
                f"{type(self.module).__name__} called with ids {list(input_ids.shape)} gives {shape}; logits [prompt, position, vocab] "
                "are needed, alone or first of what it returns"
            )
        return CausalLMOutput(logits=found)

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: a plain module says nothing of caches and end tokens."""
        raise PatchbayError(
            f"{type(self.module).__name__} is a plain module, which has no generate: take the last logits of pb.run(model, ids), append a "
            "token, and run again"
        )


def _positions(module: nn.Module, family: Family, tokens: nn.Module) -> int | None:
    """Rows of the table of positions: the largest other embedding of the stream's width outside the layers; None without one."""
    inside = {id(one) for layer in follow(module, family.layers) or () for one in layer.modules()}
    tables = [
        one for one in module.modules() if isinstance(one, nn.Embedding) and one is not tokens and id(one) not in inside
    ]
    return max((one.num_embeddings for one in tables if one.embedding_dim == tokens.embedding_dim), default=None)


def _item(found: Any, key: Any) -> Any:
    try:
        return found[key]
    except (TypeError, KeyError, IndexError):
        return found


def _ends(module: nn.Module, vocab: Vocab) -> tuple[str, str]:
    """Paths of the token embedding and of the head."""
    if isinstance(vocab, tuple):
        tokens, head = vocab
        for path, kind in ((tokens, nn.Embedding), (head, nn.Module)):
            if not isinstance(follow(module, path), kind):
                raise PatchbayError(f"vocab={vocab}: {type(module).__name__} has no {kind.__name__} at {path!r}")
        return tokens, head
    tables = [
        name for name, one in module.named_modules() if isinstance(one, nn.Embedding) and one.num_embeddings == vocab
    ]
    heads = [name for name, one in module.named_modules() if isinstance(one, nn.Linear) and one.out_features == vocab]
    for found, what in ((tables, f"nn.Embedding({vocab}, ...)"), (heads, f"nn.Linear(..., {vocab})")):
        if len(found) != 1:
            raise PatchbayError(
                f"vocab={vocab}: {type(module).__name__} has {len(found)} {what}{': ' if found else ''}{', '.join(found)}; one is needed. Say "
                "which, vocab=('path.of.embedding', 'path.of.head'); a head that is no module of its own (a product with the embedding's "
                "weight) has to become one"
            )
    return tables[0], heads[0]
