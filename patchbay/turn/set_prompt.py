"""Set prompt: a prompt whose options have no order, so that the answer is the same whatever order they are written in.

    "Which is a fruit? <|set|> brick<|or|> pear<|or|> rope<|end|> Answer:"

Positions: every option starts where the text before the set ends, and the text after it where the longest option ends. Mask:
causal, but no option sees another one of its set; the text after, and every token generated, sees all. Both go to the model
through its own `position_ids` and 4-D `attention_mask`; attention is a sum over keys, so what follows the set cannot tell in
which order they stood. In exact arithmetic that is equality; in floating point the sum is taken in another order. With
`canonical` the options are sorted by their tokens before the run, and then it is equality to the last bit. Windows of
sliding attention count positions, not tokens.

Each option is tokenised alone, since a token across its border would tie it to its neighbour. Cost: one forward pass, and one
for each order that is tried (`orders`, for `spread`) both ways: as a set, and as the ordinary prompt, whose dependence on the
order is the comparison. Before anything is answered the model must reproduce its own plain run through mask and position ids,
and give one answer for two orders; families that do not are refused with the reason (a state that is carried from token to
token, distances that are counted in tokens).

McIlroy-Young, Brown, Olson, Zhang and Dwork 2024, "Order-Independence Without Fine Tuning" (Set-Based Prompting), section 3.
It says nothing of whether the answer is right, and a model was not trained on such positions: compare `score` with
`plain_score`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from patchbay import maths
from patchbay.jacks.arguments import with_cache
from patchbay.model.model import Model
from patchbay.model.self_check import TOLERANCE
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task
from patchbay.turn import _sets
from patchbay.turn._sets import Layout, Segments, layout, options_of, other_orders, plain_layout


@method(paper="mcilroyyoung2024")
@torch.no_grad()
def set_prompt(
    model: Model,
    prompts: Any,
    *,
    canonical: bool = False,
    max_new_tokens: int = 0,
    orders: int = 4,
    seed: int = 0,
    batch_size: int = 8,
) -> Result:
    """The next-token distribution after prompts with unordered options, and their greedy continuation if asked.

    `prompts`: texts with `<|set|>a<|or|>b<|end|>`; or lists of segments, each a list of ids or a list of options (ids); or a
    Task whose label `options` holds, for each prompt, the [start, end] of every option, those that touch being one set.
    Main variable `log_probability` [prompt, vocab]; `spread` [prompt] is the largest difference between its logits and those of
    `orders` other orders, `plain_spread` and `plain_kl` the same of the ordinary prompt. With a Task, `score` (with `low`
    and `high`, and `scores` by prompt) and `plain_score`. Generated text is in `tables["generated"]`. Edits of an enclosing
    `model.edited(...)` hold.

    `canonical`: sort the options by their tokens first, so that orders agree to the last bit. `max_new_tokens`: tokens
    to continue with, greedily; 0 for none. `orders`: other orders of the options that are tried, for the spread.
    """
    given = segments = _sets.read(model, prompts)
    if orders < 0 or max_new_tokens < 0:
        raise PatchbayError(f"orders={orders}, max_new_tokens={max_new_tokens}: 0 or more of each")
    if canonical:
        segments = [_sets.canonical(one) for one in given]
    _check_lengths(model, segments, max_new_tokens)
    _check_honoured(model, segments[0])
    logits = _in_batches(model, [layout(one) for one in segments], batch_size)  # [prompt, vocab]
    plain = _in_batches(model, [plain_layout(one) for one in given], batch_size)
    variables: dict[str, Any] = {"log_probability": (logits.float().log_softmax(-1), ("prompt", "vocab"), "nats")}
    if orders:
        variables |= _spreads(model, given, logits, plain, orders, seed, batch_size, canonical)
    if isinstance(prompts, Task):
        variables |= _scores(prompts, logits, plain, seed)
    tables = {"generated": _generated(model, segments, max_new_tokens, batch_size)} if max_new_tokens else {}
    return Result(variables, tables=tables, notes=_notes(segments, orders))


# --- runs ---------------------------------------------------------------------------------------------


def inputs(model: Model, layouts: Sequence[Layout]) -> dict[str, Any]:
    """What the model's own forward takes: input_ids, position_ids and attention_mask, prompts padded on the right."""
    ids, positions, seen = _padded(layouts)
    masks = _masks(model, seen, positions, positions)
    return {"input_ids": ids.to(model.device), "position_ids": positions.to(model.device), "attention_mask": masks}


def _padded(layouts: Sequence[Layout]) -> tuple[Tensor, Tensor, Tensor]:
    """ids and positions [prompt, position], and what sees what, bool [prompt, query, key]; padding sees itself alone."""
    width = max(len(one.ids) for one in layouts)
    ids, positions = (torch.zeros(len(layouts), width, dtype=torch.long) for _ in range(2))
    seen = torch.eye(width, dtype=torch.bool).repeat(len(layouts), 1, 1)
    for row, one in enumerate(layouts):
        n = len(one.ids)
        ids[row, :n], positions[row, :n], seen[row, :n, :n] = (
            torch.tensor(one.ids),
            torch.tensor(one.positions),
            one.seen(),
        )
    return ids, positions, seen


def _masks(model: Model, seen: Tensor, query: Tensor, key: Tensor) -> Any:
    """Additive [prompt, 1, query, key]; for families that mix full and sliding layers, one of each by name."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (query[:, :, None] - key[:, None, :] < window)

    def numbers(allowed: Tensor) -> Tensor:
        closed = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, torch.finfo(model.dtype).min)
        return closed[:, None].to(model.device)

    if {"sliding_attention", "full_attention"} <= kinds:
        return {"full_attention": numbers(seen), "sliding_attention": numbers(near)}
    return numbers(seen if "full_attention" in kinds else near)


def _in_batches(model: Model, layouts: Sequence[Layout], batch_size: int) -> Tensor:
    """Logits after each prompt, [prompt, vocab]."""
    return torch.cat([_logits(model, layouts[i : i + batch_size]) for i in range(0, len(layouts), batch_size)])


def _logits(model: Model, layouts: Sequence[Layout]) -> Tensor:
    lengths = torch.tensor([len(one.ids) for one in layouts])
    with model.session((), (), lengths=lengths):
        logits = model.hf(**inputs(model, layouts), use_cache=False).logits
    return logits[torch.arange(len(layouts)), (lengths - 1).to(logits.device)]


def _generated(model: Model, segments: Sequence[Segments], n: int, batch_size: int) -> list[dict[str, Any]]:
    """Greedy continuations with the key/value cache, one row of the table for each prompt."""
    layouts = [layout(one) for one in segments]
    rows: list[list[int]] = []
    for i in range(0, len(layouts), batch_size):
        rows += _continued(model, layouts[i : i + batch_size], n)
    shown = [model.decode(row) if model.tokenizer is not None else " ".join(map(str, row)) for row in rows]
    return [{"prompt": i, "text": text, "ids": row} for i, (text, row) in enumerate(zip(shown, rows, strict=True))]


def _continued(model: Model, layouts: Sequence[Layout], n: int) -> list[list[int]]:
    """New ids of each prompt: positions go on from its own end, and every new token sees every real one."""
    ids, keys, seen = _padded(layouts)
    lengths = torch.tensor([len(one.ids) for one in layouts])
    real = torch.arange(ids.shape[1])[None] < lengths[:, None]  # [prompt, key]
    ends = torch.tensor([one.end for one in layouts])
    cache, stops = DynamicCache(), _stop_ids(model)
    rows: list[list[int]] = [[] for _ in layouts]
    query, mask, read = keys, _masks(model, seen, keys, keys), lengths - 1
    with model.session((), (), lengths=lengths):
        for step in range(n):
            output = model.hf(input_ids=ids.to(model.device), position_ids=query.to(model.device), attention_mask=mask,
                              **with_cache(model.hf, cache), use_cache=True)  # fmt: skip
            chosen = output.logits[torch.arange(len(rows)), read.to(model.device)].argmax(-1).cpu()
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if not (row and row[-1] in stops):
                    row.append(token)
            if all(row[-1] in stops for row in rows):
                break
            ids, query, read = chosen[:, None], (ends + step)[:, None], torch.zeros(len(rows), dtype=torch.long)
            real, keys = torch.cat([real, real.new_ones(len(rows), 1)], 1), torch.cat([keys, query], 1)
            mask = _masks(model, real[:, None, :], query, keys)
    return rows


def _stop_ids(model: Model) -> set[int]:
    found = getattr(model.hf.generation_config, "eos_token_id", None)
    return set() if found is None else set(found) if isinstance(found, list) else {int(found)}


# --- what is refused ----------------------------------------------------------------------------------


def _check_lengths(model: Model, segments: Sequence[Segments], n_new: int) -> None:
    tokens = [plain_layout(one).ids for one in segments]
    model.encode(tokens)  # refuses ids that the vocabulary lacks and prompts that are too long
    longest = max(map(len, tokens)) + n_new
    if model.longest_prompt is not None and longest > model.longest_prompt:
        raise PatchbayError(
            f"{n_new} new tokens after {longest - n_new}: the model takes {model.longest_prompt} in all"
        )
    windows = [model.config.window_size for at in model.modules if getattr(at.attn, "attention_type", "") == "local"]
    if windows and longest > min(windows):
        raise PatchbayError(
            f"{model.family.name}: its local layers see {min(windows)} tokens back, counted in tokens whatever the mask and the "
            f"position ids say, so the order of {longest} tokens would matter; use at most {min(windows)}"
        )


def _check_honoured(model: Model, segments: Segments) -> None:
    """Refuse a model that does not follow mask and position ids: by what it is made of, else by what it does."""
    name, config = model.family.name, model.config
    carried = [i for i in range(model.n_layers) if "attn.pattern" not in model.signals(i)]
    if carried:
        raise PatchbayError(
            f"{name}: layers {carried[:6]} carry a state from token to token, which no attention mask (attn.pattern) reaches, so "
            "the order of options cannot be hidden from them"
        )
    if getattr(config, "alibi", config.model_type in ("bloom", "mpt")):
        raise PatchbayError(
            f"{name}: ALiBi lowers attention by distance in tokens, which position ids do not change and a 4-D mask replaces, so "
            "the order of options cannot be hidden; families with rotary or learned positions can"
        )
    ordinary = plain_layout(segments)
    turned: Segments = [options_of(segment)[::-1] or segment for segment in segments]
    n = model.vocab_size
    other: Segments = [[[(i + 1) % n for i in option] for option in options_of(one)] or one for one in segments]
    own = model.hf(input_ids=torch.tensor([ordinary.ids], device=model.device), use_cache=False).logits[:, -1]
    try:
        through = _logits(model, [ordinary])
        first, second, changed = (_logits(model, [layout(one)]) for one in (segments, turned, other))
    except PatchbayError:
        raise
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise PatchbayError(f"{name}: its forward takes no 4-D mask with position ids: {error}") from error
    scale, allowed = float(own.abs().max()), TOLERANCE.get(model.dtype, 1e-2)
    if not (off := float((own - through).abs().max()) / scale) <= allowed:
        raise PatchbayError(
            f"{name}: given its own causal mask in 4 dimensions and positions 0, 1, 2, ... the model differs from its plain run by "
            f"{off:.1e} of the largest logit: it does not honour them"
        )
    if not (off := float((first - second).abs().max()) / scale) <= allowed:
        raise PatchbayError(
            f"{name}: with sets in mask and position ids, reversing the options still moves the logits by {off:.1e} of the largest: "
            "some layer counts tokens by itself"
        )
    if torch.equal(first, changed):
        raise PatchbayError(
            f"{name}: with sets in mask and position ids, other options give the same logits to the last bit: the text after the "
            "set does not see them, so the mask is not followed"
        )


# --- what is reported ---------------------------------------------------------------------------------


def _spreads(
    model: Model,
    segments: Sequence[Segments],
    logits: Tensor,
    plain: Tensor,
    n: int,
    seed: int,
    batch_size: int,
    canonical: bool,
) -> dict[str, Any]:
    """What the order changes, as a set and as the ordinary prompt: largest difference of a logit, and mean KL."""
    rows = []
    for i, one in enumerate(segments):
        others = other_orders(one, n, random.Random(f"set-prompt-{seed}-{one}"))
        if not others:
            rows.append((0.0, 0.0, 0.0))
            continue
        moved = 0.0  # canonical: the very same input
        if not canonical:
            turned = _in_batches(model, [layout(o) for o in others], batch_size)
            moved = float((turned - logits[i]).abs().max())
        ordinary = _in_batches(model, [plain_layout(o) for o in others], batch_size)
        apart = maths.kl(plain[i].expand_as(ordinary), ordinary).mean()
        rows.append((moved, float((ordinary - plain[i]).abs().max()), float(apart)))
    found = torch.tensor(rows, dtype=torch.float64)  # [prompt, 3]
    names = (("spread", "logits"), ("plain_spread", "logits"), ("plain_kl", "nats"))
    return {name: (found[:, at], ("prompt",), unit) for at, (name, unit) in enumerate(names)}


def _scores(task: Task, logits: Tensor, plain: Tensor, seed: int) -> dict[str, Any]:
    """The task's score of both ways, with bootstrap intervals over prompts."""
    found: dict[str, Any] = {}
    scores = task.score(logits, plain).cpu()
    for prefix, values in (("", scores), ("plain_", task.score(plain, plain).cpu())):
        ends = maths.bootstrap_interval(values.double(), seed=seed)
        found |= {
            f"{prefix}{name}": (value, (), task.unit)
            for name, value in zip(("score", "low", "high"), ends, strict=True)
        }
    return found | {"scores": (scores, ("prompt",), task.unit)}


def _notes(segments: Sequence[Segments], orders: int) -> list[str]:
    alone = sum(all(len(segment) < 2 for segment in map(options_of, one)) for one in segments)
    notes = [f"{alone} prompts have sets of one option: they are ordinary prompts"] if alone else []
    return notes if orders else [*notes, "no other order was tried (orders=0)"]
