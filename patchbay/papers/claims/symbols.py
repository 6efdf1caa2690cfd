"""Claims about what networks find in texts without being told: the trees of sentences, and what symbols mean that have another name in every text."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims._grown import grown, nats, nats_by_frequency, said
from patchbay.papers.claims.training import difference

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model

# --- trees --------------------------------------------------------------------------------------------

WORDS, TREES = 11, 200


@claim("momen2024", "made", seeds=TRAINED)
def momen2024(model: Model, seed: int) -> Claim:
    """Confirmed if binary trees read off the patterns of one head, which other sentences chose, are nearer to those of the grammar than trees that branch to the right, by
    unlabelled F1. Told beside it: random trees, and the best head of a network that read the same words in no order. The paper's own parser, which is trained as a part
    of the network, is not."""
    own, shuffled = (_parsed(seed, ordered) for ordered in (True, False))
    right, middle, most = _without_heads(seed)
    text = (
        f"in networks of two layers, trees read off one head have an F1 of {float(own.mean()):.2f} with the grammar's, trees that branch to the right {float(right.mean()):.2f}, random ones {middle:.2f} "
        f"(97.5% of {TREES} draws below {most:.2f}), and a head of a network that read words in no order {float(shuffled.mean()):.2f}"
    )
    return Claim(text, *difference(own, right), 0.0, "F1")


@functools.cache
def _sentences(seed: int) -> list[Any]:
    from patchbay.tiny import lab

    return lab.phrases(96, seed + 1000)


@functools.cache
def _parsed(seed: int, ordered: bool) -> Tensor:
    """F1 by held-out sentence of the head that half of them chose, on the other half."""
    import random

    import torch

    from patchbay.blocks import trees
    from patchbay.tiny import lab

    texts = [ids for ids, _ in lab.phrases(4096, seed)]
    if not ordered:
        rng = random.Random(f"no order {seed}")
        texts = [[0, *rng.sample(ids[1:], WORDS)] for ids in texts]
    tuned = pb.load(grown(lab.small(19, width=48, mlp=96), texts, {}, seed, steps=200, rate=5e-3))
    held = _sentences(seed)
    ports = [pb.Port("attn.pattern", layer) for layer in range(tuned.n_layers)]
    trace = pb.run(tuned, [ids for ids, _ in held], taps=ports, logits="last")
    patterns = torch.cat([trace[port][..., 1:, :].float().cpu() for port in ports], 1)  # [text, head, word, key]
    scores = torch.tensor(
        [
            [trees.f1(trees.splits(head), gold, WORDS) for head in trees.of_pattern(text)]
            for text, (_, gold) in zip(patterns, held, strict=True)
        ],
        dtype=torch.float64,
    )
    return _chosen(scores)


def _chosen(scores: Tensor) -> Tensor:
    """Of scores [text, head] those of the head that is best on the first half, on the second half."""
    half = len(scores) // 2
    return scores[half:, int(scores[:half].mean(0).argmax())]


def _without_heads(seed: int) -> tuple[Tensor, float, float]:
    """F1 of trees that branch to the right, by sentence; the mean of random trees', and what means over sentences of one draw each stay below in 97.5 %."""
    import torch

    from patchbay.blocks import trees

    golds = [gold for _, gold in _sentences(seed)[len(_sentences(seed)) // 2 :]]
    right = torch.tensor([trees.f1(trees.right_branching(WORDS), gold, WORDS) for gold in golds], dtype=torch.float64)
    drawn = torch.tensor(
        [
            sum(trees.f1(trees.random_tree(WORDS, 1000 * at + i), gold, WORDS) for i, gold in enumerate(golds))
            / len(golds)
            for at in range(TREES)
        ]
    )
    return right, float(drawn.mean()), float(drawn.quantile(0.975))


# --- symbols with another name in every text ----------------------------------------------------------

TEXTS, LENGTH, END = (
    1536,
    48,
    12,
)  # texts that are trained on, characters of a text, and of its beginning and its end that are compared
FRESH: dict[str, Any] = {"convolution": 3, "lexinvariant": True}


@claim("huang2023", "made", seeds=TRAINED)
def huang2023(model: Model, seed: int) -> Claim:
    """Confirmed if what fresh embeddings for every text cost beside an ordinary network of the same form falls from the first twelve characters of a text to the last twelve by
    more than it does in shuffled characters, of which only frequencies can be learned. Told beside it: both costs, and that of the
    ordinary network where the characters of each text have other names."""
    cost = {
        name: _characters(seed, *arm)
        for name, arm in {"fresh": (True, False), "fixed": (False, False), "shuffled": (True, True)}.items()
    }
    gap, null = cost["fresh"] - cost["fixed"][:, :2], cost["shuffled"] - _frequencies(seed)
    (first, last), renamed = gap.mean(0).tolist(), float(cost["fixed"][:, 3].mean())
    text = (
        f"in networks of two layers, embeddings drawn for every text cost {first:.2f} nats a character more than fixed ones in its beginning and {last:.2f} in its end (shuffled characters, beyond their frequencies: "
        f"{float(null[:, 0].mean()):.2f} and {float(null[:, 1].mean()):.2f}); under other names the end costs the ordinary network {renamed:.2f} nats and the other one {float(cost['fresh'][:, 1].mean()):.2f}, as under the own ones"
    )
    return Claim(text, *difference(gap[:, 0] - gap[:, 1], null[:, 0] - null[:, 1]), 0.0, "nats per character")


def _ends(costs: Tensor) -> Tensor:
    """Means over the beginning and the end of costs [text, position], [text, 2]."""
    import torch

    return torch.stack([costs[:, :END].mean(1), costs[:, -END:].mean(1)], 1)


@functools.cache
def _stretches(seed: int, shuffled: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Texts that are trained on, and held-out ones; of the shuffled ones each has its characters in an order drawn for it."""
    import random

    from patchbay.tiny import lab

    rng = random.Random(f"characters {seed}")
    found = [lab.characters(n, at, LENGTH) for n, at in ((TEXTS, seed), (96, seed + 1000))]
    one, other = ([rng.sample(ids, LENGTH) for ids in some] if shuffled else some for some in found)
    return one, other


@functools.cache
def _characters(seed: int, fresh: bool, shuffled: bool) -> Tensor:
    """Nats per character in the beginning and the end of held-out texts, [text, 2]; of an ordinary network, the same behind it for texts whose characters have other names."""
    import random

    import torch

    from patchbay.blocks import lexinvariant
    from patchbay.tiny import lab

    texts, held = _stretches(seed, shuffled)
    vocab = len(lab.ALPHABET)
    blocks = FRESH if fresh else {name: value for name, value in FRESH.items() if name != "lexinvariant"}
    hf = grown(lab.small(vocab, width=48, mlp=96, tied=True), texts, blocks, seed, steps=200, rate=5e-3)
    if fresh:
        ids = torch.tensor(held)
        with torch.no_grad():
            logits = lexinvariant.logits(hf, ids, lexinvariant.tables(ids, vocab, hf.config.hidden_size))
        return _ends(nats(logits, held))
    rng = random.Random(f"names {seed}")
    renamed = [[names[one] for one in ids] for ids in held for names in [rng.sample(range(vocab), vocab)]]
    return torch.cat([_ends(nats(said(hf, some), some)) for some in (held, renamed)], 1)


def _frequencies(seed: int) -> Tensor:
    """What the shuffled held-out texts cost by the frequencies of characters in those trained on, [text, 2]."""
    import torch

    from patchbay.tiny import lab

    texts, held = _stretches(seed, True)
    return _ends(nats_by_frequency(torch.tensor(texts), held, len(lab.ALPHABET)))
