"""Claims about objectives and tuning: small networks are trained in pairs from weights drawn by the seed, five seeds each.

The model at hand has no part in most of them. What a paper shows on large models and people's text is asked here of its small analogue, which the function names before anything runs.
"""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model


# --- facts the other way round ------------------------------------------------------------------------

FACTS = 24


@claim("lv2023", "made", seeds=TRAINED)
def lv2023(model: Model, seed: int) -> Claim:
    """Confirmed if, of facts that were read one way alone, more are known the other way after masked tokens were filled from both sides than after
    plain training, by more than half of the facts (the paper's 70 % beside none)."""
    found = _filled(seed)
    shares = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 50,000 weights, facts read one way alone are known the other way by {shares['bico']:.0%} after tokens were filled from both sides and by "
        f"{shares['plain']:.0%} after plain training"
    )
    return Claim(text, *difference(found["bico"], found["plain"]), 0.5, "share of facts")


@functools.cache
def _filled(seed: int) -> dict[str, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    known = lab.facts(FACTS, seed)
    unread = known[FACTS // 2 :]
    start, mask = [0], lab.FACT_VOCAB  # every fact begins with a token of its own, so that its first name can be masked

    def right(tuned: Model) -> Tensor:
        logits = pb.run(tuned, [start + b + r for _, r, b in unread], logits="last").last_logits.cpu()
        return (logits.argmax(-1) == torch.tensor([a[0] for a, _, _ in unread])).double()

    documents = [[start, *fact] for fact in lab.read_one_way(known)]
    arms = {"bico": Arm(f"bico:mask={mask}"), "plain": Arm()}
    network = lab.small(lab.FACT_VOCAB + 1, width=48, mlp=96)
    return trained(network, documents, right, seed, arms, fresh=True, steps=400, batch_size=24)


# --- few numbers --------------------------------------------------------------------------------------

RATES = (1e-3, 4e-3, 1.6e-2)
RANK = 8


@claim("ponkshe2024", "made", seeds=TRAINED)
def ponkshe2024(model: Model, seed: int) -> Claim:
    """Confirmed if tuning of rank 8 in the bases of the first update leaves less loss than LoRA of the same rank, which learns more numbers; each
    at the best of three rates, chosen on other sentences. Told beside it: bases of the weights (LoRA-XS) and drawn ones."""
    from patchbay.train._low_rank import maps

    found = _few_numbers(seed)
    losses = {name: float(one.mean()) for name, one in found.items()}
    shapes = [one.weight.shape for one in maps(pb.load("tiny")).values()]
    more = sum(RANK * sum(shape) for shape in shapes) // (len(shapes) * RANK**2)
    text = (
        f"tuned for 30 steps to sentences read backwards, the model tiny is left with {losses['gradient']:.3f} nats a token in the bases of the first update, {losses['LoRA']:.3f} by LoRA, which learns {more} times the numbers; "
        f"{losses['weights']:.3f} in the bases of the weights, {losses['drawn']:.3f} in drawn ones, {losses['untuned']:.3f} before"
    )
    return Claim(text, *difference(found["LoRA"], found["gradient"]), 0.0, "nats per token")


@functools.cache
def _few_numbers(seed: int) -> dict[str, Tensor]:
    from patchbay.tiny import text
    from patchbay.train._objectives import objective
    from patchbay.train._plan import Arm

    model, rng = pb.load("tiny"), random.Random(f"sentences {seed}")
    said: dict[tuple[int, ...], None] = {}
    while len(said) < 320:
        for sentence in text.story(rng).text.split(".")[:-1]:
            ids = model._need_tokenizer()(sentence)["input_ids"]
            if len(ids) in range(9, 13):
                said[tuple(ids[::-1])] = None
    documents = [list(one) for one in said]
    held, aim = [[one] for one in documents[:80]], objective("ntp")

    def loss(tuned: Model) -> Tensor:
        return aim.scores(tuned, held)

    forms = {
        "gradient": "lora-sb:",
        "weights": "lora-sb:bases=weights,",
        "drawn": "lora-sb:bases=random,",
        "LoRA": "lora:",
    }
    arms = {name: Arm(optimizer=f"{form}rank={RANK}") for name, form in forms.items()}
    tried = [trained(model, documents[80:], loss, seed, arms, steps=30, batch_size=8, rate=rate) for rate in RATES]
    found = {}
    for name in forms:  # chosen on the even sentences, told of the odd ones
        best = min(tried, key=lambda one: float(one[name][::2].mean()))
        found[name] = best[name][1::2]
    return found | {"untuned": loss(model)[1::2]}


# --- labels -------------------------------------------------------------------------------------------


@claim("li2023", "made", seeds=TRAINED)
def li2023(model: Model, seed: int) -> Claim:
    """Confirmed if a token's label that the next token tells is found without the causal mask, and not with it, by more than 0.4 of the tokens, where
    chance is half. Told beside it: labels that the token before tells, which the causal model has to find."""
    found = _tagged(seed)
    shares = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 20,000 weights, labels that the next token tells are right by {shares['open']:.0%} without the causal mask and by {shares['causal']:.0%} with it "
        f"({shares['before']:.0%} where the token before tells)"
    )
    return Claim(text, *difference(found["open"], found["causal"]), 0.4, "share of tokens")


@functools.cache
def _tagged(seed: int) -> dict[str, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._objectives import objective
    from patchbay.train._objectives._objective import collated
    from patchbay.train._plan import Arm

    def documents(n: int, at: int, after: bool) -> list[list[list[int]]]:
        """Words 5..24 with a cue, 3 or 4, behind each or before it; labels: 0 or 1 of words by their cues, 2 of cues."""
        draw, made = random.Random(f"tags {at}"), []
        for _ in range(n):
            cues = [draw.randrange(2) for _ in range(5)]
            pairs = [((draw.randrange(5, 25), cue), (3 + cue, 2)) for cue in cues]
            both = [one for pair in pairs for one in (pair if after else pair[::-1])]
            made.append([[token for token, _ in both], [label for _, label in both]])
        return made

    text = "label-supervision:classes=0+1+2"
    found: dict[str, Tensor] = {}
    for name, open_, after in (("open", True, True), ("causal", False, True), ("before", False, False)):
        aim: Any = objective(f"{text},two_way=1" if open_ else text)
        held = documents(60, seed + 1000, after)

        def right(tuned: Model, aim: Any = aim, held: Any = held) -> Tensor:
            rows = collated([aim.row(one, random.Random(0)) for one in held])
            with torch.no_grad():
                said = aim.logits(tuned, tuned.hf, rows)[..., :3].argmax(-1)
            words = rows["labels"] < 2
            return ((said == rows["labels"]) & words).sum(1).double() / words.sum(1)

        arm = Arm(f"{text},two_way=1" if open_ else text)
        network = lab.small(25, layers=2, width=32, mlp=64)
        found |= trained(
            network, documents(1024, seed, after), right, seed, {name: arm}, fresh=True, steps=150, batch_size=16
        )
    return found


# --- rationales ---------------------------------------------------------------------------------------


@claim("wang2022b", "made", seeds=TRAINED)
def wang2022b(model: Model, seed: int) -> Claim:
    """Confirmed if, where a token of the question tells the answer as well as the rationale does, an answer that is smoothed away without its rationale loses more when the
    rationale is masked than a plainly trained one, by more than 0.3. Told beside it: where that token misleads."""
    found = _reasoned(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 20,000 weights, a masked rationale costs {told['pinto']:.0%} of the answers (plain training: {told['plain']:.0%}, the same target with the rationale as it stands: {told['null']:.0%}); where the "
        f"question misleads, {told['pinto misled']:.0%} are right (plain {told['plain misled']:.0%})"
    )
    return Claim(text, *difference(found["pinto"], found["plain"]), 0.3, "share of answers")


@functools.cache
def _reasoned(seed: int) -> dict[str, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    def documents(n: int, at: int, misled: bool = False) -> list[list[list[int]]]:
        """Question: a token that tells the answer (3, 4) and two of 9..24; rationale: two of 5..8, whose kinds say the answer together."""
        draw, made = random.Random(f"reasons {at}"), []
        for _ in range(n):
            one, two = draw.randrange(2), draw.randrange(2)
            answer = one ^ two
            question = [3 + (draw.randrange(2) if misled else answer), draw.randrange(9, 25), draw.randrange(9, 25)]
            made.append([question, [5 + one, 7 + two], [1 + answer], [2 - answer]])
        return made

    def asked(tuned: Model, some: Any, hide: bool) -> Tensor:
        prompts = [[*q, *([0] * len(r) if hide else r)] for q, r, *_ in some]
        logits = pb.run(tuned, prompts, logits="last").last_logits.cpu()
        return torch.stack(
            [torch.softmax(row[[y[0], z[0]]], 0)[0] for row, (_, _, y, z) in zip(logits, some, strict=True)]
        ).double()

    held, other = documents(80, seed + 1000), documents(80, seed + 2000, misled=True)

    def numbers(tuned: Model) -> Tensor:
        return torch.stack([asked(tuned, held, False) - asked(tuned, held, True), asked(tuned, other, False)])

    arms = {"pinto": Arm("pinto"), "plain": Arm("pinto:weight=0"), "null": Arm("pinto:share=0")}
    network = lab.small(25, layers=2, width=32, mlp=64)
    found = trained(network, documents(1024, seed), numbers, seed, arms, fresh=True, steps=150, batch_size=16)
    return {name: one[0] for name, one in found.items()} | {f"{name} misled": one[1] for name, one in found.items()}


# --- principles ---------------------------------------------------------------------------------------

STYLES, KIND = 4, 4  # principles, and tokens of the style of each


@claim("franken2024", "made", seeds=TRAINED)
def franken2024(model: Model, seed: int) -> Claim:
    """Confirmed if responses keep to their principle more often after the mutual information of principles and the model's own responses was raised than before. Told
    beside it: the likelihood of the same responses raised, and principles that were dealt to other responses."""
    found = _principled(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 30,000 weights that keep to a style in {told['before']:.0%} of their tokens (chance {1 / STYLES:.0%}), {told['sami']:.0%} do after principles and the network's own responses were told apart, {told['plain']:.0%} after the likelihood of "
        f"these responses was raised, and {told['shuffled']:.0%} where principles were dealt to others' responses"
    )
    return Claim(text, *difference(found["sami"], found["before"]), 0.0, "share of tokens")


@functools.cache
def _principled(seed: int) -> dict[str, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._objectives.fine_grained import drawn
    from patchbay.train._plan import Arm, plan_of
    from patchbay.train._runs import Lab, ended

    first, length = 13, 6  # tokens: 1..4 principles, 5..12 questions, then those of styles
    draw = random.Random(f"styles {seed}")

    def styled(c: int) -> list[int]:
        return [
            first + (KIND * c + draw.randrange(KIND) if draw.random() < 0.4 else draw.randrange(STYLES * KIND))
            for _ in range(length)
        ]

    texts: list[Any] = [[[1 + c, draw.randrange(5, 13), *styled(c)]] for c in range(STYLES) for _ in range(300)]
    network = lab.small(first + STYLES * KIND, layers=2, width=32, mlp=64)
    plan = plan_of({"held": 0.0, "fresh": True, "steps": 200, "batch_size": 24})
    base = ended(Lab(network, texts, texts, plan), Arm(), seed)
    questions = [5 + i % 8 for i in range(32)]
    said = drawn(
        base.hf, [[1 + c, x] for x in questions for c in range(STYLES)], length, range(len(questions) * STYLES)
    )
    documents = [
        [[x], *(unit for c in range(STYLES) for unit in ([1 + c], said[STYLES * i + c]))]
        for i, x in enumerate(questions)
    ]

    def kept(tuned: Model) -> Tensor:
        asked = [[1 + c, 5 + i % 8] for i in range(40) for c in range(STYLES)]
        answers = torch.tensor(drawn(tuned.hf, asked, length, range(10_000, 10_000 + len(asked))))
        right = torch.tensor([c for _ in range(40) for c in range(STYLES)])
        return ((answers - first) // KIND == right[:, None]).double().mean(1).view(40, STYLES).mean(1)

    arms = {"sami": Arm("sami"), "plain": Arm("sami:plain=1"), "shuffled": Arm("sami:shuffled=1")}
    return trained(base, documents, kept, seed, arms, steps=20, batch_size=8, rate=1e-3) | {"before": kept(base)}


# --- rewards ------------------------------------------------------------------------------------------


@claim("wu2023", "made", seeds=TRAINED)
def wu2023(model: Model, seed: int) -> Claim:
    """Confirmed if, after as many steps, rewards at the ends of segments have brought more reward than the same total at the end of an answer. Told beside it: the
    same rewards at segments that are drawn."""
    found = _rewarded(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 20,000 weights, an answer of 16 tokens is worth {told['own']:.2f} after 30 steps of REINFORCE on rewards of segments, {told['end']:.2f} on their total at its end, {told['random']:.2f} on the same rewards at "
        "drawn segments"
    )
    return Claim(text, *difference(found["own"], found["end"]), 0.0, "reward of an answer")


@functools.cache
def _rewarded(seed: int) -> dict[str, Tensor]:
    from patchbay.tiny import lab
    from patchbay.train._objectives import objective
    from patchbay.train._plan import Arm

    documents = [[[1 + i % 8], list(range(9, 12)), list(range(12, 18))] for i in range(64)]
    aim: Any = objective("fine-grained:weights=1/-0.5,segment=2")
    arms = {
        placed: Arm(f"fine-grained:weights=1/-0.5,segment=2,placed={placed}") for placed in ("own", "end", "random")
    }

    def worth(tuned: Model) -> Tensor:
        found: Tensor = -aim.scores(tuned, documents)
        return found

    network = lab.small(24, layers=1, width=32, mlp=64)
    return trained(network, documents, worth, seed, arms, fresh=True, steps=30, batch_size=16, rate=3e-3)
