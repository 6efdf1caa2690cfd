"""Why: what one prompt's next token comes from, as an argument in steps: tokens, parts, their words, and the causal check.

    difference = logit(answer) - logit(against),    by default of the two most likely next tokens

1. next tokens: what the model says.
2. tokens of the prompt: the logits lost when attention to a token is cut before the softmax, in all layers and heads, from the
   last position and from all later ones (exact runs); and gradient . embedding, a first-order estimate. That the two agree
   over positions is compared with shuffled positions.
3. parts: direct attribution of every head, mixer and MLP, and the sum of all beside the model's own difference: the remainder is
   rounding. Of the strongest MLPs the neurons or experts, and of dictionaries the features, with the tokens that their writes raise.
4. the lens: what the stream would say after each layer. And what the strongest heads read: their attention from the last
   position, and what each token gives through them.
5. the causal check: the parts that write the answer are taken away together, beside random sets of the same kinds and layers,
   p = (1 + sets that cost as much) / (1 + sets); and one by one.

Cost: at most 12 forward passes of the prompt, then rows of cuts and of removals that are counted and timed before they run.
No twin and no answer are needed. A section that a model has nothing for says so.

Direct attribution is that of Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; each section names the
method of this package that makes it on a Task of many prompts.

It is one prompt: it has no interval and no p over prompts, and nothing here says what the parts do on another. What acts through
later parts scores near 0 in direct attribution. Cutting attention moves it to other tokens, which a first token that attention
rests on feels most. Parts are chosen on the prompt on which they are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, parse_part
from patchbay.stories import _why_causal as causal
from patchbay.stories import _why_parts as inside
from patchbay.stories import _why_tokens as read
from patchbay.stories._asked import Asked, asked
from patchbay.stories._why_features import features, with_features
from patchbay.stories._why_told import HEARD, Section

PASSES = 10  # the prompt itself, attribution, opened MLPs and experts, heads, the lens, the sweeps' base, a gradient (3 passes)
TELLING = 19  # random sets from which on p can be 0.05
LIMITS = [
    "what is explained is the difference of two logits: what raises both, or keeps a third token down, does not show",
    "one prompt: nothing here says what these parts do on others, and p ranks them among random parts, not over prompts. Take them to "
    "prove.ablation, or the prompt and a twin to prove.activation_patching",
    "direct attribution sees what is written at the last position; parts that act through later ones are found by "
    "prove.attribution_patching and prove.path_patching",
    "a cut moves attention to other tokens; a first token that attention rests on may cost much and say nothing",
    "where a head looks is not yet what it takes: 'gives' says what each token brings through it, and how that token came to hold it is "
    "the work of earlier layers",
    "the words of a neuron or an expert are those that its write raises most, not when it fires",
    "parts were chosen on the prompt on which they were taken away",
]


@method(paper="elhage2021", unit="logits")
def why(
    model: Model,
    prompt: Any,
    *,
    answer: str | int | None = None,
    against: str | int | None = None,
    dictionaries: list[str] | None = None,
    draws: int = 39,
    seed: int = 0,
) -> Result:
    """Why the model continues `prompt` with `answer` rather than `against`: tokens, parts, their words, and the causal check.

    Main variable `attribution` [part]: what each head, mixer and MLP writes towards the answer, in logits; `lost` [part] without
    those that were taken away. The tables are the sections in their order, and print.

    `prompt`: a text, chat messages or token ids; one. `answer`: the token that is explained, as text or id; of a text of
    several tokens the first. `against`: the token that it is held against. Without them, the two most likely. `dictionaries`:
    folders of sparse dictionaries, or FOLDER@PLACE such as sae@L1.mlp.out, whose features are shown beside those of a model that has
    some (`model.with_dictionaries`). `draws`: random sets of parts in the causal check.
    """
    if draws < 1:
        raise PatchbayError(f"draws={draws}: a check needs random controls, at least 1")
    model = with_features(model, dictionaries or [])
    question = asked(model, prompt, answer, against)
    told = Told(question, [])
    known = inside.written(question)
    HEARD.get()(Section("cost", said=[_cost(question, known, draws)]))
    told.add("next tokens", lambda: read.next_tokens(question))
    told.add("tokens", lambda: read.tokens(question, seed))
    told.add("parts", lambda: inside.parts(question, known))
    told.add("sums", lambda: inside.sums(question, known))
    opened = [told.add("neurons", lambda: inside.neurons(question, known))]
    if inside.has_experts(model):
        opened.append(told.add("experts", lambda: inside.experts(question, known)))
    if model.dictionaries:
        told.add("features", lambda: features(question))
    told.add("lens", lambda: inside.lens(question))
    told.add("heads read", lambda: inside.reads(question, known))
    lost = _checked(question, told, known, opened, draws, seed)
    told.add("in short", lambda: Section("in short", said=_short(question, told)))
    told.add("not shown", lambda: Section("not shown", said=LIMITS))
    return _result(told, known, lost)


class Told:
    """The sections so far: each is heard as it is made, and one that cannot be made says why."""

    def __init__(self, question: Asked, sections: list[Section]) -> None:
        self.question, self.sections = question, sections

    def add(self, title: str, make: Callable[[], Section]) -> Section:
        try:
            section = make()
        except PatchbayError as error:
            section = Section(title, said=[f"not made: {error}"])
        self.sections.append(section)
        HEARD.get()(section)
        return section

    def rows(self, title: str) -> list[dict[str, Any]]:
        return next((section.rows for section in self.sections if section.title == title), [])


def _cost(question: Asked, known: inside.Written, draws: int) -> str:
    """What is about to run, in forward passes and seconds, before it runs."""
    n = len(question.ids)
    cuts = min(n - 1, read.CUT_WHOLLY)
    removals = causal.n_runs(known, draws, routed=inside.has_experts(question.model))
    passes = PASSES + 1 + cuts / 2 + removals
    return (
        f"{n} tokens; one run takes {question.seconds:.3g} s. About {PASSES} forward passes, {n - 1 + cuts} cuts of attention and up to {removals} "
        f"runs without parts, as rows of batches: about {max(1.0, passes * question.seconds):.0f} s at that rate"
    )


def _checked(
    question: Asked, told: Told, known: inside.Written, opened: list[Section], draws: int, seed: int
) -> dict[Part, float]:
    """Take the strongest parts away; what each cost."""
    found = [
        {parse_part(row[key]): row["logits"] for row in section.rows for key in ("neuron", "expert") if key in row}
        for section in opened
    ]
    chosen = causal.candidates(known, found)
    together, alone, lost = causal.checks(question, chosen, draws, seed)
    told.add(together.title, lambda: together)
    told.add(alone.title, lambda: alone)
    return lost


def _short(question: Asked, told: Told) -> list[str]:
    """The argument in a few sentences, from the numbers of the sections."""
    first = question.logits.softmax(0)
    answer, against = question.text(question.answer), question.text(question.against)
    said = [
        f"{answer} has {100 * float(first[question.answer]):.3g} %, {against} {100 * float(first[question.against]):.3g} %: "
        f"{question.difference:.3g} logits between them"
    ]
    columns = ("cut from all", "cut from the last", "gradient x input")
    tokens = [(row, next((row[c] for c in columns if row.get(c) is not None), None)) for row in told.rows("tokens")[:3]]
    named = [f"{row['token']} at {row['position']} ({value:.3g})" for row, value in tokens if value is not None]
    cut = any(row.get(c) is not None for row in told.rows("tokens") for c in columns[:2])
    said += (
        [
            f"tokens that matter most, and {'what is lost without attention to them' if cut else 'gradient x input'}: {', '.join(named)}"
        ]
        if named
        else []
    )
    writers = [f"{row['part']} ({row['logits']:.3g})" for row in told.rows("parts")[:4]]
    said += [f"written most by {', '.join(writers)}"] if writers else []
    for row in told.rows("causal check"):
        said.append(
            f"without {row['without']} the difference is {question.difference - row['lost']:.3g}; without as many random "
            f"{row['kind'].split()[0]} {question.difference - row['highest']:.3g} to {question.difference - row['lowest']:.3g}, p = {row['p']:.3g}"
            + (f" (of {row['sets']} sets, at least {1 / (1 + row['sets']):.2g})" if row["sets"] < TELLING else "")
        )
    return said


def _result(told: Told, known: inside.Written, lost: dict[Part, float]) -> Result:
    """Every section's numbers as one Result, its tables in their order."""
    cost = torch.tensor([lost.get(part, float("nan")) for part in known.parts], dtype=torch.float64)
    values: dict[str, Any] = {
        "attribution": (known.logits, ("part",), "logits"),
        "lost": (cost, ("part",), "logits"),
        "difference": (told.question.difference, (), "logits"),
    }
    coords: dict[str, Any] = {}
    for section in told.sections:
        values |= section.values
        coords |= section.coords
    titles = [section.title for section in told.sections]
    return Result(
        values,
        parts=known.parts,
        coords=coords,
        tables={section.title: section.rows for section in told.sections},
        notes=[f"{section.title}: {line}" for section in told.sections for line in section.said],
        shown=titles,
    )
