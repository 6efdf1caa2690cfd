"""Claims about blocks as they train: a network with another block beside its twin, and the arm that lacks what the paper claims.

Networks are of the lab's own, trained from weights drawn by the seed on the same texts in the same order, five seeds each; the model at hand has no part in them.
The identities that the blocks stand on are held by their tests. Rates and steps were chosen on the plain network alone.
"""

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


def _right(hf: Any, held: list[tuple[list[int], list[int]]]) -> Tensor:
    """The share of the told places of each text at which the likeliest token is the text's, [text]; texts of one length."""
    import torch

    likeliest = said(hf, [ids for ids, _ in held]).argmax(-1)
    shares = [
        sum(int(row[at - 1]) == ids[at] for at in places) / len(places)
        for row, (ids, places) in zip(likeliest, held, strict=True)
    ]
    return torch.tensor(shares, dtype=torch.float64)


# --- recall -------------------------------------------------------------------------------------------

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"convolution": 3},
    "gla": {"convolution": 3, "mixer": "gla"},
    "linear": {"convolution": 3, "mixer": {"kind": "gla", "decay": False}},
    "h3": {"mixer": "h3"},
    "lssl": {"mixer": "lssl"},
}


@functools.cache
def _recalled(seed: int, mixer: str) -> tuple[Tensor, Tensor]:
    """The share of values that are right where their key came before, by text, of a network of one layer: in texts as long as those trained on, with as many pairs; and
    in texts of four times the length and the pairs."""
    from patchbay.tiny import lab

    texts = [ids for ids, _ in lab.recalls(4096, seed, pairs=4, length=32)]
    network = lab.small(32, layers=1, width=48, mlp=1)
    hf = grown(network, texts, MIXERS[mixer], seed, steps=300, rate=1e-2)
    one, other = (_right(hf, lab.recalls(64, seed + 1000, pairs=4 * n, length=32 * n)) for n in (1, 4))
    return one, other


def _shares(seed: int, names: tuple[str, ...], longer: int) -> dict[str, float]:
    return {name: float(_recalled(seed, name)[longer].mean()) for name in names}


@claim("yang2023", "made", seeds=TRAINED)
def yang2023(model: Model, seed: int) -> Claim:
    """Confirmed if, in texts of four times the length and the pairs that were trained on, gated linear attention recalls more values than the same layer without its decay. Told
    beside it: softmax attention, and texts as long as those trained on. Queries, keys and values of all three are convolved."""
    names = ("gla", "linear", "attention")
    near, far = (_shares(seed, names, longer) for longer in (0, 1))
    text = (
        f"in networks of one layer, gated linear attention recalls {far['gla']:.0%} of the values in texts four times as long as those trained on, {far['linear']:.0%} without decay and softmax attention "
        f"{far['attention']:.0%} (as long as those: {near['gla']:.0%}, {near['linear']:.0%}, {near['attention']:.0%}; chance 6%)"
    )
    return Claim(text, *difference(_recalled(seed, "gla")[1], _recalled(seed, "linear")[1]), 0.0, "share of values")


@claim("fu2022", "made", seeds=TRAINED)
def fu2022(model: Model, seed: int) -> Claim:
    """Confirmed if H3 recalls more values than a linear state space, which cannot compare contents, by more than 0.3 of them. Told beside it: convolved attention, which the
    paper matches."""
    found = _shares(seed, ("h3", "lssl", "attention"), 0)
    text = (
        f"in networks of one layer, H3 recalls {found['h3']:.0%} of the values whose key came before, a linear state space {found['lssl']:.0%}, and softmax attention {found['attention']:.0%} "
        "(one of the text's own: 25%)"
    )
    return Claim(text, *difference(_recalled(seed, "h3")[0], _recalled(seed, "lssl")[0]), 0.3, "share of values")


# --- meta-tokens --------------------------------------------------------------------------------------

META = 32
META_ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "meta": (3, {"convolution": 3, "meta_tokens": {"id": META, "layers": [1]}}),
    "open": (3, {"convolution": 3, "meta_tokens": {"id": META, "layers": [1], "masked": False}}),
    "without": (2, {"convolution": 3}),
    "plain": (2, {"convolution": 3}),
}


@claim("shah2025", "made", seeds=TRAINED)
def shah2025(model: Model, seed: int) -> Claim:
    """Confirmed if, at twice the length and the pairs that were trained on, a network with a layer in which only meta-tokens see one another recalls more values than one whose
    layer is open to all tokens, as dear and with the same texts. Told beside it: the texts without the layer, and no meta-tokens."""
    found = {name: _bookmarked(seed, name) for name in META_ARMS}
    told = {name: [f"{float(one.mean()):.0%}" for one in some] for name, some in found.items()}
    text = (
        "in small networks, of values whose key came before, in texts of one, two and three times the length and pairs that were trained on, a layer among meta-tokens recalls "
        f"{', '.join(told['meta'])}, the same layer open to all tokens {', '.join(told['open'])}, meta-tokens without the layer {', '.join(told['without'])}, and neither {', '.join(told['plain'])}"
    )
    return Claim(text, *difference(found["meta"][1], found["open"][1]), 0.0, "share of values")


@functools.cache
def _bookmarked(seed: int, name: str) -> tuple[Tensor, ...]:
    """The share of values that are right, by text, at one, two and three times the length."""
    from patchbay.tiny import lab

    after = () if name == "plain" else (META,)  # behind every pair
    layers, blocks = META_ARMS[name]

    def drawn(n: int, at: int, times: int) -> Any:
        return lab.recalls(n, at, pairs=4 * times, length=12 * times * (2 + len(after)), after=after)

    network = lab.small(META + 1, layers=layers, width=48, mlp=48)
    hf = grown(network, [ids for ids, _ in drawn(4096, seed, 1)], blocks, seed, steps=200, rate=5e-3)
    return tuple(_right(hf, drawn(64, seed + 1000, times)) for times in (1, 2, 3))


# --- angles that heads bend ---------------------------------------------------------------------------

ANGLES: dict[str, dict[str, Any]] = {"bent": {"turned": True}, "phases": {"turned": {"bend": False}}, "plain": {}}


@claim("shao2025", "made", seeds=TRAINED)
def shao2025(model: Model, seed: int) -> Claim:
    """Confirmed if texts whose names come again cost less after as many steps where heads bend angles than under plain rotation, from the same start. Told beside it: phases alone,
    the angles as they are."""
    found = {name: _bent(seed, name) for name in ANGLES}
    told = {name: float(one.mean()) for name, one in found.items()}
    text = (
        f"in networks of two layers, texts whose names come again cost {told['bent']:.3f} nats a token where heads bend angles, {told['phases']:.3f} where they add phases alone and {told['plain']:.3f} under "
        "plain rotation"
    )
    return Claim(text, *difference(found["plain"], found["bent"]), 0.0, "nats per token")


@functools.cache
def _bent(seed: int, name: str) -> Tensor:
    """Nats per token by text."""
    from patchbay.tiny import lab

    texts, held = ([ids for ids, _ in lab.mentions(n, at)] for n, at in ((4096, seed), (96, seed + 1000)))
    hf = grown(lab.small(64, width=48, mlp=96), texts, ANGLES[name], seed, steps=200, rate=5e-3)
    return nats(said(hf, held), held).mean(1)


# --- gates in place of sums ---------------------------------------------------------------------------

LEARNED = 0.5  # nats a token
RATES = (0.12, 0.24, 0.48, 0.96)  # at the least a plain network learns all texts, at four times it some of them no more
GATES: dict[str, dict[str, Any]] = {"gated": {"gate": 2.0}, "open": {"gate": 0.0}, "wide": {}, "plain": {}}


@claim("parisotto2019", "made", seeds=TRAINED)
def parisotto2019(model: Model, seed: int) -> Claim:
    """Confirmed if, over rates of 1, 2, 4 and 8 times the least, training fails of fewer texts where gates stand in place of sums than in a plain network of as many
    weights: fails where a text costs, in the end, not half a nat a token less than its words do by how often they come. Told beside it: gates that start half open, and the plain network of the same width. The paper's own networks are taught by rewards."""
    found = {name: _steady(seed, name) for name in GATES}
    told = {name: ", ".join(f"{float(share):.2f}" for share in one.mean(1)) for name, one in found.items()}
    text = (
        f"in networks of three layers, at rates of {', '.join(f'{rate:g}' for rate in RATES)}, training fails of {told['gated']} of the texts where gates stand in place of sums, {told['wide']} in a plain "
        f"network of as many weights ({told['plain']} in one of the same width, {told['open']} where gates start half open)"
    )
    return Claim(text, *difference(found["wide"].mean(0), found["gated"].mean(0)), 0.0, "share of runs")


@functools.cache
def _steady(seed: int, name: str) -> Tensor:
    """Whether a text costs not LEARNED less than its words do by how often they come, 0 or 1, [rate, text]; also where the weights are no numbers."""
    import torch

    from patchbay.tiny import lab
    from patchbay.train import _equal

    texts, held = ([ids for ids, _ in lab.phrases(n, at)] for n, at in ((2048, seed), (64, seed + 1000)))
    alone = nats_by_frequency(torch.tensor(texts)[:, 1:], held, 19).mean(1)
    network = lab.small(19, layers=3, width=32, heads=2, mlp=64)
    mlp = 0
    if name == "wide":
        network_gated = pb.blocks.build(network.hf, **GATES["gated"])
        mlp = _equal.width(network, sum(weight.numel() for weight in network_gated.parameters()))
    rows = []
    for rate in RATES:
        hf = grown(network, texts, GATES[name], seed, steps=60, rate=rate, mlp=mlp)
        cost = nats(said(hf, held), held).mean(1)
        rows.append(~(cost <= alone - LEARNED))  # so that what is no number counts
    return torch.stack(rows).double()
