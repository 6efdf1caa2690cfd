"""Claims shown on networks that are taught a task whose truth is known (`tiny.automata`, `tiny.ciphers`, `tiny.clones`, `tiny.feedback`), anew for each seed.

The model at hand has no part in them; untrained networks of the task's own form, and the twin that was trained as long another way, stand in each claim itself.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Check, Claim, claim
from patchbay.papers.claims._shared import LEVEL, N, over_sets, unrelated

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from patchbay.model.model import Model

INSIDE, OUTSIDE = (0, 1, 2, 3), (5, 8, 11, 15)  # components of a state that feedback teaches, and others
DRAWN = 60  # draws of heads


def _once(measure: Callable[[int], Claim]) -> Check:
    """A check without the model at hand, made once for each seed: in the place of an untrained network it gives the same number."""
    kept = functools.cache(measure)

    def check(model: Model, seed: int) -> Claim:
        return kept(seed)

    check.__doc__ = measure.__doc__
    return check


@claim("akyurek2024", "made", seeds=TRAINED)
@_once
def akyurek2024(seed: int) -> Claim:
    """Confirmed if a network with n-gram layers in the place of a block comes nearer to automata it never met than one with the block, after the same steps. What the
    two heads of the latter that look most at what followed the last token before cost its answers, beside random heads, is told beside it."""
    from patchbay import maths
    from patchbay.tiny import automata

    built, plain = automata.train("ngram", seed=seed), automata.train("plain", seed=seed)
    one, other = automata.judge(built, seed=seed), automata.judge(plain, seed=seed)
    raw = automata.judge(automata.network("plain", seed), seed=seed)
    heads, found = _heads_of(plain, seed)
    value, low, high = maths.paired_interval(other.distance, one.distance)[:3]
    text = (
        f"of automata never met, n-gram layers and one block come within a distance of {_m(one.distance):.2f} of the truth ({_m(one.valid):.0%} of symbols valid; {_m(one.apart[2]):.2f} "
        f"from counting two back), two blocks within {_m(other.distance):.2f} ({_m(other.valid):.0%}; {_m(other.apart[2]):.2f}), untrained ones within {_m(raw.distance):.2f}, counting after no token, one and two within "
        f"{', '.join(f'{_m(row):.2f}' for row in one.counted)}; without {' and '.join(map(str, heads))} two blocks lose {float(found['joint']):.2f} logits, without two random heads "
        f"{float(found['random'].mean()):.2f} (p = {float(found['p']):.2g})"
    )
    return Claim(text, value, low, high, 0.0, "of total variation")


def _heads_of(plain: Model, seed: int) -> tuple[list[Any], Any]:
    """The two heads that look most at what followed the last token, and what is lost without them on other streams."""
    from patchbay.corpus import automata as langs
    from patchbay.tiny import automata

    read, told = (automata.streams(N, -100 - 2 * seed - at) for at in (0, 1))
    heads = pb.find.ngram_heads(plain, [ids for _, ids in read], order=1).top(2)
    prompts, right, wrong = [], [], []
    for made, ids in told:
        true = langs.following(made, ids)
        at = next(i for i in range(automata.LENGTH - 2, 0, -1) if ids[i + 1] != langs.SEPARATOR)
        prompts.append(tuple(ids[: at + 1]))
        right.append(ids[at + 1])
        wrong.append(tuple(s for s in range(langs.SYMBOLS) if not true[at][s]))
    task = pb.Task("automata", tuple(prompts), tuple(right), tuple(wrong))
    return heads, pb.prove.ablation(plain, task, heads, draws=DRAWN, seed=seed)


@claim("zhang2025c", "made", seeds=TRAINED)
@_once
def zhang2025c(seed: int) -> Claim:
    """Confirmed if tuning one layer on half of the words, all as often, deciphers more of the other half than the same steps of that layer on the rows that were read
    before, of the same half, by their frequency and with texts among them; mean over the layers, since each of them works."""
    import torch

    from patchbay import maths
    from patchbay.tiny import ciphers

    network, chance = ciphers.train(seed=seed), ciphers.chances(seed).log()
    order = torch.randperm(ciphers.WORDS, generator=torch.Generator().manual_seed(seed))
    some, rest = order[: ciphers.WORDS // 2], order[ciphers.WORDS // 2 :]
    before = ciphers.right(network, rest)
    tuned, further = (
        torch.stack(
            [ciphers.right(ciphers.tuned(network, some, layer, evenly=evenly, seed=seed), rest) for layer in range(3)]
        )
        for evenly in (True, False)
    )  # each [layer, word]
    blank = ciphers.right(ciphers.tuned(ciphers.network(seed), some, 1, seed=seed), rest)
    rare = chance[rest] < chance[rest].median()
    gain = tuned.mean(0) - before
    text = (
        f"of words that tuning never read, {_m(before):.0%} are deciphered before (error with log frequency r {_r(1 - before, chance[rest]):.2f}) and {_each(tuned)} after layers 0, 1 and 2 alone were tuned "
        f"on other words (rare words gain {_m(gain[rare]):+.0%}, common ones {_m(gain[~rare]):+.0%}; r {_r(1 - tuned.mean(0), chance[rest]):.2f}), {_each(further)} after as many steps on the old rows, {_m(blank):.0%} "
        f"where nothing had been learned: {'every layer works, so which one holds the prior is not shown' if float((tuned.mean(1) - before.mean()).min()) > 0 else 'not every layer works'}"
    )
    return Claim(text, *maths.paired_interval(tuned.mean(0), further.mean(0))[:3], 0.0, "share of words")


@claim("zhong2024", "made", seeds=TRAINED)
@_once
def zhong2024(seed: int) -> Claim:
    """Confirmed if, where the next word is the minor language's and the last one is shared by both, the lens after the second of four layers says the dominant language's own words more than the lens of a
    network that read both alike says the first one's, on the same chains."""
    from patchbay.tiny import clones

    uneven, even, raw = (
        clones.train(clones.DOMINANT, seed=seed),
        clones.train(clones.EVEN, seed=seed),
        clones.network(2, seed),
    )
    groups = {"dominant": clones.own(0), "minor": clones.own(1)}

    def said(asked: Model, at: int) -> list[float]:
        prompts = clones.minor(N // 2, 1, at, law_of=seed)
        found = pb.find.latent_language(asked, prompts, groups, draws=1, seed=at)
        return [float(x) for x in found["probability"][1:, 0]]

    first, second = clones.pairs(N, 2, seed, law_of=seed)
    near = pb.find.language_similarity(uneven, first, {"minor": second}, draws=1, seed=seed)
    rows = [", ".join(f"{x:.2f}" for x in said(asked, seed)) for asked in (uneven, even, raw)]
    text = (
        f"where a minor language is asked, layers 1 to 4 say the dominant one's own words with {rows[0]}, those of a network that read both alike with {rows[1]}, those of an untrained one with {rows[2]}; states of "
        f"the two lie at a centred cosine of {min(near['centred'][1:, 0].tolist()):.2f} to {max(near['centred'][1:, 0].tolist()):.2f}"
    )
    return Claim(
        text,
        *over_sets(lambda at: said(uneven, at)[1] - said(even, at)[1], seed),
        0.0,
        "probability above the even twin",
    )


@claim("li2024", "made", seeds=TRAINED)
@_once
def li2024(seed: int) -> Claim:
    """Confirmed if, of eight languages of one law that one network read by shares that halve, the states of a text lie nearer to those of the most read language the more its own was read: by ranks,
    further than unrelated ranks would, while a network that read all alike ranks them no further than that. Last words are the languages' own, so that none are the same."""
    import torch

    from patchbay import maths
    from patchbay.tiny import clones

    many = len(clones.HALVING)
    asked = (
        clones.train(clones.HALVING, seed=seed),
        clones.train((1.0,) * many, seed=seed),
        clones.network(many, seed),
    )

    def near(which: int, at: int) -> Tensor:
        """Centred cosine of every other language's texts to the most read one's, mean over layers, most read first."""
        first, *others = clones.pairs(4 * N, many, at, law_of=seed)
        texts = {str(k): said for k, said in enumerate(others)}
        found = pb.find.language_similarity(asked[which], first, texts, draws=1, seed=at)
        centred = {row["language"]: row["centred"] for row in found.tables["ranking"]}
        return torch.tensor([centred[name] for name in texts])

    def ranked(which: int, at: int) -> float:
        return maths.spearman(near(which, at), torch.tensor(clones.HALVING[1:]))

    bound = unrelated(many - 1)
    value, low, high = over_sets(lambda at: ranked(0, at), seed)
    even, raw = (over_sets(lambda at, which=which: ranked(which, at), seed)[0] for which in (1, 2))  # type: ignore[misc]
    low = low if even <= bound else min(low, bound)
    told = ", ".join(f"{x:.2f}" for x in near(0, seed).tolist())
    text = (
        f"of languages read with a half, a quarter and so on of the most read one's share, states lie at a centred cosine of {told} to its states; the correlation of these ranks with shares is {value:.2f}, in a network "
        f"that read all alike {even:.2f}, in an untrained one {raw:.2f}"
    )
    return Claim(text, value, low, high, bound, "Spearman's correlation with shares")


@claim("jian2025", "made", seeds=TRAINED)
@_once
def jian2025(seed: int) -> Claim:
    """Confirmed if a network that learned axes of its states from examples reports axes within the span it was taught more often than axes without, though the same
    states carry both, and if `turn.neurofeedback` finds its report of the first axis beyond labels dealt at random."""
    import torch

    from patchbay import maths
    from patchbay.tiny import feedback

    taught, known = feedback.train(seed=seed), feedback.states(seed)

    def told(asked: Model, components: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Reports after 15 examples on words that were never read, and those of ridge regression, each [stream]."""
        generator = torch.Generator().manual_seed(seed + 10**6)
        along = torch.eye(feedback.STATE)[list(components)].repeat(N // 2, 1)
        ids = feedback.streams(known, along, generator, unread=True)
        return feedback.reports(asked, ids)[:, -1], feedback.ridge(known, ids, feedback.LENGTH - 1)

    (inside, ridge), (outside, ridge_too) = told(taught, INSIDE), told(taught, OUTSIDE)
    raw = told(feedback.network(seed), INSIDE)[0]
    words = range(feedback.WORDS - feedback.UNREAD, feedback.WORDS)
    labels = [int(known[word, 0] > 0) for word in words]
    knob = pb.turn.neurofeedback(
        taught, [[feedback.FIRST + word] for word in words], axis=labels, shots=(14,), marks=([0], [1]), seed=seed
    )
    report, control = knob.evidence["report"], knob.evidence["control"]
    value, low, high = maths.paired_interval(inside, outside)[:3]
    low = low if float(report["p"][-1]) <= LEVEL else min(low, 0.0)
    text = (
        f"after 15 examples axes within the {feedback.TOP} components that were taught are reported by {_m(inside):.0%} (ridge regression on the examples {_m(ridge):.0%}, an untrained network {_m(raw):.0%}), axes "
        f"without by {_m(outside):.0%} (ridge {_m(ridge_too):.0%}); neurofeedback's report of the first axis {float(report['accuracy'][-1]):.0%} (dealt labels {float(report['null_mean'][-1]):.0%}), its control d "
        f"{float(control['d'][-1]):+.2f} (p = {float(control['p'][-1]):.2g})"
    )
    return Claim(text, value, low, high, 0.0, "share of streams")


def _m(values: Tensor) -> float:
    return float(values.mean())


def _each(values: Tensor) -> str:
    return ", ".join(f"{_m(row):.0%}" for row in values)


def _r(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation; 0 where nothing varies."""
    import torch

    found = torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1]
    return float(found.nan_to_num())
