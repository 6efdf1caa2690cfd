"""Attention to a few chunks of a long text: what each query head chooses, and what it reads there.

Queries and keys come as they are before any turn by position. R[t] is the turn of position t, and R[s] R[t]^T = R[s - t].

    chunk key      softmax(m K^T / sqrt d) K,  K the chunk's keys turned inside it (positions 0 to w - 1), m the mean over the chunk of
                   its own attention output, in which all its tokens see one another
    chosen         chunk 0, the query's own and the one before it; of the others those of the largest q . chunk key, n in all
    read           the chosen chunks side by side in their order, at positions 0, 1, 2, ..., the query's own chunk last

A query that has n chunks or fewer up to itself reads them all, at its own positions: ordinary attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 1 << 23  # numbers of gathered keys that are held at a time


@dataclass
class Chunks:
    """Chunks of `window` tokens, `n` of them for a query; `rotation` of each layer [position, d_head, d_head], None where nothing turns.

    `chosen`: of the last query that ran, by layer, the chunks of each head [row, head, n], -1 where there were fewer."""

    window: int
    n: int
    rotation: Mapping[int, Tensor | None]
    chosen: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)  # of every position so far [row, head, position, d]
    summaries: dict[int, Tensor] = field(default_factory=dict)  # a key of each whole chunk [row, head, chunk, d]

    def take(self, rows: Tensor) -> None:
        """The rows become copies of these."""
        for held in (self.chosen, self.queries, self.summaries):
            for layer, value in held.items():
                held[layer] = value[rows.to(value.device)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention output [row, query, head, d]. `query` [row, head, query, d], the last positions of `key` and `value` [row, group,
        key, d]; what came before in a cache was told in earlier calls."""
        n_heads, total = query.shape[1], key.shape[2]
        key, value = (one.repeat_interleave(n_heads // one.shape[1], 1) for one in (key, value))
        first = total - query.shape[2]
        self.queries[layer] = torch.cat([self.queries[layer], query], 2) if first else query
        inside = self._turned(layer, key, torch.arange(total, device=key.device) % self.window)  # [row, head, key, d]
        self._summarise(layer, inside, value, scale, fresh=not first)
        width = key.shape[0] * n_heads * self.window * self.n * key.shape[3]
        step = max(1, min(self.window, BLOCK // max(1, width)))
        pieces, at = [], first
        while at < total:
            until = min(total, (at // self.window + 1) * self.window, at + step)  # queries of one chunk
            some = query[:, :, at - first : until - first]
            chosen = self._choose(some, self.summaries[layer], at // self.window)  # [row, head, query, n]
            pieces.append(self._read(layer, some, inside, value, chosen, at, scale))
            at = until
        self.chosen[layer] = chosen[:, :, -1]
        return torch.cat(pieces, 2).transpose(1, 2)

    def _turned(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., position, d] turned by these positions."""
        rotation = self.rotation[layer]
        if rotation is None:
            return x
        return torch.einsum("...ti,tij->...tj", x, rotation.to(x)[positions])

    def _summarise(self, layer: int, inside: Tensor, value: Tensor, scale: float, *, fresh: bool) -> None:
        """Keys of the chunks that are whole by now."""
        kept = inside[:, :, :0] if fresh else self.summaries[layer]
        places = torch.arange(self.window, device=inside.device)
        made = [kept]
        for chunk in range(kept.shape[2], inside.shape[2] // self.window):
            here = slice(chunk * self.window, (chunk + 1) * self.window)
            q, k = self._turned(layer, self.queries[layer][:, :, here], places), inside[:, :, here]
            mean = ((q @ k.mT * scale).softmax(-1) @ value[:, :, here]).mean(2, keepdim=True)
            made.append((mean @ k.mT * scale).softmax(-1) @ k)  # [row, head, 1, d]
        self.summaries[layer] = torch.cat(made, 2)

    def _choose(self, query: Tensor, summaries: Tensor, own: int) -> Tensor:
        """The chunks of queries that stand in chunk `own` [row, head, query, n], in their order, -1 behind them where there are fewer."""
        shape = (*query.shape[:3], self.n)
        if own < self.n:
            chosen = torch.full(shape, -1, device=query.device)
            chosen[..., : own + 1] = torch.arange(own + 1, device=query.device)
            return chosen
        scores = query @ summaries[:, :, 1 : own - 1].mT  # [row, head, query, chunk]
        best = scores.topk(self.n - 3, -1).indices.sort(-1).values + 1
        forced = torch.tensor([0, own - 1, own], device=query.device).expand(*shape[:3], 3)
        return torch.cat([forced[..., :1], best, forced[..., 1:]], -1)

    def _read(
        self, layer: int, query: Tensor, inside: Tensor, value: Tensor, chosen: Tensor, at: int, scale: float
    ) -> Tensor:
        """Attention of queries [row, head, query, d], the first at position `at`, to their chunks."""
        window, places = self.window, torch.arange(query.shape[2], device=query.device) + at
        count = int((chosen[0, 0, 0] >= 0).sum())
        offsets = torch.arange(window, device=query.device)
        keys = chosen.clamp(min=0)[..., None] * window + offsets  # [row, head, query, n, window]
        hidden = (chosen < 0)[..., None] | (keys > places[:, None, None])
        flat = keys.clamp(max=inside.shape[2] - 1).flatten(2)[..., None].expand(-1, -1, -1, inside.shape[3])
        shape = (*keys.shape, inside.shape[3])
        near = inside.gather(2, flat).view(shape)  # [row, head, query, n, window, d]
        ranks = torch.arange(self.n, device=query.device)
        turned = torch.stack(
            [
                self._turned(layer, query, ((count - 1 - int(rank)) * window + places % window).clamp(min=0))
                for rank in ranks
            ],
            3,
        )  # [row, head, query, n, d]: each chunk's distance is in the query's turn
        scores = (near @ turned[..., None])[..., 0] * scale  # [row, head, query, n, window]
        pattern = scores.masked_fill(hidden, float("-inf")).flatten(3).softmax(-1)
        return (pattern[..., None, :] @ value.gather(2, flat).view(*shape).flatten(3, 4))[..., 0, :]
