"""Compare decoders: the same prompts through several of them, side by side: texts, what they are like, and what they cost.

    likelihood   mean log-probability of a token under the model as it stands at the call, knobs of a decoder out
    judge        the same under a second model, where one is given
    diversity    (1 - rep-2)(1 - rep-3)(1 - rep-4), rep-n the share of a text's n-grams that were there before
    distinct     different pairs of tokens over all pairs, of the drafts of a prompt together
    self-BLEU    how alike a text is to those of the other prompts; high where a decoder says the same of everything
    likeness     area between the laws of these texts and of the references over cells of mean last states, as in MAUVE: of one half of the
                 prompts against references of the other half, 8 ways to halve; `null` is that of the references themselves

Means are over prompts with bootstrap intervals; `change` is against the first decoder, prompt by prompt. Cost is in passes and token
positions that the model was sent; seconds of each decoder are in the provenance, since they are no property of a text.

Distance FROM human text is what matters, in both directions: text likelier and duller than people's is no better. Likeness depends
on the model that gives the states, and on the number of prompts: compare it with its null, never across calls.

Su and Xu 2022, "Contrastive Search Is What You Need For Neural Text Generation", who compare decoders by diversity, MAUVE and
coherence. None of these measures is a reader.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from patchbay import maths
from patchbay.decode._loop import Call, asked, check_length, generators, ids_of
from patchbay.decode._spoken import spoken
from patchbay.decode._telling import distinct, diversity, halves, repeated, self_bleu
from patchbay.model.generate import ALONE
from patchbay.model.model import Model
from patchbay.results.method import method, seeded
from patchbay.results.replay import find_method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

HUMAN = "references"
SPLITS, FEWEST = 8, 16  # ways to halve the prompts; prompts from which likeness is measured
UNITS = {
    "likelihood": "nats per token", "judge": "nats per token", "diversity": "share", "rep_2": "share of 2-grams",
    "rep_3": "share of 3-grams", "rep_4": "share of 4-grams", "distinct": "share of 2-grams", "self_bleu": "BLEU", "length": "tokens",
}  # fmt: skip


@dataclass
class Spoken:
    """What one decoder gave: drafts [prompt][draft] of new tokens, its cost, and its seconds."""

    drafts: list[list[list[int]]]
    calls: float = math.nan
    fed: float = math.nan
    seconds: float = math.nan
    notes: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[list[int]]:
        return [several[0] for several in self.drafts]


@method(paper="su2022")
def compare(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    decoders: list[str] | dict[str, Any],
    *,
    references: list[str] | list[list[int]] | None = None,
    judge: Model | None = None,
    seed: int = 0,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> Result:
    """Each decoder's texts, with `likelihood` [condition] and every other measure, their `low` and `high`, and `change` against the first.

    By prompt the same stand as `prompt_NAME` [condition, prompt]; `calls` and `fed` [condition] are the cost; with 16 references or more also
    `likeness` [condition] and `null`. The table `meters` prints; `texts`, which a page shows too, has a row for each prompt and a bar
    where a text leaves the first decoder's.

    `decoders`: as text, "contrastive_search(k=4)", any method here with its options, or "generate(top_p=0.9, do_sample=True)", what
    transformers takes, and "greedy"; in a dict by name also [text, knob], or the Result of a decoder on these prompts, which is how one
    with a second model comes in. `references`: what a person wrote after each prompt. `judge`: a second model of this vocabulary.
    """
    call = asked(model, prompts, max_new_tokens, [], batch_size)
    named = _named(decoders)
    found = {name: _run(call, what, name, seed) for name, what in named.items()}
    if references is not None:
        found[HUMAN] = Spoken([[text] for text in _references(call, references)])
    for name, spoke in found.items():
        if any(not text for several in spoke.drafts for text in several):
            raise PatchbayError(f"{name}: a text without a token cannot be compared")
        check_length(model, call.prompts, max(len(text) for several in spoke.drafts for text in several))
    by_prompt = _measured(call, found, judge)
    variables, rows = _means(found, by_prompt, seed)
    notes = [f"{name}: {note}" for name, spoke in found.items() for note in spoke.notes]
    if references is not None:
        more, said = _likeness(call if judge is None else call.beside(judge), found, seed)
        variables |= more
        notes += said
    result = Result(
        variables,
        coords={"condition": list(found)},
        tables={"meters": rows, "texts": _side_by_side(call, found)},
        notes=notes,
    )
    result.provenance["seconds"] = {name: spoke.seconds for name, spoke in found.items() if name != HUMAN}
    return result


# --- decoders ---------------------------------------------------------------------------------------------


def _named(decoders: Any) -> dict[str, Any]:
    named = decoders if isinstance(decoders, dict) else {str(one): one for one in decoders}
    if not named or (not isinstance(decoders, dict) and len(named) < len(decoders)):
        raise PatchbayError(f"decoders={decoders!r}: one or more, each under a name of its own")
    if HUMAN in named:
        raise PatchbayError(f"decoders: {HUMAN!r} is the row of the references, call it otherwise")
    return {str(name): what for name, what in named.items()}


def _run(call: Call, what: Any, name: str, seed: int) -> Spoken:
    """The texts of one decoder, knob and all, in its own time."""
    if isinstance(what, Result):
        return _held(call, what, name)
    pair = isinstance(what, list | tuple) and len(what) == 2
    text, knob = what if pair else (what, None)
    if not isinstance(text, str) or not (knob is None or hasattr(knob, "edits_at")):
        raise PatchbayError(f"decoders: {name} is a text, [text, knob] or the Result of a decoder, got {what!r:.60}")
    start = time.perf_counter()
    with nullcontext() if knob is None else call.model.edited(knob):
        spoke = _decoded(call, text, seed)
    return replace(spoke, seconds=time.perf_counter() - start)


def _decoded(call: Call, text: str, seed: int) -> Spoken:
    name, values, options = spoken(text, "decoders")
    if values:
        raise PatchbayError(f"decoders: in {text!r} options have no names, such as 'beam(beams=4)'")
    if name in ("greedy", "generate"):
        return _generated(call, {} if name == "greedy" else options, seed)
    own = find_method(f"decode.{name}")
    known = inspect.signature(own).parameters
    given = {"max_new_tokens": call.n_new, "batch_size": call.batch_size, **({"seed": seed} if "seed" in known else {})}
    return _held(call, own(call.model, prompts=call.prompts, **{**given, **options}), text)


def _held(call: Call, result: Result, name: str) -> Spoken:
    if "tokens" not in result or result.axes_of("tokens") != ("prompt", "draft", "position"):
        raise PatchbayError(f"decoders: {name} is no Result of a decoder")
    tokens = result["tokens"].tolist()
    if len(tokens) != len(call.prompts):
        raise PatchbayError(f"decoders: {name} has texts of {len(tokens)} prompts, here are {len(call.prompts)}")
    told = result.provenance.get("task") or {}
    before = told.get("prompts", told.get("clean"))  # as they were given, or a Task's
    apart = [] if before is None else [i for i, pair in enumerate(zip(ids_of(call.model, before), call.prompts, strict=True)) if pair[0] != pair[1]]  # fmt: skip
    if apart:
        raise PatchbayError(
            f"decoders: {name} has texts of other prompts, the first of them prompt {apart[0]}: make it of these"
        )
    drafts = [[[t for t in row if t >= 0] for row in several] for several in tokens]
    full = [[text for text in several if text] for several in drafts]
    other = {key: float(result[f"other_{key}"]) if f"other_{key}" in result else 0.0 for key in ("calls", "fed")}
    cost = {key: float(result[key]) + other[key] for key in ("calls", "fed")}
    return Spoken([several or [[]] for several in full], **cost, notes=list(result.notes))


def _generated(call: Call, options: dict[str, Any], seed: int) -> Spoken:
    """transformers' own generate: chance by prompt, so that a prompt's text is what it is alone."""
    count = Count(bool(options.get("use_cache", True)))
    options = {**options, "logits_processor": LogitsProcessorList([count, *options.get("logits_processor", [])])}
    if options.get("do_sample"):
        found = []
        for prompt, chance in zip(call.prompts, generators(seed, call.prompts), strict=True):
            with seeded(chance[0].initial_seed()):
                found += call.model.generate([prompt], call.n_new, new_only=True, **options)
    else:
        found = call.model.generate(call.prompts, call.n_new, new_only=True, **options)
    if set(options) & set(ALONE):  # passes that are not one a token, or of another model
        return Spoken([[list(row)] for row in found], notes=["its passes are not counted"])
    return Spoken([[list(row)] for row in found], count.calls, count.fed)


class Count(LogitsProcessor):  # type: ignore[misc]
    """Passes and token positions of transformers' own loop, which asks its processors once a pass; changes nothing."""

    def __init__(self, cached: bool) -> None:
        self.cached, self.calls, self.fed, self.length = cached, 0, 0, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, length = input_ids.shape
        follows = self.cached and length == self.length + 1
        self.calls, self.fed, self.length = self.calls + 1, self.fed + rows * (1 if follows else length), length
        return scores


def _references(call: Call, references: Any) -> list[list[int]]:
    if len(references) != len(call.prompts):
        raise PatchbayError(f"references: {len(references)} for {len(call.prompts)} prompts; one continuation of each")
    ids = [_continuation(call, prompt, one) for prompt, one in zip(call.prompts, references, strict=True)]
    if empty := [at for at, one in enumerate(ids) if not one]:
        raise PatchbayError(f"references: that of prompt {empty[0]} is empty")
    return [one[: call.n_new] for one in ids]


def _continuation(call: Call, prompt: list[int], text: Any) -> list[int]:
    """The ids of a continuation; of text those that it has after the prompt's text, where they begin with the prompt's."""
    if not isinstance(text, str):
        return [int(token) for token in text]
    tokenizer = call.model._need_tokenizer()
    whole = list(
        tokenizer(tokenizer.decode(prompt, skip_special_tokens=True) + text, add_special_tokens=False)["input_ids"]
    )
    bare = [token for token in prompt if token not in tokenizer.all_special_ids]
    return (
        whole[len(bare) :]
        if whole[: len(bare)] == bare
        else list(tokenizer(text, add_special_tokens=False)["input_ids"])
    )


# --- measures ---------------------------------------------------------------------------------------------


def _measured(call: Call, found: dict[str, Spoken], judge: Model | None) -> dict[str, list[list[float]]]:
    """Every measure [condition][prompt] by its name."""
    made: dict[str, list[list[float]]] = {}
    for spoke in found.values():
        drafts = spoke.drafts
        per = {
            "likelihood": [_mean(several) for several in _read(call, drafts)[0]],
            "diversity": [_mean([diversity(text) for text in several]) for several in drafts],
            **{f"rep_{n}": [_mean([repeated(text, n) for text in several]) for several in drafts] for n in (2, 3, 4)},
            "distinct": [distinct(several, 2) for several in drafts],
            "self_bleu": self_bleu(spoke.texts),
            "length": [_mean([float(len(text)) for text in several]) for several in drafts],
        }
        if judge is not None:
            per["judge"] = [_mean(several) for several in _read(call.beside(judge), drafts)[0]]
        for name, values in per.items():
            made.setdefault(name, []).append(values)
    if len(call.prompts) < 2:
        made.pop("self_bleu")
    return made


def _read(call: Call, drafts: list[list[list[int]]]) -> tuple[list[list[float]], Tensor]:
    """Of each draft [prompt][draft] the mean log-probability of its tokens, from one run over the text; of each first draft the mean
    of its tokens' last stream [prompt, d_model]."""
    port = Port("resid_out", call.model.n_layers - 1)
    said = [[0.0] * len(several) for several in drafts]
    states: list[Tensor] = [torch.empty(0)] * len(drafts)
    for members in call.batches():
        items = [(place, at, text) for place in members for at, text in enumerate(drafts[place])]
        width = max(len(text) for *_, text in items)
        tokens = torch.tensor([text + [0] * (width - len(text)) for *_, text in items])
        with call.rows([place for place, *_ in items], taps=[port]) as rows:
            seen = rows.run(tokens, keep=width + 1)
        logp = torch.log_softmax(seen.logits[:, :-1].double(), -1).gather(2, tokens.to(seen.logits.device)[..., None])[
            ..., 0
        ]
        for row, (place, at, text) in enumerate(items):
            said[place][at] = float(logp[row, : len(text)].mean())
            if at == 0:
                states[place] = seen.taps[port][row, -width:][: len(text)].float().mean(0).cpu()
    return said, torch.stack(states)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _means(
    found: dict[str, Spoken], by_prompt: dict[str, list[list[float]]], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Variables over decoders, and a row for each one."""
    axes: tuple[str, ...] = ("condition",)
    variables: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [{"decoder": name} for name in found]
    for name, values in by_prompt.items():
        held = torch.tensor(values, dtype=torch.float64)  # [condition, prompt]
        own = [maths.bootstrap_interval(row, seed=seed) for row in held]
        gaps = [maths.paired_interval(row, held[0], seed=seed) for row in held]
        ends = {name: "mean", f"{name}_low": "low", f"{name}_high": "high"}
        for made, end in ends.items():
            variables[made] = (torch.tensor([getattr(one, end) for one in own], dtype=torch.float64), axes, UNITS[name])
        for made, end in {f"{name}_change": "mean", f"{name}_change_low": "low", f"{name}_change_high": "high"}.items():
            variables[made] = (
                torch.tensor([getattr(one, end) for one in gaps], dtype=torch.float64),
                axes,
                UNITS[name],
            )
        variables[f"prompt_{name}"] = (held, ("condition", "prompt"), UNITS[name])
        for row, one in zip(rows, own, strict=True):
            row[name.replace("_", "-")] = (
                f"{one.mean:.3g} ({one.low:.3g} to {one.high:.3g})" if len(held[0]) > 1 else f"{one.mean:.3g}"
            )
    for name, unit in (("calls", "passes"), ("fed", "token positions")):
        variables[name] = (
            torch.tensor([float(getattr(one, name)) for one in found.values()], dtype=torch.float64),
            axes,
            unit,
        )
        for row, spoke in zip(rows, found.values(), strict=True):
            value = getattr(spoke, name)
            row[name] = None if math.isnan(value) else int(value)
    return variables, rows


def _likeness(call: Call, found: dict[str, Spoken], seed: int) -> tuple[dict[str, Any], list[str]]:
    """How like the references each decoder's texts are, and how like themselves; nothing of few prompts."""
    if len(call.prompts) < FEWEST:
        return {}, [f"likeness to the references is measured from {FEWEST} prompts on, here are {len(call.prompts)}"]
    states = {name: _read(call, [[text] for text in spoke.texts])[1] for name, spoke in found.items()}
    own = {name: halves(ours, states[HUMAN], SPLITS, seed) for name, ours in states.items()}
    null = torch.tensor(own.pop(HUMAN), dtype=torch.float64)
    mean = torch.tensor(
        [_mean(own[name]) if name in own else float(null.mean()) for name in found], dtype=torch.float64
    )
    lines = [f"likeness to the references is {_mean(values):.2f} of {name}" for name, values in own.items()]
    lines.append(
        f"likeness of the references to themselves is {float(null.mean()):.2f} ({float(null.min()):.2f} to {float(null.max()):.2f})"
    )
    made = {"likeness": (mean, ("condition",), "area"), "null": (null, ("draw",), "area")}
    return made, lines


# --- texts side by side -----------------------------------------------------------------------------------


def _side_by_side(call: Call, found: dict[str, Spoken]) -> list[dict[str, Any]]:
    """A row for each prompt with what every decoder wrote; a bar stands where a text leaves that of the first decoder."""
    first = next(iter(found.values())).texts
    rows = []
    for place, prompt in enumerate(call.prompts):
        row: dict[str, Any] = {"prompt": _text(call, [], prompt)}
        for name, spoke in found.items():
            text = spoke.texts[place]
            same = next(
                (at for at, pair in enumerate(zip(text, first[place], strict=False)) if pair[0] != pair[1]), None
            )
            same = min(len(text), len(first[place])) if same is None else same
            before, after = _text(call, prompt, text[:same]), _text(call, prompt + text[:same], text[same:])
            row[name] = before if same == len(text) else f"{before}|{after}"
        rows.append(row)
    return rows


def _text(call: Call, before: list[int], ids: list[int]) -> str:
    """Ids as they stand after what comes before them, or as numbers where there is no tokenizer."""
    if call.model.tokenizer is None:
        return " ".join(map(str, ids))
    whole, start = (str(call.model.tokenizer.decode(row, skip_special_tokens=True)) for row in (before + ids, before))
    return whole[len(start) :] if whole.startswith(start) else str(call.model.tokenizer.decode(ids))
