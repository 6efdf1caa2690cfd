"""Binding heads: attention heads that look from the question at the answer of the pair that is asked, and not at the others.

With c_1 .. c_n the places of the n candidates (the things, where a box is asked), a the pair that is asked, and A the attention
of the last query:

    score[layer, head] = mean over prompts of A[last, c_a] - mean over the other pairs j of A[last, c_j]

`partner` is the same for the other members of the pairs (the boxes): a head that looks at the key itself. `pairing` is the
attention from the later member of a pair to the earlier one, mean over pairs, beside `pairing_null`, the highest that it
is to the earlier member of a pair d = 1, 2, ... pairs before: the head that brings the two together. Null: the asked places are
dealt to the prompts anew, 1,000 times; `null_high` is the 95th percentile of the score over the deals, `p` the share of
deals that score as high, `p_adjusted` over all heads. A head that always looks at one place, or evenly, is no better than the
deals. `low` and `high` are 95 % bootstraps over prompts; `without_first` leaves the first key out and scales the rest to 1. One
forward pass.

A shallow model may look the pair up where the question names its key, and bring only the answer to the last token: `query="query"`
scores the attention from there. And what was bound may be gathered in a token beside the pair: `span` is the score for all tokens
from the pair's first member to the one behind its second, with the same null (`span_null_high`, `span_p_adjusted`).

The question, with several mechanisms as its answer, is that of Gur-Arieh, Geva and Geiger 2025, "Mixing Mechanisms"; the
score is the plain attention reading of it.

On these prompts place, key and pointer all lead to the same token: which of them a head follows, and whether the model uses
it, is for `prove.interchange` and `prove.ablation` to say. A model that answers at chance may still have such heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._attention import ATTENTION, GRID, Finder, ends, held_out, looks, parts_of, pattern_layers, together
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

DRAWS = 1000


@method(paper="gurarieh2025", unit="attention")
def binding_heads(model: Model, task: Task, *, query: str = "last", batch_size: int = 16, seed: int = 0) -> Result:
    """Attention from the last position to the answer beyond that to the other candidates, mean over prompts.

    `query`: the mark of another token to look from, such as "query", the word that the question asks with.

    `task` has the marks objects, boxes and answer, as `pb.tasks.entity_binding(model)` has. Main variable `score` with `low`,
    `high`, `null_high`, `p`, `p_adjusted`, `without_first`; `answer` (the attention itself), `partner`, `pairing`,
    `pairing_null`; `span`, `span_null_high`, `span_p_adjusted`; and `held_out`.
    """
    one = finder(model, task, query=query, seed=seed)
    return together(model, task, [one], batch_size=batch_size)[0]


def finder(model: Model, task: Task, *, query: str = "last", seed: int = 0) -> Finder:
    """The finder for this task, for `together`."""
    pattern_layers(model, "binding_heads")
    task.check(model.vocab_size)
    candidates, partners, asked = _pairs(task)

    looking = _looking(task, query, candidates, partners)

    def targets(prompt: int, ids: list[int]) -> Tensor:
        return _targets(candidates[prompt], partners[prompt], looking[prompt], len(ids))

    return Finder(looks(targets), lambda seen: _report(seen, len(candidates[0]), asked, seed))


def _pairs(task: Task) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int]]:
    """Places of the candidates and of their partners, pair by pair, and which pair is asked, for every prompt."""
    lacking = [mark for mark in ("objects", "boxes", "answer") if mark not in task.marks]
    if lacking:
        raise PatchbayError(
            f"binding_heads needs the marks objects, boxes and answer; task {task.name} lacks {', '.join(lacking)}; possible: "
            "pb.tasks.entity_binding(model), pb.tasks.binding_counterfactuals(model), or a Task with these marks"
        )
    objects, boxes, answers = (task.marks[mark] for mark in ("objects", "boxes", "answer"))
    candidates, partners, asked = [], [], []
    for i, answer in enumerate(answers):
        group = next((g for g in (objects[i], boxes[i]) if len(answer) == 1 and answer[0] in g), None)
        if group is None or len(objects[i]) != len(boxes[i]) or len(objects[i]) < 2:
            raise PatchbayError(
                f"task {task.name}, prompt {i}: the answer at {answer} must be one of the objects at {objects[i]} or the boxes "
                f"at {boxes[i]}, of each of which there are as many, 2 or more"
            )
        candidates.append(tuple(group))
        partners.append(tuple(boxes[i] if group is objects[i] else objects[i]))
        asked.append(group.index(answer[0]))
    counts = sorted({len(group) for group in candidates})
    if len(counts) > 1:
        raise PatchbayError(
            f"task {task.name}: prompts have {counts} pairs; binding_heads compares prompts of one number"
        )
    return candidates, partners, asked


def _looking(task: Task, query: str, candidates: list[tuple[int, ...]], partners: list[tuple[int, ...]]) -> list[int]:
    """The position that each prompt is looked at from, behind all pairs."""
    if query == "last":
        return [len(ids) - 1 for ids in task.clean]
    marks = task.marks.get(query, [()] * len(task))
    for i, places in enumerate(marks):
        if len(places) != 1 or places[0] <= max(*candidates[i], *partners[i]):
            raise PatchbayError(
                f"query={query!r}: task {task.name}, prompt {i}, marks {places}; one token behind all pairs is needed. Marks: "
                f"{', '.join(task.marks)}; possible: last, or query in pb.tasks.entity_binding(model)"
            )
    return [places[0] for places in marks]


def _targets(candidates: tuple[int, ...], partners: tuple[int, ...], at: int, n: int) -> Tensor:
    """Bool [statistic, query, key]: the query at `at` to each candidate, to each partner, and later to earlier members d pairs back."""
    pairs = len(candidates)
    masks = torch.zeros(4 * pairs, n, n, dtype=torch.bool)
    for j, (candidate, partner) in enumerate(zip(candidates, partners, strict=True)):
        masks[j, at, candidate] = masks[pairs + j, at, partner] = True
        masks[3 * pairs + j, at, min(candidate, partner) : max(candidate, partner) + 2] = True
    earlier = [min(pair) for pair in zip(candidates, partners, strict=True)]
    later = [max(pair) for pair in zip(candidates, partners, strict=True)]
    for back in range(pairs):
        for j in range(back, pairs):
            masks[2 * pairs + back, later[j], earlier[j - back]] = True
    return masks & torch.ones(n, n, dtype=torch.bool).tril()


def _report(seen: Tensor, pairs: int, asked: list[int], seed: int) -> Result:
    if len(seen) < len(asked):
        raise PatchbayError(f"binding_heads: {len(asked)} prompts; possible are up to {len(seen)}")
    plain, without = (
        part.split(pairs, 3) for part in parts_of(seen)[:2]
    )  # candidates, partners, pairing, spans: [..., pair]
    place = torch.tensor(asked)[:, None, None, None].expand(*seen.shape[:3], 1)  # [prompt, layer, head, 1]
    beyond = [_beyond_others(x) for x in (plain[0], plain[1], without[0].nan_to_num(0.0), plain[3])]
    score, partner, bare, span = (x.gather(3, place)[..., 0] for x in beyond)  # each [prompt, layer, head]
    bare = torch.where(score.isnan(), torch.nan, bare)
    null_high, p = _dealt(beyond[0], torch.tensor(asked), seed)
    span_high, span_p = _dealt(beyond[3], torch.tensor(asked), seed)
    span_p = maths.benjamini_hochberg(span_p)
    other = plain[2][..., 1:].nanmean(0)  # [layer, head, pairs back]
    best, notes = held_out(score)
    return Result(
        {
            "score": (score.mean(0), GRID, ATTENTION),
            **ends(score),
            "null_high": (null_high, GRID, ATTENTION),
            "p": (p, GRID, "probability"),
            "p_adjusted": (maths.benjamini_hochberg(p), GRID, "probability"),
            "without_first": (bare.mean(0), GRID, ATTENTION),
            "answer": (plain[0].gather(3, place)[..., 0].mean(0), GRID, ATTENTION),
            "partner": (partner.mean(0), GRID, ATTENTION),
            "span": (span.mean(0), GRID, ATTENTION),
            "span_null_high": (span_high, GRID, ATTENTION),
            "span_p_adjusted": (span_p, GRID, "probability"),
            "pairing": (plain[2][..., 0].nanmean(0), GRID, ATTENTION),
            "pairing_null": (other.amax(-1), GRID, ATTENTION),
            **best,
        },
        notes=notes,
    )


def _beyond_others(paid: Tensor) -> Tensor:
    """Attention to each pair minus the mean of that to the others, [..., pair]."""
    return paid - (paid.sum(-1, keepdim=True) - paid) / (paid.shape[-1] - 1)


def _dealt(beyond: Tensor, asked: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """95th percentile of the score over deals of the asked places, and p of the true one: [layer, head] each."""
    n, shape = len(asked), beyond.shape[1:3]
    flat = beyond.double().flatten(1, 2).transpose(1, 2).flatten(0, 1)  # [prompt * pair, cell]
    generator = torch.Generator().manual_seed(seed)
    deals = torch.stack([asked, *(asked[torch.randperm(n, generator=generator)] for _ in range(DRAWS))])  # true first
    chosen = torch.nn.functional.one_hot(deals, beyond.shape[3]).double().flatten(1)  # [deal, prompt * pair]
    scores = chosen @ flat.nan_to_num(0.0) / n  # [deal, cell]
    hits = (scores[1:] >= scores[:1] - 1e-9).sum(0)
    p = ((1.0 + hits) / (1 + DRAWS)).where(flat[0].isfinite(), torch.nan)
    high = scores[1:].quantile(0.95, dim=0).where(flat[0].isfinite(), torch.nan)
    return high.reshape(shape), p.reshape(shape)
