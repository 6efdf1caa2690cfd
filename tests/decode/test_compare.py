"""Compare: measures of planted texts, by loops, and a source against itself."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.decode._telling import bleu, distinct, frontier, likeness, repeated, self_bleu
from patchbay.knobs.knob import Knob
from patchbay.tiny.twins import twin
from tests.decode.shared_stories import FIVE, stories
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 6


def near(found: float, expected: float) -> Any:
    return close(found, expected, of=1.0, dtype=torch.float32)


def model_of() -> pb.Model:
    return pb.load(twin("gpt2"))


def said(texts: list[list[int]]) -> pb.Result:
    """Texts as the Result of a decoder."""
    width = max(map(len, texts))
    tokens = torch.tensor([[text + [-1] * (width - len(text))] for text in texts])
    cost = {"calls": (7, (), "passes"), "fed": (70, (), "token positions")}
    return pb.Result({"tokens": (tokens, ("prompt", "draft", "position"), "token id"), **cost})


def test_planted() -> None:
    """Texts whose measures are known: one that repeats one token, one of different tokens, one that another prompt has word for word."""
    texts = [[7] * 6, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
    found = pb.decode.compare(model_of(), PROMPTS, {"planted": said(texts), "greedy": "greedy"}, max_new_tokens=NEW)
    assert close(
        found["prompt_diversity"][0],
        torch.tensor([(1 / 5) * (1 / 4) * (1 / 3), 1.0, 1.0], dtype=torch.float64),
        dtype=torch.float64,
    )
    assert close(found["prompt_distinct"][0], torch.tensor([1 / 5, 1.0, 1.0], dtype=torch.float64), dtype=torch.float64)
    assert close(found["prompt_self_bleu"][0], [0.0, 1.0, 1.0], dtype=torch.float64)
    assert found["prompt_length"][0].tolist() == [6.0, 6.0, 6.0]
    assert (float(found["calls"][0]), float(found["fed"][0])) == (7.0, 70.0)
    assert (float(found["calls"][1]), float(found["fed"][1])) == (2.0 * NEW, 11.0 + 3 * (NEW - 1))  # two lengths
    assert set(found.provenance["seconds"]) == {"planted", "greedy"}
    rows = found.tables["texts"]
    assert rows[0]["planted"] == "7 7 7 7 7 7"
    assert rows[1]["greedy"].count("|") == 1


def test_reference() -> None:
    """Likelihood by uncached runs, with the knob of a decoder out; the change and its interval by a bootstrap; BLEU and area by loops."""
    model = model_of()
    knob = Knob("turned", [pb.scale(pb.Part(1, "attn").port(), 1.0)], -3.0)
    found = pb.decode.compare(
        model,
        PROMPTS,
        {"greedy": "greedy", "knob": ["greedy", knob], "beam": "beam(beams=3, ends=[])"},
        max_new_tokens=NEW,
    )
    with model.edited(knob):
        turned = model.generate(PROMPTS, NEW, new_only=True)
    beams = pb.decode.beam(model, PROMPTS, beams=3, max_new_tokens=NEW, ends=[])
    for i, prompt in enumerate(PROMPTS):
        for row, texts in enumerate(([turned[i]], [t.tolist() for t in beams["tokens"][i]]), start=1):
            each = []
            for text in texts:
                with torch.no_grad():
                    law = torch.log_softmax(model.hf(torch.tensor([prompt + text])).logits[0].double(), -1)
                each.append(sum(float(law[len(prompt) - 1 + at, t]) for at, t in enumerate(text)) / len(text))
            assert close(found["prompt_likelihood"][row, i], sum(each) / len(each), of=10.0, dtype=torch.float32)
    gap = found["prompt_likelihood"][1] - found["prompt_likelihood"][0]
    assert close(found["likelihood_change"][1], gap.mean(), of=10.0, dtype=torch.float64)
    assert gap.min() <= found["likelihood_change_low"][1] < found["likelihood_change_high"][1] <= gap.max()
    a, others = [1, 2, 3, 9, 1, 2], [[1, 2, 3, 4], [9, 9, 1, 2, 7, 7, 7]]
    precisions = []
    for n in (1, 2, 3, 4):
        own = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
        refs = [[tuple(o[i : i + n]) for i in range(len(o) - n + 1)] for o in others]
        hits = sum(min(own.count(g), max(r.count(g) for r in refs)) for g in set(own))
        precisions.append(hits / len(own) if n == 1 else (hits + 1) / (len(own) + 1))
    short = math.exp(1 - 7 / 6)  # 7 is nearer to 6 than 4 is
    assert near(bleu(a, others), short * math.prod(precisions) ** 0.25)
    p, q, area = [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], 0.0
    curve = [(1.0, 0.0), (0.0, 1.0)]
    for step in range(1, 26):
        r = [step / 26 * x + (1 - step / 26) * y for x, y in zip(p, q, strict=True)]
        far = [sum(x * math.log(x / z) for x, z in zip(law, r, strict=True)) for law in (q, p)]
        curve.append((math.exp(-5 * far[0]), math.exp(-5 * far[1])))
    for (x, y), (x2, y2) in pairwise(sorted(curve)):
        area += (x2 - x) * (y + y2) / 2
    assert near(frontier(torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)), area)
    assert near(repeated([1, 2, 1, 2], 2), 1 / 3)
    assert distinct([[1, 2], [1, 2, 3]], 2) == 2 / 3


def test_null() -> None:
    """A decoder against itself changes nothing; references in a decoder's place are as like the references as these are; others are not."""
    model, chance = model_of(), torch.Generator().manual_seed(0)
    draw: Any = lambda low: torch.randint(low, low + 6, (40, 6), generator=chance).tolist()  # noqa: E731
    prompts, human, other = draw(10), draw(10), draw(60)  # of six tokens each
    found = pb.decode.compare(
        model, prompts, {"human": said(human), "other": said(other)}, references=human, max_new_tokens=6
    )
    assert found.coords["condition"] == ["human", "other", "references"]
    own, far, again = found["likeness"].tolist()
    assert near(own, again)
    assert far < float(found["null"].mean()) - 0.15, "texts of other tokens are far"
    assert found["null"].std() > 0
    assert found["likelihood_change"][[0, 2]].tolist() == [0.0, 0.0]
    assert near(frontier(torch.tensor([0.2, 0.8]), torch.tensor([0.2, 0.8])), 1.0)
    points = torch.randn(40, 5, generator=chance)
    assert likeness(points[:20], points[20:], 0) > likeness(points[:20], points[20:] + 4.0, 0) + 0.3
    assert all(map(math.isnan, self_bleu([[1, 2]])))


def test_a_batch_is_its_prompts_and_chance_is_by_prompt() -> None:
    model = model_of()
    decoders = ["generate(do_sample=True, top_p=0.9)", "superposed(drafts=2)"]
    whole = pb.decode.compare(model, PROMPTS, decoders, max_new_tokens=4)
    small = pb.decode.compare(model, PROMPTS, decoders, max_new_tokens=4, batch_size=1)
    assert close(whole["prompt_likelihood"], small["prompt_likelihood"], of=10.0, dtype=torch.float32)
    alone = pb.decode.compare(model, PROMPTS[1:2], decoders, max_new_tokens=4)
    assert close(whole["prompt_likelihood"][:, 1:2], alone["prompt_likelihood"], of=10.0, dtype=torch.float32)
    assert "self_bleu" not in alone
    seeds = [pb.decode.compare(model, PROMPTS, decoders[:1], max_new_tokens=4, seed=seed) for seed in (0, 1)]
    assert seeds[0].tables["texts"] != seeds[1].tables["texts"]


def test_stories_beside_what_a_person_wrote() -> None:
    """A trained model: text in, a judge of the same vocabulary, the row of a person."""
    model, judge = stories(), stories("gpt2-sp512-tinystories-0.28m")
    human = [
        ", there was a little girl who liked to play.",
        " went to the park.",
        " were very happy.",
        " it was warm.",
        " in the box.",
    ]
    found = pb.decode.compare(
        model, FIVE, ["greedy", "contrastive_search(k=4, ends=[])"], references=human, judge=judge, max_new_tokens=12
    )
    assert found["judge"].isfinite().all()
    assert found["likelihood"][0] == found["likelihood"].max(), "greedy text is the likeliest of these"
    assert found.tables["texts"][1]["references"].replace("|", "").endswith("went to the park.")
    assert "likeness to the references is measured from 16 prompts on, here are 5" in found.notes
    with pytest.raises(pb.PatchbayError, match="references: 4 for 5 prompts; one continuation of each"):
        pb.decode.compare(model, FIVE, ["greedy"], references=human[:4])


@pytest.mark.parametrize(
    ("decoders", "says"),
    [
        ([], "one or more, each under a name of its own"),
        (["greedy", "greedy"], "one or more, each under a name of its own"),
        (["beam(4)"], r"in 'beam\(4\)' options have no names"),
        (["beam(beams=4"], "is not written as a name with its options"),
        (["beem"], "this Patchbay has no method 'decode.beem'; decode has beam, "),
        ({"x": 3.0}, "x is a text, .text, knob. or the Result of a decoder"),
        ({"references": "greedy"}, "'references' is the row of the references"),
        ({"x": said([[1], [2]])}, "x has texts of 2 prompts, here are 3"),
        (["contrastive_decoding"], "missing a required argument: 'amateur'"),
    ],
)
def test_refusals(decoders: Any, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.compare(model_of(), PROMPTS, decoders, max_new_tokens=2)


def test_texts_of_other_prompts_are_not_those_of_these() -> None:
    """As many of them, and the same decoder: their likelihood after these prompts would be no decoder's."""
    model = model_of()
    other = [PROMPTS[0], [8, 6, 9], PROMPTS[2]]
    made = {"greedy": "greedy", "kept": pb.decode.beam(model, other, beams=2, max_new_tokens=2)}
    with pytest.raises(pb.PatchbayError, match="kept has texts of other prompts, the first of them prompt 1"):
        pb.decode.compare(model, PROMPTS, made, max_new_tokens=2)
    assert "kept" in pb.decode.compare(model, other, made, max_new_tokens=2).labels_of("condition")
