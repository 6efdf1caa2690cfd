"""Texts that begin alike as one row of a model: a tree, in which a token stands once for all texts that begin so.

A token's position is its depth, and the attention mask shows it what it follows and nothing else. That is right only for models whose tokens
meet in attention alone and that take such a mask as it is: it is believed for texts of a length where a run of random ones of
that length has the logits of whole runs, in float32 or better. What is proved is kept on the model.

Miao et al. 2024, "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification" (tree attention).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchbay.jacks.session import Session
from patchbay.model.caches import within_rounding
from patchbay.model.model import Model

WIDTH = 256  # nodes of a tree: attention over more of them costs more than it saves


class Tree(NamedTuple):
    """Of each node its token, the node before it (-1: none) and its depth."""

    ids: list[int]
    parents: list[int]
    depths: list[int]

    def add(self, before: int, ids: Sequence[int]) -> list[int]:
        """The nodes of new tokens after the node `before`, which is -1 at a beginning."""
        start = len(self.ids)
        depth = 0 if before < 0 else self.depths[before] + 1
        self.ids.extend(ids)
        self.parents.extend([before, *range(start, start + len(ids) - 1)][: len(ids)])
        self.depths.extend(range(depth, depth + len(ids)))
        return list(range(start, start + len(ids)))


def packs(model: Model, length: int) -> bool:
    """Whether texts of at most `length` tokens may run as trees; a short run at the next power of two decides, once."""
    size, known = proving_length(model, length), model.__dict__.setdefault("_packs", {})
    if size not in known:
        longer = any(right for n, right in known.items() if n > size)
        known[size] = longer or _proved(model, size)
    return bool(known[size])


def proved(model: Model, length: int) -> bool:
    """Whether it is known already for texts of this length."""
    return proving_length(model, length) in model.__dict__.get("_packs", {})


def proving_length(model: Model, length: int) -> int:
    """The length of the texts by which texts of this length are proved."""
    size = max(8, 1 << (length - 1).bit_length())
    return size if model.longest_prompt is None else max(length, min(size, model.longest_prompt))


@torch.no_grad()
def _proved(model: Model, length: int) -> bool:
    """A tree of random texts, of which two share their first half, and others up to its width, has the logits of whole runs."""
    asks = inspect.signature(model.hf.forward).parameters
    if model.dtype not in (torch.float32, torch.float64) or "position_ids" not in asks or model.regime(length):
        return False
    draw = torch.Generator().manual_seed(3)
    n = 2 + max(1, (WIDTH - 2 * length + length // 2) // length)
    rows = torch.randint(model.vocab_size, (n, length), generator=draw)
    rows[1, : length // 2] = rows[0, : length // 2]
    tree = Tree([], [], [])
    places: list[list[int]] = []
    for at, row in enumerate(rows.tolist()):
        shared = places[0][: length // 2] if at == 1 else []
        places.append(shared + tree.add(shared[-1] if shared else -1, row[len(shared) :]))
    few = rows[[0, 1, -1]].to(model.device)
    with Session(model, whole=True):
        whole = model.hf(few, attention_mask=torch.ones_like(few), use_cache=False).logits.double()
        try:
            seen = tree_logits(model, [tree])[0].double()
        except Exception:  # whatever a model raises that takes no mask of this kind: its texts run one in a row
            return False
    return within_rounding(model, torch.stack([seen[places[at]] for at in (0, 1, -1)]), whole)


def tree_logits(model: Model, trees: Sequence[Tree], keep: Tensor | None = None) -> Tensor:
    """Logits [tree, node, vocab] under the edits of the session that is on; of the nodes `keep` alone, where given."""
    width = max(len(tree.ids) for tree in trees)
    ids, depths = (torch.zeros(len(trees), width, dtype=torch.long) for _ in range(2))
    sees = np.tile(np.eye(width, dtype=bool), (len(trees), 1, 1))  # [tree, node, node]
    for row, tree in enumerate(trees):
        ids[row, : len(tree.ids)], depths[row, : len(tree.ids)] = torch.tensor(tree.ids), torch.tensor(tree.depths)
        for node, before in enumerate(tree.parents):
            if before >= 0:
                sees[row, node, : before + 1] = sees[row, before, : before + 1]
    hidden = torch.from_numpy(~sees)[:, None].to(model.device)
    mask = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device)
    mask = mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
    few = keep is not None and "logits_to_keep" in inspect.signature(model.hf.forward).parameters
    logits: Tensor = model.hf(
        input_ids=ids.to(model.device),
        attention_mask=mask,
        position_ids=depths.to(model.device),
        use_cache=False,
        **({"logits_to_keep": keep} if few else {}),
    ).logits
    return logits if few or keep is None else logits[:, keep]
