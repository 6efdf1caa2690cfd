"""Claims about which tokens of a text are learned, in which order they come, and how many are held at a time; networks of the lab's own, five seeds each where they are trained.

The model at hand has no part in most of them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model


# --- spans moved behind the rest ----------------------------------------------------------------------


@claim("nijkamp2023", "made", seeds=TRAINED)
def nijkamp2023(model: Model, seed: int) -> Claim:
    """Confirmed if, after as many steps, plain documents are less likely where spans of half of the documents were moved behind the rest than where none were: that filling in is
    not free (the paper's second lesson). Told beside it: twice the steps, after which as many documents were read plain, and half of the documents read with a prefix that is seen both ways (its first
    lesson: not clearly better). Without these arms, after 150 steps in place of 110, all five seeds lay between 0.023 and 0.058 nats: confirmed; how long is trained decides here."""
    found = _infilled(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 50,000 weights, plain documents cost {told['half']:.3f} nats a token after half of the documents had a span moved behind the rest, and {told['plain']:.3f} after none had, at as many steps; "
        f"{told['twice']:.3f} after twice the steps, which read as many plain documents (plain training as long: {told['longer']:.3f}); {told['prefix']:.3f} where half of them had a prefix seen both ways"
    )
    return Claim(text, *difference(found["half"], found["plain"]), 0.0, "nats per token")


@functools.cache
def _infilled(seed: int) -> dict[str, Tensor]:
    from patchbay.tiny import lab
    from patchbay.train._objectives import objective
    from patchbay.train._plan import Arm

    held, aim = [[one] for one in lab.backcopies(80, seed + 1000)], objective("ntp")

    def loss(tuned: Model) -> Tensor:
        return aim.scores(tuned, held)

    vocab = 64 + 3  # the last are <sep>, <end> and <mask_0>
    half = f"infill:vocab={vocab}"
    arms = {"half": Arm(half), "plain": Arm(), "twice": Arm(half, longer=2.0), "longer": Arm(longer=2.0)}
    arms["prefix"] = Arm(f"{half},share=0,prefix=0.5")
    network = lab.small(vocab, width=48, mlp=96)
    return trained(network, lab.backcopies(1500, seed), loss, seed, arms, fresh=True, steps=110, batch_size=16)


# --- tokens that are hard -----------------------------------------------------------------------------

RARE = 0.25  # of the tokens that were read: those of the words that came least often


@claim("zhong2022", "made", seeds=TRAINED)
def zhong2022(model: Model, seed: int) -> Claim:
    """Confirmed if held-out stories are likelier after training on the hardest 30 % of the tokens of each batch, with targets softened by the network's own guess, than after plain training
    for as many steps. Told beside it: as many tokens drawn at random, and each on the words that came least often."""
    found = _evolved(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    rare = ", ".join(f"{told[f'{name} rare']:.2f}" for name in ("hardest", "plain", "random"))
    text = (
        f"in networks of 50,000 weights, stories cost {told['hardest']:.3f} nats a token after the hardest 30% of the tokens were learned, {told['plain']:.3f} after all were, {told['random']:.3f} after 30% drawn at "
        f"random; their rarest words {rare}"
    )
    return Claim(text, *difference(found["plain"], found["hardest"]), 0.0, "nats per token")


@functools.cache
def _evolved(seed: int) -> dict[str, Tensor]:
    from collections import Counter

    import torch

    from patchbay.corpus.diachronic import surprisals
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    tiny = pb.load("tiny")
    texts = lab.pieces(tiny, 2064, seed, range(12, 36))
    often = Counter(token for ids in texts[64:] for token in ids)
    total, rarest, seen = sum(often.values()), set[int](), 0
    for token, count in reversed(often.most_common()):
        seen += count
        if seen > RARE * total:
            break
        rarest.add(token)
    held = [ids for ids in texts[:64] if rarest & set(ids[1:])]

    def nats(tuned: Model) -> Tensor:
        """Of each text: all tokens, and its rarest words, [2, text]."""
        each = [surprisals(tuned, [ids]).flatten().double().cpu() for ids in held]
        few = [
            row[[i for i, token in enumerate(ids[1:]) if token in rarest]] for row, ids in zip(each, held, strict=True)
        ]
        return torch.stack([torch.stack([row.mean() for row in rows]) for rows in (each, few)])

    arms = {"hardest": Arm("self-evolution"), "plain": Arm(), "random": Arm("self-evolution:chosen=random")}
    network = lab.small(tiny.vocab_size, width=48, mlp=96)
    found = trained(network, texts[64:], nats, seed, arms, fresh=True, steps=100, batch_size=16, rate=4e-3)
    return {name: one[0] for name, one in found.items()} | {f"{name} rare": one[1] for name, one in found.items()}


# --- windows, and words without order ------------------------------------------------------------------


@claim("oliaro2024", "identity", "tiny-llama")
def oliaro2024(model: Model, seed: int) -> Claim:
    """Confirmed if the gradient of whole rows is what windows of 1, 4 and 16 tokens give, each with keys and values, and their slopes, alone of what lies before. Serving in the same batch, and
    throughput under load, are not asked."""
    import torch

    from patchbay import maths
    from patchbay.tiny import lab
    from patchbay.train import _windows
    from patchbay.train._copies import copied
    from patchbay.train._objectives import objective
    from patchbay.train._objectives._objective import collated, learned

    aim, tuned = objective("ntp"), copied(model)
    _windows.prove(tuned, aim, 1)
    batch = collated([(ids, ids) for ids in lab.pieces(pb.load("tiny-llama"), 4, seed, range(20, 33))])
    batch = {
        name: one.clamp(max=model.vocab_size - 1) if name != "attention_mask" else one for name, one in batch.items()
    }
    n, learn = learned(batch["labels"]), list(tuned.hf.parameters())

    def slope(window: int) -> Tensor:
        for one in learn:
            one.grad = None
            one.requires_grad_()
        with torch.enable_grad():
            if window:
                _windows.backward(tuned.hf, batch, n, window, torch.Tensor.backward)
            else:
                aim.loss(tuned, tuned.hf, batch, n).backward()
        return torch.cat([one.grad.flatten() for one in learn if one.grad is not None]).double()

    whole = slope(0)
    errors = torch.stack([(slope(window) - whole).abs().max() / whole.abs().max() for window in (1, 4, 16)])
    text = "rows trained by windows of 1, 4 and 16 tokens have the gradient of rows trained whole"
    return Claim(text, *maths.bootstrap_interval(errors)[:3], 1e-4, "relative error", above=False)


@claim("gupta2018", "made", seeds=TRAINED)
def gupta2018(model: Model, seed: int) -> Claim:
    """Confirmed if documents of topics cost a small network less when it was trained with a bag of its prefix beside its logits than with a bag of another document's prefix, which has as many weights.
    Told beside it: the network alone. Topics that people would name are not asked."""
    found = _bagged(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 30,000 weights, documents of eight topics cost {told['bag']:.3f} nats a token with a bag of the words before, {told['other']:.3f} with a bag of another document's, {told['none']:.3f} "
        f"without one"
    )
    return Claim(text, *difference(found["other"], found["bag"]), 0.0, "nats per token")


@functools.cache
def _bagged(seed: int) -> dict[str, Tensor]:
    import torch

    from patchbay.blocks.prefix_bag import PrefixBag
    from patchbay.results.method import seeded
    from patchbay.tiny import lab

    texts = _topics(1088, seed)
    held, found = texts[:64], {}
    for name in ("bag", "other", "none"):
        hf: Any = lab.small(64, layers=1, width=32, mlp=64, seed=seed).hf
        with seeded(seed):
            bag = PrefixBag(64, 16)
        draw = torch.Generator().manual_seed(seed)

        def nats(ids: Tensor, hf: Any = hf, bag: PrefixBag = bag, name: str = name) -> Tensor:
            """Mean - log p of a token of each document; another's bag is that of the document before."""
            logits = hf(ids, use_cache=False).logits[:, :-1]
            if name != "none":
                logits = logits + bag(ids if name == "bag" else ids.roll(1, 0))[:, 1:]
            return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

        def loss(_: Any, step: int, draw: Any = draw, nats: Any = nats) -> Tensor:
            rows: Tensor = nats(texts[64:][torch.randint(1024, (16,), generator=draw)])
            return rows.mean()

        learn = [*hf.parameters(), *(bag.parameters() if name != "none" else [])]
        for one in learn:
            one.requires_grad_()
        with torch.enable_grad():
            lab.steps_of(hf, loss, 150, of=learn)
        with torch.no_grad():
            found[name] = nats(held).double()
    return found


def _topics(n: int, seed: int) -> Tensor:
    """Documents [n, 32] of a topic each: half of the words are among eight of the topic, the others follow the last one by the chances of one language."""
    import torch

    language = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) ** 6
    draw = torch.Generator().manual_seed(seed)
    topic = torch.randint(8, (n,), generator=draw)
    words = [torch.randint(64, (n,), generator=draw)]
    for _ in range(31):
        own = 8 * topic + torch.randint(8, (n,), generator=draw)
        follows = torch.multinomial(language[words[-1]], 1, generator=draw)[:, 0]
        words.append(torch.where(torch.rand(n, generator=draw) < 0.5, own, follows))
    return torch.stack(words, 1)


# --- strings that were read often ---------------------------------------------------------------------

PRUNED = 0.1  # of the neurons of each layer


@claim("chavhan2024", "made", seeds=TRAINED)
def chavhan2024(model: Model, seed: int) -> Claim:
    """Confirmed if strings that a network memorised are continued worse without the tenth of each layer's neurons that write more on other memorised strings than on fresh ones than without as many drawn
    neurons. The paper's strings are prompts, and its networks paint."""
    found = _memorised(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of 50,000 weights, strings that were read thirty times are continued right in {told['whole']:.0%} of the tokens, in {told['located']:.0%} without the neurons that write more on eight others, in {told['drawn']:.0%} "
        f"without as many drawn ones; strings that repeat within a text in {told['other']:.0%}, {told['other located']:.0%} and {told['other drawn']:.0%}"
    )
    return Claim(text, *difference(found["drawn"], found["located"]), 0.0, "share of tokens")


@functools.cache
def _memorised(seed: int) -> dict[str, Tensor]:
    import random

    import torch

    from patchbay.blocks import subnetworks
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    rng = random.Random(f"often {seed}")
    strings, fresh = ([[rng.randrange(24) for _ in range(16)] for _ in range(n)] for n in (16, 32))
    repeats = {"vocab": 24, "length": 16, "least": 4, "most": 4}
    data = [*strings * 30, *lab.repeats(720, seed, **repeats)]
    held = lab.repeats(24, seed + 1000, **repeats)

    def right(tuned: Model, texts: Any, start: int, cut: Any) -> Tensor:
        said = pb.run(tuned, texts, edits=cut).logits.cpu()[:, start - 1 : -1].argmax(-1)
        return (said == torch.tensor(texts)[:, start:]).double().mean(1)

    def numbers(tuned: Model) -> Tensor:
        """Of strings and of other texts: as it is, without located neurons, and without drawn ones; [way, 3, text]."""
        writes = [subnetworks.written(tuned, texts) for texts in (strings[:8], fresh)]
        more = [one - other for one, other in zip(*writes, strict=True)]
        n = round(PRUNED * len(more[0]))
        draw = torch.Generator().manual_seed(seed)
        sets = [[layer.topk(n).indices for layer in more]]
        sets += [[torch.randperm(len(layer), generator=draw)[:n] for layer in more] for _ in range(20)]
        cuts: list[Any] = [[]] + [[pb.zero(pb.Port("mlp.act", layer, int(i))) for layer, some in enumerate(one) for i in some] for one in sets]  # fmt: skip
        found = []
        for texts, start in ((strings[8:], 4), (held, 8)):
            each = [right(tuned, texts, start, cut) for cut in cuts]
            found.append(torch.stack([each[0], each[1], torch.stack(each[2:]).mean(0)])[:, :8])
        return torch.stack(found)

    network = lab.small(24, width=48, mlp=96)
    seen = trained(network, data, numbers, seed, {"one": Arm()}, fresh=True, steps=220, batch_size=16)["one"]
    names = ("whole", "located", "drawn")
    return {name: seen[0, i] for i, name in enumerate(names)} | {f"other {name}" if i else "other": seen[1, i] for i, name in enumerate(names)}  # fmt: skip
