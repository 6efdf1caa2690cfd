"""Block: a knob that cuts attention from one group of tokens to another.

    scores[query, key] <- -inf before the softmax, for every query of one group and key of the other

so that cut weights are exactly 0 and what is left of each row adds up to 1. A query is never cut from its own position
(but where keys are named by their token). On or off: any strength but 0 is on. Blocks in several layers at once cut the
direct edges there; what a token told a third one still flows, unless the keys are cut from "all". It works under a family's
own masks, windows, soft caps and sinks. Making the knob runs nothing.

Zhang, Yadav, Han and Shutova 2025, "Cross-modal Information Flow in Multimodal Large Language Models", after Geva et al. 2023.
`prove.attention_knockout` measures in which layers an edge matters, against random keys; this is the switch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.signal.port import Part, PatchbayError, Port, suggest
from patchbay.signal.positions import Positions, Token
from patchbay.tasks.task import Task
from patchbay.turn._places import Place, places

Pair = tuple[Positions, Positions]  # queries, keys


@method(paper="zhang2025")
def block(
    model: Model,
    keys: Place,
    *,
    queries: Place = "all",
    parts: list[Part] | None = None,
    of: Task | None = None,
    name: str | None = None,
) -> Knob:
    """A knob that cuts attention from `queries` to `keys`: in every layer, or in the layers and heads of `parts`.

    `keys`, `queries`: as in 0, [1, 2], "2:5", "last", "generated", "all" (queries), "token: the"; or marks of the task
    `of`, and the knob is then for that task's prompts. `parts`: as "L2,L3" (layers) or "L2.H1".

    `of`: the task whose marks `keys` and `queries` name.
    """
    ports = _ports(model, parts)
    if of is not None and any(isinstance(one, str) and one in of.marks for one in (keys, queries)):
        pairs = _marked(of, keys, queries)
    else:
        _known(of, keys, queries)
        pairs = _apart(places(queries), places(keys), keys)
    edits = [edit.block(port, query=query, key=key) for port in ports for query, key in pairs]
    where = "every layer" if parts is None else "+".join(map(str, parts[:4])) + (", ..." if len(parts) > 4 else "")
    return Knob(name or f"block {queries} -> {keys} in {where}", edits, 1.0)


def _ports(model: Model, parts: list[Part] | None) -> list[Port]:
    """The patterns to cut: of the named heads and layers, or of every layer that has one."""
    has = [layer for layer in range(model.n_layers) if "attn.pattern" in model.signals(layer)]
    if parts is None:
        if not has:
            model.require(Port("attn.pattern", 0))  # raises, and says what the family lacks
        return [Port("attn.pattern", layer) for layer in has]
    ports = []
    for part in dict.fromkeys(parts):
        if part.kind not in ("layer", "attn", "head"):
            raise PatchbayError(
                f"{part} has no attention of its own: parts are layers (L2), attention (L2.attn) or heads"
            )
        ports.append(Port("attn.pattern", part.layer, part.index if part.kind == "head" else None))
        model.require(ports[-1])
    if not ports:
        raise PatchbayError("no parts to cut attention in were given")
    return ports


def _known(task: Task | None, *written: Place) -> None:
    """Say which marks there are where a name is no form of a place."""
    for one in written:
        try:
            places(one)
        except PatchbayError as error:
            marks = list(task.marks) if task is not None else []
            there = f"; marks of task {task.name} are {', '.join(marks) or 'none'}" if task is not None else ""
            raise PatchbayError(f"{error}{there}{suggest(str(one), marks)}") from error


def _apart(queries: Positions, keys: Positions, written: Place) -> list[Pair]:
    """(queries, keys) of the blocks that make the cut and leave every query its own position."""
    if keys is None or keys in ("last", "generated"):
        raise PatchbayError(f"keys {written!r}: which keys to cut is said by positions, a slice, a token or a mark")
    if isinstance(keys, Token):
        return [(queries, keys)]
    listed = _listed(keys)
    if listed is None:
        raise PatchbayError(f"keys {written!r}: a slice of keys needs both ends, counted from the same side, as in 2:5")
    if isinstance(queries, int | tuple) or queries == "last":
        queries = -1 if isinstance(queries, str) else queries
        asked = _listed(queries) or ()
        pairs: list[Pair] = [(tuple(at for at in asked if at not in listed), listed)]
        pairs += [((own,), tuple(key for key in listed if key < own)) for own in asked if own in listed]
        return [(query, key) for query, key in pairs if query and key]
    if isinstance(queries, slice) or queries is None:
        return _from_slice(queries or slice(None), sorted(listed))
    return [(queries, listed)]


def _from_slice(queries: slice, keys: list[int]) -> list[Pair]:
    """Blocks for an open or closed slice of queries: those after the last key, and each one among the keys."""
    if keys[0] < 0 or (queries.start or 0) < 0 or (queries.stop or 0) < 0:
        raise PatchbayError(
            f"keys {keys} and queries {queries.start}:{queries.stop}: a slice of queries needs both counted from the start; "
            'name queries one by one, or "last" or "generated"'
        )
    start, stop = queries.start or 0, queries.stop
    after: Pair = (slice(max(start, keys[-1] + 1), stop), tuple(keys))
    pairs = [after] if stop is None or stop > keys[-1] + 1 else []
    for own in range(max(start, keys[0] + 1), keys[-1] + 1 if stop is None else min(stop, keys[-1] + 1)):
        pairs.append(((own,), tuple(key for key in keys if key < own)))
    if not pairs:
        raise PatchbayError(f"queries {start}:{stop} see none of the keys {keys}: nothing to cut")
    return pairs


def _listed(positions: Positions) -> tuple[int, ...] | None:
    """Positions one by one; None where they cannot be listed."""
    if isinstance(positions, int):
        return (positions,)
    if isinstance(positions, tuple):
        return tuple(sorted(positions))
    if isinstance(positions, slice) and positions.stop is not None:
        start = positions.start or 0
        if (start < 0) == (positions.stop < 0) and positions.stop > start:
            return tuple(range(start, positions.stop))
    return None


def _marked(task: Task, keys: Place, queries: Place) -> list[Pair]:
    """Blocks for the marks of a task's prompts: masks [prompt, position], or positions where all prompts are alike."""
    key, query = (_spans(task, one) for one in (keys, queries))
    layers = [[tuple(at for at in q if at not in k) for q, k in zip(query, key, strict=True)]]
    inside = [sorted(set(q) & set(k)) for q, k in zip(query, key, strict=True)]
    pairs = [(layers[0], key)]
    for n in range(max(map(len, inside))):  # a query among the keys is cut from those before it
        own = [tuple(span[n : n + 1]) for span in inside]
        pairs.append((own, [tuple(at for at in k if o and at < o[0]) for k, o in zip(key, own, strict=True)]))
    kept = [(q, k) for q, k in pairs if any(a and b and min(b) < max(a) for a, b in zip(q, k, strict=True))]
    if not kept:
        raise PatchbayError(f"task {task.name}: no query of {queries!r} sees a key of {keys!r} in any prompt")
    alike = [(len(set(q)) == 1 and len(set(k)) == 1) for q, k in kept]
    return [(q[0], k[0]) if same else (_mask(q), _mask(k)) for (q, k), same in zip(kept, alike, strict=True)]


def _spans(task: Task, written: Place) -> list[tuple[int, ...]]:
    if isinstance(written, str) and written in task.marks:
        return [tuple(sorted(set(span))) for span in task.marks[written]]
    at = places(written)
    spans = []
    for ids in task.clean:
        every = range(len(ids))
        if at is None:
            spans.append(tuple(every))
        elif at == "last":
            spans.append((len(ids) - 1,))
        elif isinstance(at, slice):
            spans.append(tuple(every[at]))
        elif isinstance(at, int | tuple):
            spans.append(tuple(sorted(every[i] for i in ((at,) if isinstance(at, int) else at))))
        else:
            raise PatchbayError(
                f"{written!r} beside a mark of task {task.name}: give positions, a slice, 'last' or 'all'"
            )
    return spans


def _mask(spans: list[tuple[int, ...]]) -> Tensor:
    """bool [prompt, position], as wide as the furthest position."""
    mask = torch.zeros(len(spans), 1 + max(max(span, default=0) for span in spans), dtype=torch.bool)
    for row, span in enumerate(spans):
        mask[row, list(span)] = True
    return mask
