"""Contexts: where in given texts a part is excited most, the token marked, and a sample by quarters. Texts are read as they come, memory is bounded.

By part, one number at each token: a neuron's activation; an expert's routing weight; a component's coefficient, that of the head's,
MLP's or expert's output along the direction that the component writes; of heads, attention, MLPs and streams the length (2-norm) of what
they write. A port is its number, or the length of its vector. Longer texts are read in pieces, each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from patchbay.features.contexts import Seen
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.channel import Channel
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.wiring.components import components

PIECE = 256  # tokens of a text that are read at a time
SAMPLED, QUANTILES, EACH = 200, 4, 2  # contexts beside the highest: a fair sample, told by its quarters
OPEN, CLOSE = "\u00ab", "\u00bb"


@dataclass(frozen=True)
class Gauge:
    """What is measured of a part: a port, and the number of its signal [prompt, position, ...] at each position."""

    port: Port
    what: str
    number: Callable[[Tensor], Tensor]


def gauge(model: Model, what: Part | Channel | Port) -> Gauge:
    """How excited a part is at a token. Raises PatchbayError for what has no number there."""
    if isinstance(what, Channel):
        return _coefficient(model, what)
    port = what if isinstance(what, Port) else _main(what)
    model.require(port)
    if port.axes[:2] != ("prompt", "position") or len(port.axes) > 3 or port.signal == "router.experts":
        raise PatchbayError(
            f"{port} has axes {', '.join(port.axes)}: contexts need one number or one vector at each token; name a head, neuron or expert"
        )
    if len(port.axes) == 2:
        return Gauge(
            port,
            {"mlp.act": "activation", "router.weights": "routing weight"}.get(port.signal, port.signal),
            lambda x: x,
        )
    return Gauge(port, f"length of {port}", lambda x: x.norm(dim=-1))


def _main(part: Part) -> Port:
    signal = {"head": "out", "expert": "weight", "layer": "resid_out"}.get(part.kind)
    if part.kind in ("router", "unembed", "group"):
        raise PatchbayError(
            f"{part}: contexts are those of a head, neuron, expert, MLP, attention, stream or component; name one"
        )
    return part.port(signal)


def _coefficient(model: Model, channel: Channel) -> Gauge:
    """How much of a component a part writes: along its direction, which is of length 1."""
    if not isinstance(channel.component, int) or channel.writer.kind not in ("head", "mlp", "expert"):
        raise PatchbayError(
            f"{channel.source} writes the same at every token, or is no component: contexts are those of L1.H2.C0 and its like"
        )
    direction = components(model, channel.writer).v[channel.component].float()
    return Gauge(channel.writer.port("out"), f"coefficient of {channel.source}", lambda x: x @ direction.to(x))


class Contexts:
    """What was seen of one number at each token: the highest contexts, each once, a sample of the others, and counts over all tokens."""

    def __init__(self, n: int, what: str) -> None:
        self.what, self.n_texts, self.seen = what, 0, Seen(1, n, SAMPLED)

    @property
    def highest(self) -> list[dict[str, Any]]:
        return self.seen.kept[0].highest

    @property
    def n_tokens(self) -> int:
        return self.seen.n_tokens

    def add(self, ids: Sequence[Sequence[int]], numbers: Tensor, texts: Sequence[tuple[int, int]]) -> None:
        """A batch's numbers [prompt, position], NaN at padding; `texts` says of each prompt its text and where in it it begins."""
        self.seen.add(ids, numbers[..., None], texts)

    def told(self, model: Model) -> dict[str, Any]:
        """As plain data, the token between marks in its context."""
        seen = self.seen
        return {
            "measure": self.what,
            "texts": self.n_texts,
            "tokens": self.n_tokens,
            "mean": float(seen.total[0]) / self.n_tokens if self.n_tokens else float("nan"),
            "lowest": float(seen.lowest[0]),
            "density": seen.density(0),
            "histogram": seen.histogram(0),
            "rows": [_row(model, held) for held in self.highest],
            "quantiles": [
                {**part, "contexts": [_row(model, held) for held in part["contexts"]]}
                for part in seen.quantiles(0, QUANTILES, EACH)
            ],
        }


def _row(model: Model, held: dict[str, Any]) -> dict[str, Any]:
    at = held["at"]
    return {
        "value": held["value"],
        "token": _text(model, held["span"][at : at + 1]),
        "context": marked(model, held["span"], at),
        "text": held["text"],
        "position": held["position"],
        "values": held["values"],
    }


@torch.no_grad()
def contexts(model: Model, what: Part | Channel | Port, texts: Any, n: int, batch_size: int = 16) -> dict[str, Any]:
    """The `n` tokens of the texts (any iterable of texts or token ids, or a Task) that excite a part most, each context once."""
    if n < 1 or batch_size < 1:
        raise PatchbayError(f"n={n}, batch_size={batch_size}: one or more")
    asked = gauge(model, what)
    seen = Contexts(n, asked.what)
    pieces = _pieces(model, texts, seen, batch_size)
    while batch := list(islice(pieces, batch_size)):
        ids = [piece for piece, _, _ in batch]
        signal = run(model, ids, taps=[asked.port], logits="last")[asked.port]
        seen.add(ids, asked.number(signal.float()).cpu(), [(text, start) for _, text, start in batch])
    if not seen.n_tokens:
        raise PatchbayError("no texts were given: contexts are looked for in some")
    return seen.told(model)


def _pieces(model: Model, texts: Any, seen: Contexts, size: int) -> Iterator[tuple[list[int], int, int]]:
    """Token ids of pieces of texts, with the number of the text and where the piece begins in it."""
    single = isinstance(texts, str) or hasattr(texts, "clean") or hasattr(texts, "tolist")
    items: Iterable[Any] = model.encode(texts) if single else texts
    width = min(PIECE, model.longest_prompt or PIECE)
    several = iter(items)
    while some := list(islice(several, size)):
        for ids in _encoded(model, some):
            for start in range(0, len(ids), width):
                yield ids[start : start + width], seen.n_texts, start
            seen.n_texts += 1


def _encoded(model: Model, some: list[Any]) -> list[list[int]]:
    """Texts of any length as ids: the model reads them in pieces, so none is too long."""
    if all(isinstance(one, str) for one in some):
        from patchbay.model.tokens import tokenize

        return [list(ids) for ids in tokenize(model._need_tokenizer(), [one for one in some if one.strip()])]
    return model.encode(some)


def _text(model: Model, ids: Sequence[int]) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, ids))
    return model.decode(list(ids)) if ids else ""


def marked(model: Model, span: Sequence[int], at: int) -> str:
    """The tokens of a context as text, the one at `at` between marks."""
    before, token, after = (_text(model, some) for some in (span[:at], span[at : at + 1], span[at + 1 :]))
    space = " " if model.tokenizer is None else ""
    space, token = (" ", token[1:]) if token.startswith(" ") else (space if before else "", token)
    return f"{before}{space}{OPEN}{token}{CLOSE}{' ' if after and model.tokenizer is None else ''}{after}"
