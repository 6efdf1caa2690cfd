"""Claims about texts: what a size learns of them, what a tokenizer tells, what copies teach, what another vocabulary or time does to small networks.

Where networks are trained they are the lab's own, from weights drawn by the seed, and the model at hand has no part.
"""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims._shared import at_part
from patchbay.papers.claims.training import alone, difference, trained

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model

VOCAB = 24  # tokens of one language of the lab's own


# --- texts --------------------------------------------------------------------------------------------


WIDTHS = (8, 24, 64)
OPENINGS, STORIES, STEPS = 24, 1600, 100


@claim("eldan2023", "made", seeds=TRAINED)
def eldan2023(model: Model, seed: int) -> Claim:
    """Confirmed if, of the sentences that networks of two layers add to openings of stories, drawn at temperature 1, more parse in the stories' grammar where a network is
    largest than where it is smallest, after as many steps on the same stories, by more than 0.3 of the sentences. Told beside it for every size: those that
    speak of the two people of the opening, too; and the model at hand, which was trained for longer."""
    curve = _by_size(seed)
    own = _continued(model, seed).mean(1).tolist()
    said = ", ".join(
        f"{n:,} weights {float(found[1].mean()):.0%} ({float(found[0].mean()):.0%} keep their people)"
        for n, found in curve.items()
    )
    text = f"of the sentences that follow an opening, more parse the larger a network is, after {STEPS} steps: {said}; the model at hand {own[1]:.0%} ({own[0]:.0%}), stories of the grammar itself 100%"
    found = list(curve.values())
    return Claim(text, *difference(found[-1][1], found[0][1]), 0.3, "share of sentences")


@functools.cache
def _by_size(seed: int) -> dict[int, Tensor]:
    """Number of weights -> what networks of that size write [grade or parse, opening], smallest first."""
    from patchbay.corpus import stories
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    tiny = pb.load("tiny")
    data = tiny.encode(list(stories.texts(STORIES, seed=seed + 1)))
    found = {}
    for width in WIDTHS:
        network = lab.small(tiny.vocab_size, width=width, heads=max(2, width // 16), mlp=2 * width, tied=True)
        n = sum(p.numel() for p in network.hf.parameters())
        found[n] = alone(
            network,
            data,
            lambda tuned: _continued(pb.load(tuned.hf, tiny.tokenizer), seed),
            seed,
            Arm(),
            steps=STEPS,
            batch_size=16,
            length=64,
            rate=4e-3,
        )
    return found


def _continued(model: Model, seed: int) -> Tensor:
    """Of each opening, the share of the sentences that the model adds that parse and speak of its two people, and that parse: float64 [2, opening]."""
    import torch

    from patchbay.corpus import stories
    from patchbay.model.source import quietly
    from patchbay.results.method import seeded

    openings = [text[: text.index(".") + 1] for text in stories.texts(OPENINGS, seed=seed)]
    with seeded(seed), quietly():
        told = model.generate(openings, 40, do_sample=True, temperature=1.0, new_only=True, eos_token_id=None)
    rights = torch.zeros(2, len(openings), dtype=torch.float64)
    for i, (opening, text) in enumerate(zip(openings, told, strict=True)):
        whole = opening + text[: text.rfind(".") + 1]
        added = stories.parse(whole)[1:]
        if added:
            rights[0, i] = (stories.grade(whole) * (len(added) + 1) - 1) / len(added)
            rights[1, i] = sum(one is not None for one in added) / len(added)
    return rights


@claim("hayase2024", "made", seeds=TRAINED)
def hayase2024(model: Model, seed: int) -> Claim:
    """Confirmed if the shares of three kinds of text in what a byte-pair tokenizer was trained on, inferred from its merges and other texts of these kinds,
    are nearer to the truth than even shares, by more than a factor of ten in squared error."""
    import math

    import torch

    from patchbay import maths
    from patchbay.corpus import mixture

    found, slack = [], []
    for at in range(6):
        rng = random.Random(f"mixture {seed} {at}")
        often = [rng.randint(1, 9) for _ in range(3)]
        if len(set(often)) == 1:
            often[0] += 1
        samples = [[_kind(kind, at + 10 * other, seed) for kind in range(3)] for other in (0, 1)]
        made = _tokenizer([text for some, n in zip(samples[0], often, strict=True) for text in some * n])
        pairs = [
            n * sum(len(word) - 1 for text in some for word in text.split())
            for some, n in zip(samples[0], often, strict=True)
        ]
        truth = [one / sum(pairs) for one in pairs]
        told = mixture.infer(made, dict(zip("abc", samples[1], strict=True)), merges=60, competitors=6)
        off = sum((a - b) ** 2 for a, b in zip(told.shares.values(), truth, strict=True))
        found.append(math.log10(off / sum((1 / 3 - b) ** 2 for b in truth)))
        slack.append(told.slack / told.shuffled)
    text = (
        f"shares of three kinds of text come back from a tokenizer's merges with a squared error of 10 to the {sum(found) / 6:.2g} of even shares' "
        f"(merges in another order leave {6 / sum(slack):.0f} times the slack)"
    )
    return Claim(text, *maths.bootstrap_interval(torch.tensor(found))[:3], -1.0, "log10 of squared errors", above=False)


def _kind(kind: int, draw: int, seed: int) -> list[str]:
    """Texts of made-up words over six letters, four of which another kind has too."""
    letters, words = "abcdefghij"[2 * kind : 2 * kind + 6], random.Random(f"words {kind}")
    listed = ["".join(words.choices(letters, k=words.randint(2, 7))) for _ in range(60)]
    rng = random.Random(f"texts {kind} {draw} {seed}")
    return [" ".join(rng.choices(listed, [1 / (i + 1) for i in range(60)], k=12)) for _ in range(60)]


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    return made


@claim("soldaini2024", "made", seeds=TRAINED)
def soldaini2024(model: Model, seed: int) -> Claim:
    """Confirmed if a network repeats more tokens of strings that its corpus held forty times than of the same strings after copies were dropped, at equal steps,
    by more than 0.3 of the tokens."""
    one, other = _copies(seed)
    text = (
        f"of strings that stood in the corpus forty times, a network goes on with {float(one.mean()):.0%} of the tokens right, and with "
        f"{float(other.mean()):.0%} where copies were dropped"
    )
    return Claim(text, *difference(one, other), 0.3, "share of tokens")


@functools.cache
def _copies(seed: int) -> tuple[Tensor, Tensor]:
    import torch

    from patchbay.corpus import dedup
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    rng = random.Random(f"copies {seed}")
    strings = [[rng.randrange(VOCAB) for _ in range(16)] for _ in range(1200)]
    often = strings[:8]
    said = [" ".join(map(str, ids)) for ids in (strings + often * 39)]
    corpora = [said, list(dedup.unique(said))]

    def right(tuned: Model) -> Tensor:
        likeliest = pb.run(tuned, often).logits.cpu()[:, 3:-1].argmax(-1)
        return (likeliest == torch.tensor(often)[:, 4:]).double().mean(1)

    network = lab.small(VOCAB, width=48, mlp=96)
    found = []
    for texts in corpora:
        data = [list(map(int, text.split())) for text in texts]
        found.append(alone(network, data, right, seed, Arm(), steps=220, batch_size=16))
    return found[0], found[1]


# --- vocabularies, times -------------------------------------------------------------------


@claim("remy2024", "mechanism", seeds=TRAINED)
def remy2024(model: Model, seed: int) -> Claim:
    """Confirmed if, under a vocabulary whose tokens are the model's own in another order, one in five of them aligned with a wrong one too, held-out stories cost less after 20 steps of
    training from rows of aligned tokens than from rows drawn at random. Told beside it: the same before a step, a network of new weights trained as long, a count of words,
    and what the head that repeats does under the new tokens."""
    found = _retokenized(model, seed)
    told = {name: float(one.mean()) for name, one in found["nats"].items()}
    head, own, there = found["head"]
    text = (
        f"under another vocabulary, a fifth of it aligned half wrong, stories take {told['aligned']:.2f} nats a token after 20 steps from rows of aligned tokens ({told['start']:.2f} before a step, {told['words']:.2f} by a "
        f"count of words), {told['drawn']:.2f} from rows drawn at random, {told['fresh']:.2f} from new weights; {head}, the head that repeats most, gives what followed {own:.2f} of its attention in the old tokens and "
        f"{there:.2f} in the new ones"
    )
    return Claim(text, *difference(found["nats"]["drawn"], found["nats"]["aligned"]), 0.0, "nats per token")


def _retokenized(model: Model, seed: int) -> dict[str, Any]:
    import math
    from collections import Counter

    import torch

    from patchbay.corpus import stories, transtokens
    from patchbay.corpus.diachronic import surprisals
    from patchbay.train._plan import Arm

    n = model.hf.get_input_embeddings().weight.shape[0]
    rng = random.Random(f"vocabulary {seed}")
    new_of = list(range(n))
    rng.shuffle(new_of)
    counts = {(new, old): 1.0 for old, new in enumerate(new_of)}
    for new in rng.sample(range(n), n // 5):
        wrong = rng.randrange(n)
        counts[new, wrong] = counts.get((new, wrong), 0.0) + 1.0
    moved = transtokens.transferred(model, counts, n)

    def said(texts: Any) -> list[list[int]]:
        return [[new_of[i] for i in ids] for ids in texts]

    held = said(model.encode(list(stories.texts(24, seed=seed))))
    data = said(model.encode(list(stories.texts(160, seed=seed + 1))))

    def loss(tuned: Model) -> Tensor:
        return torch.stack([surprisals(tuned, [ids]).mean() for ids in held])

    def after(name: str, **plan: float) -> Tensor:
        return trained(moved, data, loss, seed, {name: Arm()}, steps=20, batch_size=8, rate=1e-3, **plan)[name]

    often = Counter(token for ids in data for token in ids)
    total = sum(often.values()) + n
    words = torch.tensor([sum(-math.log((often[t] + 1) / total) for t in ids[1:]) / (len(ids) - 1) for ids in held])
    asked = [list(ids) for ids in pb.tasks.repeated_tokens(model, n=24, seed=seed).clean]
    heads = [pb.find.induction_heads(model, asked), pb.find.induction_heads(moved, said(asked))]
    head = heads[0].top(1)[0]
    return {
        "nats": {"start": loss(moved), "words": words, "aligned": after("aligned"), "drawn": after("drawn", redraw=True), "fresh": after("fresh", fresh=True)},
        "head": (head, *(at_part(one, "score", head) for one in heads)),
    }  # fmt: skip


@claim("fittschen2025", "made", seeds=TRAINED)
def fittschen2025(model: Model, seed: int) -> Claim:
    """Confirmed if, between two slices of a language of 24 words, six of which changed places in the later one, those six changed more by networks of each slice than
    the other words did, by more than half a nat."""
    import torch

    from patchbay import maths

    found = _slices(seed)
    rest = [one.change for one in found if one.token not in SWAPPED]
    gaps = [one.change - sum(rest) / len(rest) for one in found if one.token in SWAPPED]
    first = sum(one.token in SWAPPED for one in found[: len(gaps)])
    told = [one for one in found if one.q < 0.05]
    text = (
        f"words that changed places take {sum(gaps) / len(gaps):.2f} nats more under networks of the earlier slice than other words do; {first} of the {len(gaps)} largest "
        f"changes of {len(found)} words are theirs, and {sum(one.token in SWAPPED for one in told)} of {len(told)} words whose change is beyond what seeds do"
    )
    return Claim(text, *maths.bootstrap_interval(torch.tensor(gaps))[:3], 0.5, "nats")


SWAPPED = {9: 17, 17: 9, 7: 20, 20: 7, 11: 14, 14: 11}


@functools.cache
def _slices(seed: int) -> list[Any]:
    from patchbay.corpus import diachronic
    from patchbay.tiny import lab
    from patchbay.train._documents import read
    from patchbay.train._plan import Arm, plan_of
    from patchbay.train._runs import Lab, ended

    early, late = (
        lab.backcopies(1200, seed, length=16, vocab=VOCAB),
        lab.backcopies(1300, seed + 1, length=16, vocab=VOCAB),
    )
    late = [[SWAPPED.get(token, token) for token in ids] for ids in late]
    how, network = (
        plan_of({"fresh": True, "held": 0.0, "steps": 120, "length": 16}),
        lab.small(VOCAB, width=32, heads=2, mlp=64),
    )
    batteries = []
    for texts in (early, late[:1200]):
        parts = [read(network, texts[at : at + 400], 16) for at in (0, 400, 800)]  # nothing is read by two
        batteries.append([ended(Lab(network, part, part, how), Arm(), seed + at) for at, part in enumerate(parts)])
    return diachronic.changes(batteries[0], batteries[1], late[1200:], bands=2)


@claim("yi2024", "made", seeds=TRAINED)
def yi2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of facts that a network knew and lost when it was tuned to other facts, more is said again under a learned mask of what tuning changed than under a
    random one that keeps as many numbers, on facts that the mask was not learned on. The paper's is of refusals."""
    import torch

    from patchbay.tiny import lab
    from patchbay.train._documents import read
    from patchbay.train._plan import Arm, plan_of
    from patchbay.train._runs import Lab, ended
    from patchbay.train.subspace_fusion import _score, _shuffled, changes, fused, learned_mask

    known, later = (lab.facts(24, seed + 100 * at) for at in (0, 1))
    network = lab.small(lab.FACT_VOCAB, width=48, mlp=96)
    first, then = (
        plan_of({"fresh": at == 0, "held": 0.0, "steps": steps, "length": 8}) for at, steps in ((0, 300), (1, 40))
    )
    base = ended(Lab(network, (documents := read(network, known, 8)), documents, first), Arm(), seed)
    tuned = ended(Lab(base, (others := read(network, later, 8)), others, then), Arm(), seed)
    right: Any = [b[0] for _, _, b in known]
    wrong: Any = [[(one + 1) % lab.FACT_VOCAB] for one in right]
    prompts: Any = [a + r for a, r, _ in known]
    asked = pb.Task("facts", prompts, right, wrong).with_metric("log_probability")
    dev, test = asked.split(0.5, seed)
    tau = changes(base, tuned)
    logits, _ = learned_mask(base, tau, dev, 80, 0.1, seed)
    mask = {name: (one > 0).to(one.dtype) for name, one in logits.items()}
    own, lost, masked, drawn = (
        _score(one, test) for one in (base, tuned, fused(base, tau, mask), fused(base, tau, _shuffled(mask, tau, seed)))
    )
    text = (
        f"facts that a network knew (log-probability {float(own.mean()):.2f}) and lost by tuning ({float(lost.mean()):.2f}) are at {float(masked.mean()):.2f} under a learned "
        f"mask of what changed, at {float(drawn.mean()):.2f} under a random one"
    )
    return Claim(text, *difference(torch.as_tensor(masked), drawn), 0.0, "nats")
