"""A store of states and the tokens that followed them, and the nearest states to a query: exactly, in cells, or by FAISS.

A store is a trace in a folder (`pb.run(model, texts, taps=["L4.mlp.in"], folder=...)`): written shard by shard, taken up again after it
was killed, and marked with what it was made of. The key of a position is the tapped signal, its value the next token of the text. A store
of another model or under other edits is refused: its keys lie in another space.

Distances are squared and are computed anew for the neighbours that a search found, in double precision, whoever found them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._cells import apart as distances
from patchbay.decode._cells import cells
from patchbay.decode._spoken import spoken
from patchbay.edits.edit import Edit
from patchbay.files import record_of
from patchbay.model.caches import within_rounding
from patchbay.model.filling import edits_digest
from patchbay.model.kept import RECORD, KeptTrace, checked, load_trace
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port

TRAINED = 2**18  # keys of which FAISS learns its cells and components, evenly over the store
CACHED = (
    2**16
)  # numbers of keys whose distances are taken at a time: in a processor's cache, a third of the time of all at once
BLOCK = 512  # queries that are compared with all keys at a time
AT_ONCE = 2**16  # keys that are moved at a time
SITES = ("mlp.in", "resid_in", "resid_mid", "resid_out", "attn.out", "mlp.out", "final_norm")
Search = Callable[[Tensor, int], Tensor]  # queries [query, d], k -> places in the store [query, k]


class Store:
    """Keys [N, d] and values [N] of one port; `texts` are the ids that they came from, `places` [N, 2] the text and position of each."""

    def __init__(self, keys: Tensor, values: Tensor, port: Port, texts: list[list[int]], places: Tensor) -> None:
        self.keys, self.values, self.port, self.texts, self.places = keys, values, port, texts, places
        self._searches: dict[str, Search] = {}

    def __len__(self) -> int:
        return len(self.values)

    def nearest(self, queries: Tensor, k: int, index: str = "exact") -> tuple[Tensor, Tensor]:
        """Squared distances [query, k] and places [query, k] of the k nearest keys; -1 and infinite where a search found fewer."""
        if index not in self._searches:
            self._searches[index] = search_of(self.keys, index)
        queries = queries.to(self.keys)
        found = self._searches[index](queries, k)
        apart = torch.empty(found.shape, dtype=torch.float64, device=self.keys.device)
        few = max(1, CACHED // self.keys.shape[1])
        for row, query in enumerate(queries.double()):
            for at in range(0, k, few):
                gap = self.keys[found[row, at : at + few].clamp(min=0)].double()
                gap -= query
                apart[row, at : at + few] = gap.square_().sum(-1)
        return apart.masked_fill(found < 0, torch.inf), found

    def law(self, apart: Tensor, found: Tensor, temperature: float, vocab: int) -> Tensor:
        """The law of the next token that the neighbours give, [query, vocab]: softmax of -distance / temperature, summed by value."""
        weights = weights_of(apart, temperature)
        law = torch.zeros(len(found), vocab, dtype=torch.float64, device=weights.device)
        return law.scatter_add_(1, self.values[found.clamp(min=0)], weights)

    def context(self, place: int, n: int = 8) -> tuple[list[int], int]:
        """The last tokens before a key's value, its own token last, and the value."""
        text, at = self.places[place].tolist()
        return self.texts[text][max(0, at + 1 - n) : at + 1], int(self.values[place])


def weights_of(apart: Tensor, temperature: float) -> Tensor:
    """softmax of -distance / temperature [query, k]; the nearest alone where the temperature is next to nothing."""
    return ((apart.amin(-1, keepdim=True) - apart) / temperature).softmax(-1)


def read_store(given: Any, model: Model, edits: list[Edit], port: Port | str | None = None) -> Store:
    """The store of a folder, for this model under these edits; of its ports the only one, or the one asked."""
    trace = given if isinstance(given, KeptTrace) else load_trace(given) if isinstance(given, str | Path) else None
    if trace is None:
        raise PatchbayError(
            f"store: a folder that pb.run(model, texts, taps=[...], folder=...) wrote, got {type(given).__name__}"
        )
    request = checked(record_of(trace.folder, RECORD, "a trace"), trace.folder)["request"]
    for name, own in (("model", model.fingerprint), ("edits", edits_digest(edits))):
        if request[name] != own:
            raise PatchbayError(
                f"store: {trace.folder} was made with {'another model' if name == 'model' else 'other edits'}, whose keys lie in another space; "
                "make it again with this model under the edits that are in force"
            )
    ports = [one for one in trace.ports if one.signal in SITES and one.index is None]
    if port is None and len(ports) != 1:
        raise PatchbayError(
            f"store: keys are one signal of the width of the stream ({', '.join(SITES)}), and {trace.folder} has {', '.join(map(str, trace.ports))}"
        )
    held = stored(trace, ports[0] if port is None else trace.port(port))
    if not any(edit.by_row for edit in edits):
        _refuse_other_states(held, model, trace.folder)
    return held


def _refuse_other_states(store: Store, model: Model, folder: Path) -> None:
    """Raise PatchbayError unless the model gives the first text the states that the store has: the same weights may be another model's."""
    text, at = store.places[0, 0], store.places[:, 0] == store.places[0, 0]
    seen = run(model, [store.texts[int(text)]], taps=[store.port])[store.port][0].float().cpu()
    if not within_rounding(model, store.keys[at], seen[store.places[at, 1]]):
        raise PatchbayError(
            f"store: {folder} holds other states at {store.port} for its first text than this model gives now; make it again with this model"
        )


def stored(trace: KeptTrace, port: Port) -> Store:
    """Every position of a trace that has a next token."""
    prompt, position = trace.places()
    follows = position + 1 < trace.lengths[prompt]
    if not bool(follows.any()):
        raise PatchbayError(f"store: {trace.folder} holds no token that another follows")
    keys = torch.cat(list(trace.shards(port)))[follows].float()
    places = torch.stack([prompt, position], 1)[follows]
    values = trace.ids[places[:, 0], places[:, 1] + 1].long()
    texts = [row[:n] for row, n in zip(trace.ids.tolist(), trace.lengths.tolist(), strict=True)]
    return Store(keys, values, port, texts, places)


# --- searches ---------------------------------------------------------------------------------------------


def search_of(keys: Tensor, index: str) -> Search:
    """ "exact"; "cells(n, probes)", keys of the `probes` nearest of n cells; "faiss" or "faiss('IVF64,Flat', probes)", any index of FAISS."""
    name, values, options = spoken(index, "index")
    if name == "exact" and not values and not options:
        return _Exact(keys)
    if name == "cells" and len(values) == 2 and not options and all(isinstance(one, int) and one > 0 for one in values):
        if not values[1] <= values[0] <= len(keys):
            raise PatchbayError(
                f"index={index!r}: at most {len(keys)} cells, one for a key, and as many probes as cells"
            )
        return _Cells(keys, *values)
    if (
        name == "faiss"
        and not options
        and len(values) in (0, 1, 2)
        and all(isinstance(*pair) for pair in zip(values, (str, int), strict=False))
    ):
        return _faiss(keys, *values)
    raise PatchbayError(f"index={index!r}: 'exact', 'cells(64, 8)', 'faiss' or \"faiss('IVF64,Flat', 8)\"")


class _Exact:
    """All keys, compared by |key - c|^2 - 2 (query - c) key, c their mean: what all states have in common, which in some models is a thousand
    times what tells them apart, would else be squared and eat the digits."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.centre = keys, keys.mean(0)
        self.own = torch.cat([(block - self.centre).square().sum(1) for block in keys.split(AT_ONCE)])  # [N]

    def __call__(self, queries: Tensor, k: int, among: Tensor | None = None) -> Tensor:
        """Places of the k nearest keys [query, k]; with `among`, places in those."""
        keys, own = (self.keys, self.own) if among is None else (self.keys[among], self.own[among])
        blocks = (queries - self.centre).split(BLOCK)
        return torch.cat([(own - 2 * block @ keys.T).topk(k, largest=False).indices for block in blocks])


class _Cells:
    """Keys in cells by k-means, of which a query looks into the nearest few."""

    def __init__(self, keys: Tensor, n: int, probes: int) -> None:
        self.exact, self.probes = _Exact(keys), probes
        cell, self.centres = cells(keys, n, torch.Generator().manual_seed(0))
        self.members = [(cell == at).nonzero()[:, 0] for at in range(n)]

    def __call__(self, queries: Tensor, k: int) -> Tensor:
        looked = distances(queries, self.centres).topk(self.probes, largest=False).indices.tolist()
        found = torch.full((len(queries), k), -1, device=queries.device)
        for row, near in enumerate(looked):
            some = torch.cat([self.members[at] for at in near])
            best = self.exact(queries[row : row + 1], min(k, len(some)), some)[0]
            found[row, : len(best)] = some[best]
        return found


def _faiss(keys: Tensor, factory: str = "Flat", probes: int | None = None) -> Search:
    try:
        import faiss
    except ImportError as error:
        raise PatchbayError(
            "index='faiss' needs FAISS: pip install 'patchbay-lm[knn]', or index='exact' and 'cells(n, probes)', which need nothing"
        ) from error
    try:
        index = faiss.index_factory(keys.shape[1], factory)
        held, centre = keys.cpu(), keys.cpu().mean(0)  # what all keys have in common would eat the digits
        index.train((held[:: max(1, len(held) // TRAINED)] - centre).contiguous().numpy())
        for block in held.split(AT_ONCE):
            index.add((block - centre).contiguous().numpy())
    except RuntimeError as error:
        raise PatchbayError(
            f"index: FAISS refuses {factory!r} for {len(keys)} keys: {str(error).splitlines()[0]}"
        ) from error
    if probes is not None:
        inner = faiss.try_extract_index_ivf(index)  # behind what turns the keys first
        if inner is None or probes < 1:
            raise PatchbayError(f"index: an index {factory!r} of FAISS has no probes, or {probes} are too few")
        inner.nprobe = probes
    return lambda queries, k: torch.from_numpy(index.search((queries.cpu() - centre).numpy(), k)[1]).to(queries.device)
